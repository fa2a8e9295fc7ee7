"""Text to wordpieces and back, over a BERT-style WordPiece tokenizer.

`encode` adds no special tokens and treats their names in the text ("[MASK]", "[SEP]") as plain text, so
that a corpus cannot smuggle a separator into a block. Two tokenizers with the same vocabulary and the same
rules have the same `hash`, wherever they came from and however they pad or truncate.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from realm_fast import packaged
from realm_fast.errors import DataError
from realm_fast.files import atomic_file

_SPECIAL = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "unk": "[UNK]"}


class Encoding(NamedTuple):
    """One text as wordpieces, special tokens not included."""

    ids: np.ndarray  # int32 [T]
    offsets: np.ndarray  # int32 [T, 2] start and stop of each token, in characters of the text
    word_starts: np.ndarray  # bool [T] true where a word begins; punctuation marks are words


class Tokenizer:
    """A WordPiece tokenizer with the five special tokens of BERT."""

    def __init__(self, backend: tokenizers.Tokenizer, where: str = "tokenizer") -> None:
        if not isinstance(backend.model, WordPiece):
            raise DataError(
                f"{where}: expected a WordPiece tokenizer (BERT and its relatives), "
                f"got {type(backend.model).__name__}."
            )
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        backend.encode_special_tokens = True  # the names of special tokens in a text are plain text
        if backend.decoder is None:
            backend.decoder = decoders.WordPiece(cleanup=True)
        self._backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        ids = {name: backend.token_to_id(token) for name, token in _SPECIAL.items()}
        missing = [_SPECIAL[name] for name, token_id in ids.items() if token_id is None]
        if missing:
            raise DataError(f"{where}: the vocabulary lacks the special token(s) {', '.join(missing)}.")
        known = {name: token_id for name, token_id in ids.items() if token_id is not None}
        self.cls_id = known["cls"]
        self.sep_id = known["sep"]
        self.pad_id = known["pad"]
        self.mask_id = known["mask"]
        self.unk_id = known["unk"]

    @classmethod
    def load(cls, spec: str | Path) -> "Tokenizer":
        """Loads from a folder or a tokenizer.json, a packaged model's name, or a hub name.

        Raises:
            DataError: nothing loadable is there, or it is no WordPiece tokenizer.
        """
        path = Path(spec) if Path(spec).is_file() else packaged.resolve(spec, "tokenizer")
        if isinstance(path, str):
            return cls(_from_hub(path), path)
        if path.is_dir():
            if (path / "tokenizer.json").is_file():
                path = path / "tokenizer.json"
            elif (path / "vocab.txt").is_file():
                return cls(_from_vocabulary(path), str(path))
            else:
                raise DataError(f"{path}: holds neither tokenizer.json nor vocab.txt.")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), str(path))
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a readable tokenizer.json ({error}).") from error

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json into `folder`."""
        with atomic_file(Path(folder) / "tokenizer.json", "w") as file:
            file.write(self._backend.to_str(pretty=False))

    @functools.cached_property
    def hash(self) -> str:
        """sha256 over vocabulary, normaliser and pre-tokeniser: what decides the ids of a text."""
        parts = json.loads(self._backend.to_str())
        model = parts["model"]
        deciding = {
            "vocabulary": sorted(self._backend.get_vocab(with_added_tokens=True).items(), key=lambda x: x[1]),
            "prefix": model.get("continuing_subword_prefix"),
            "max_input_chars_per_word": model.get("max_input_chars_per_word"),
            "unk_token": model.get("unk_token"),
            "normalizer": parts.get("normalizer"),
            "pre_tokenizer": parts.get("pre_tokenizer"),
        }
        text = json.dumps(deciding, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def _continuation(self) -> np.ndarray:
        prefix = self._backend.model.continuing_subword_prefix
        table = np.zeros(self.vocab_size, dtype=bool)  # [V]
        for token, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            table[token_id] = token.startswith(prefix) and len(token) > len(prefix)
        return table

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """bool [T]: true where a word begins."""
        starts = ~self._continuation[ids]
        if len(starts):
            starts[0] = True
        return starts

    def word_begins(self, ids: np.ndarray) -> np.ndarray:
        """bool, the shape of ids: true for tokens that begin a word wherever they stand (no "##")."""
        return ~self._continuation[ids]

    @functools.cached_property
    def is_uncased(self) -> bool:
        """Whether the normaliser drops case."""
        return self._backend.normalizer is not None and self._backend.normalizer.normalize_str("Aa") == "aa"

    def encode(self, text: str) -> Encoding:
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, dtype=np.int32)  # [T]
        offsets = np.asarray(encoding.offsets, dtype=np.int32).reshape(-1, 2)  # [T, 2]
        return Encoding(ids, offsets, self.word_starts(ids))

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        batch = self._backend.encode_batch(list(texts), add_special_tokens=False)
        encodings = []
        for encoding in batch:
            ids = np.asarray(encoding.ids, dtype=np.int32)
            offsets = np.asarray(encoding.offsets, dtype=np.int32).reshape(-1, 2)
            encodings.append(Encoding(ids, offsets, self.word_starts(ids)))
        return encodings

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids alone, without the cost of offsets: what tokenising a corpus needs."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Readable text; special tokens are kept, so a masked query shows its [MASK]."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def tokens(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The wordpiece of each id, "##" included."""
        return [self._backend.id_to_token(int(i)) or self.unk_token for i in ids]

    @property
    def unk_token(self) -> str:
        return _SPECIAL["unk"]

    def token_id(self, token: str) -> int | None:
        """The id of one wordpiece, or None."""
        return self._backend.token_to_id(token)

    def __reduce__(self) -> tuple:
        return _from_json, (self._backend.to_str(),)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, hash={self.hash[:12]})"


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text))


def _from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """BERT's tokenizer from its vocab.txt; lower-casing as tokenizer_config.json says, else on."""
    path = folder / "vocab.txt"
    try:
        vocabulary = {line: i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines())}
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable vocabulary ({error}).") from error
    lower = bool(config.get("do_lower_case", True))
    backend = tokenizers.Tokenizer(
        WordPiece(vocabulary, unk_token=_SPECIAL["unk"], continuing_subword_prefix="##")
    )
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lower,
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens([t for t in _SPECIAL.values() if t in vocabulary])
    return backend


def _from_hub(name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # network, authentication, missing file: the library raises many kinds
        known = ", ".join(packaged.names("model"))
        raise DataError(
            f"{name}: not a folder, not a packaged model ({known}), and the hub did not give a "
            f"tokenizer.json of that name ({type(error).__name__}: {error})."
        ) from error
