"""The token store: a corpus cut into blocks and tokenised once, then only memory-mapped.

A folder of flat files, each one array, beside `manifest.json` and `tokenizer.json`:

    body_tokens, body_offsets            wordpieces of every block, one after the other; where each begins
    sentence_bounds, sentence_offsets    token positions where the sentences of a block begin and end
    text, text_offsets                   UTF-8 of every block; encoding it gives the body's tokens again
    block_document, content_hash         the document a block was cut from; a hash of its normalised text
    title_tokens, title_token_offsets    per document
    title_text, title_text_offsets
    document_ids, document_id_offsets    per document: the id its source gave it

Every `*_offsets` has one entry more than there are items. Token ids are uint16 where the vocabulary fits.
`corpus_hash` covers all of it and does not depend on how many processes built it.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from realm_fast.errors import CorruptArtifactError, DataError
from realm_fast.files import read_json, sha256_file
from realm_fast.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NUM_SPECIAL_TOKENS = 3  # [CLS] title [SEP] body [SEP]

# name -> (dtype, the data that an offsets array points into or "")
TOKEN = "token"
ARRAYS: dict[str, tuple[str, str]] = {
    "body_tokens": (TOKEN, ""),
    "body_offsets": ("int64", "body_tokens"),
    "sentence_bounds": ("int32", ""),
    "sentence_offsets": ("int64", "sentence_bounds"),
    "text": ("uint8", ""),
    "text_offsets": ("int64", "text"),
    "block_document": ("int32", ""),
    "content_hash": ("uint64", ""),
    "title_tokens": (TOKEN, ""),
    "title_token_offsets": ("int64", "title_tokens"),
    "title_text": ("uint8", ""),
    "title_text_offsets": ("int64", "title_text"),
    "document_ids": ("uint8", ""),
    "document_id_offsets": ("int64", "document_ids"),
}


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "int32"


def file_name(array: str) -> str:
    return f"{array}.bin"


def corpus_hash(manifest: dict[str, Any]) -> str:
    """sha256 over what decides every id and every text: layout, tokenizer, limit and the files' hashes."""
    deciding = {
        "format_version": manifest["format_version"],
        "tokenizer_hash": manifest["tokenizer_hash"],
        "max_block_tokens": manifest["max_block_tokens"],
        "files": {name: entry["sha256"] for name, entry in sorted(manifest["files"].items())},
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


class TokenStore:
    """Read-only access to the blocks of a corpus. Opens in milliseconds whatever the size."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.corpus_hash: str = manifest["corpus_hash"]
        self.tokenizer_hash: str = manifest["tokenizer_hash"]
        self.vocab_size: int = manifest["vocab_size"]
        self.max_block_tokens: int = manifest["max_block_tokens"]
        self.num_documents: int = manifest["num_documents"]
        self._arrays = {name: self._map(name) for name in ARRAYS}

    @classmethod
    def open(cls, path: str | Path, *, verify: str = "sizes") -> "TokenStore":
        """Opens a store.

        Args:
            path: the store's folder.
            verify: "sizes" compares every file's size with the manifest; "hashes" also reads every file
                and compares its sha256.

        Raises:
            DataError: there is no store.
            CorruptArtifactError: a file is missing, truncated or altered; the message names it.
        """
        if verify not in ("sizes", "hashes"):
            raise ValueError(f"verify: expected 'sizes' or 'hashes', got {verify!r}")
        path = Path(path)
        if not (path / MANIFEST).is_file():
            what = "holds no manifest.json, so it is no token store" if path.is_dir() else "does not exist"
            raise DataError(f"{path}: {what}; build one with `realm-fast corpus build`.")
        manifest = read_json(path / MANIFEST, "the corpus manifest")
        _check_manifest(path, manifest)
        for name in ARRAYS:
            expected = manifest["files"][name]
            file = path / file_name(name)
            if not file.is_file():
                raise CorruptArtifactError(f"{file}: missing from the token store; build the corpus again.")
            if (size := file.stat().st_size) != expected["bytes"]:
                state = "truncated" if size < expected["bytes"] else "altered"
                raise CorruptArtifactError(
                    f"{file}: {state}: {size} bytes, the manifest says {expected['bytes']}; "
                    "build the corpus again."
                )
            if verify == "hashes" and (found := sha256_file(file)) != expected["sha256"]:
                raise CorruptArtifactError(
                    f"{file}: altered: sha256 {found}, the manifest says {expected['sha256']}; "
                    "build the corpus again."
                )
        if verify == "hashes" and (found := corpus_hash(manifest)) != manifest["corpus_hash"]:
            raise CorruptArtifactError(
                f"{path / MANIFEST}: altered: its contents hash to {found}, "
                f"it says {manifest['corpus_hash']}; build the corpus again."
            )
        return cls(path, manifest)

    def _map(self, name: str) -> np.ndarray:
        entry = self.manifest["files"][name]
        if entry["items"] == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=entry["dtype"])
        mapped = np.memmap(self.path / file_name(name), dtype=entry["dtype"], mode="r")
        return mapped.view(np.ndarray)  # slices of plain arrays are several times cheaper

    def __len__(self) -> int:
        return self.manifest["num_blocks"]

    def __reduce__(self) -> tuple:
        return TokenStore.open, (self.path,)

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, blocks={len(self)}, corpus_hash={self.corpus_hash[:12]})"

    def array(self, name: str) -> np.ndarray:
        """One whole memory-mapped array, by the name the module's docstring gives it."""
        return self._arrays[name]

    def _slice(self, data: str, offsets: str, i: int) -> np.ndarray:
        bounds = self._arrays[offsets]
        if not 0 <= i < len(bounds) - 1:
            raise IndexError(f"{i} is not in 0..{len(bounds) - 2} of {self.path}")
        return self._arrays[data][bounds[i] : bounds[i + 1]]

    def body_tokens(self, i: int) -> np.ndarray:
        """Wordpieces of block i, title and special tokens not included [T] (uint16 or int32 view)."""
        return self._slice("body_tokens", "body_offsets", i)

    def title_tokens(self, i: int) -> np.ndarray:
        """Wordpieces of the title of block i's document (uint16 or int32 view)."""
        return self._slice("title_tokens", "title_token_offsets", self.document(i))

    def sentences(self, i: int) -> np.ndarray:
        """int32 [S+1]: sentence s of block i is body_tokens(i)[bounds[s]:bounds[s+1]]."""
        return self._slice("sentence_bounds", "sentence_offsets", i)

    def text(self, i: int) -> str:
        """The block's text; its encoding is body_tokens(i)."""
        return self._slice("text", "text_offsets", i).tobytes().decode("utf-8")

    def title(self, i: int) -> str:
        return self._slice("title_text", "title_text_offsets", self.document(i)).tobytes().decode("utf-8")

    def document(self, i: int) -> int:
        """Which document, in reading order, block i was cut from."""
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} is not in 0..{len(self) - 1} of {self.path}")
        return int(self._arrays["block_document"][i])

    def document_id(self, i: int) -> str:
        """The id that the source gave the document of block i."""
        return self._slice("document_ids", "document_id_offsets", self.document(i)).tobytes().decode("utf-8")

    def content_hash(self, i: int) -> int:
        """64-bit hash of the block's text without regard to case, spacing and Unicode form."""
        return int(self._arrays["content_hash"][i])

    @functools.cached_property
    def _block_lengths(self) -> np.ndarray:
        title_lengths = np.diff(self._arrays["title_token_offsets"])
        lengths = np.diff(self._arrays["body_offsets"]) + NUM_SPECIAL_TOKENS
        lengths += title_lengths[self._arrays["block_document"]]
        lengths = lengths.astype(np.int32)
        lengths.flags.writeable = False
        return lengths

    def block_lengths(self) -> np.ndarray:
        """int32 [N]: tokens of `[CLS] title [SEP] body [SEP]`, at most max_block_tokens (read-only)."""
        return self._block_lengths

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.path)
        if tokenizer.hash != self.tokenizer_hash:
            raise CorruptArtifactError(
                f"{self.path / 'tokenizer.json'}: altered: its hash is {tokenizer.hash}, "
                f"the manifest says {self.tokenizer_hash}."
            )
        return tokenizer

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was built with, kept inside the store."""
        return self._tokenizer


def _check_manifest(path: Path, manifest: Any) -> None:
    where = path / MANIFEST
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CorruptArtifactError(
            f"{where}: format version {version!r}, this release reads {FORMAT_VERSION}; "
            "build the corpus again."
        )
    required = {
        "corpus_hash": str,
        "tokenizer_hash": str,
        "vocab_size": int,
        "max_block_tokens": int,
        "num_blocks": int,
        "num_documents": int,
        "files": dict,
    }
    for key, kind in required.items():
        if not isinstance(manifest.get(key), kind):
            raise CorruptArtifactError(
                f"{where}: {key}: expected {kind.__name__}, got {manifest.get(key)!r}."
            )
    for name in ARRAYS:
        entry = manifest["files"].get(name)
        if not isinstance(entry, dict) or not {"bytes", "sha256", "dtype", "items"} <= entry.keys():
            raise CorruptArtifactError(f"{where}: says nothing complete about {file_name(name)}.")
