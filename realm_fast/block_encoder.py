"""From packs of tokens to the states that pooling reads, without a gradient: the trunk while embedding.

encoder = block_encoder(embedder, "auto")
prepared = encoder.prepare(pack)     # on any thread: padding, pinning
states = encoder.encode(prepared)    # arguments of EmbedderSide.epilogue
"""

from typing import Any, Literal, Protocol

import torch

from realm_fast.build import cpu_features
from realm_fast.embedder import Embedder
from realm_fast.errors import ConfigError
from realm_fast.packed_trunk import PackedTrunk
from realm_fast.packing import TokenBatch, TokenPack, pad_pack, row_multiple

Precision = Literal["auto", "float32", "bfloat16"]
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """What "auto" means on a device: bfloat16 where it has instructions for it, float32 elsewhere.

    Raises:
        ConfigError: it is none of auto, float32 and bfloat16.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"precision: expected auto, float32 or bfloat16, got {precision!r}.")
    if precision != "auto":
        return precision
    has_bfloat16 = (
        cpu_features()["detected"]["avx512bf16"]  # CPUs with AMX have it too
        if device.type == "cpu"
        else torch.cuda.get_device_capability(device) >= (8, 0)
    )
    return "bfloat16" if has_bfloat16 else "float32"


class BlockEncoder(Protocol):
    """A trunk made ready for one set of weights."""

    row_multiple: int  # what rows are padded to a multiple of; 1: not at all

    def prepare(self, pack: TokenPack) -> Any:
        """What `encode` takes; called on another thread while `encode` is at work."""

    def encode(self, prepared: Any) -> dict[str, torch.Tensor]:
        """The states that pooling reads, as arguments of `EmbedderSide.epilogue`."""

    def computed_tokens(self, prepared: Any) -> int:
        """Tokens that `encode` computes, padding included."""


def block_encoder(embedder: Embedder, precision: Precision) -> BlockEncoder:
    """The fastest encoder for the embedder's trunk, device and precision."""
    chosen = resolve_precision(precision, embedder.device)
    trunk = embedder.block_side.trunk
    packed = trunk.is_bert_layout and trunk.token_embedding.is_cpu
    return PackedEncoder(embedder, chosen) if packed else PaddedEncoder(embedder, chosen)


class PaddedEncoder:
    """Any trunk, by its own forward: rows padded to the longest of their pack, bfloat16 by autocast."""

    def __init__(self, embedder: Embedder, precision: str) -> None:
        self._embedder = embedder
        self._bfloat16 = precision == "bfloat16"
        self.row_multiple = row_multiple(embedder.device)

    def prepare(self, pack: TokenPack) -> TokenBatch:
        embedder = self._embedder
        batch = pad_pack(pack, embedder.special.pad_id, self.row_multiple, embedder.max_tokens)
        # Pinned memory, so that the copy to the device does not wait for the kernels before it.
        return TokenBatch(*(part.pin_memory() for part in batch)) if embedder.device.type == "cuda" else batch

    def encode(self, prepared: TokenBatch) -> dict[str, torch.Tensor]:
        device = self._embedder.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16):
            return self._embedder.block_side.pooled_states(prepared.to(device))

    def computed_tokens(self, prepared: TokenBatch) -> int:
        return prepared.ids.numel()


class PackedEncoder:
    """A trunk in BERT's layout on the CPU, by realm_fast.packed_trunk: nothing padded, weights made ready."""

    row_multiple = 1

    def __init__(self, embedder: Embedder, precision: str) -> None:
        side = embedder.block_side
        self._first_only = side.pooling == "cls"
        self._trunk = PackedTrunk(side.trunk, _TYPES[precision], first_only=self._first_only)

    def prepare(self, pack: TokenPack) -> TokenPack:
        return pack

    def encode(self, prepared: TokenPack) -> dict[str, torch.Tensor]:
        states = self._trunk(prepared)
        if self._first_only:
            return {"hidden": states[:, None]}  # [R, 1, H]
        return {"hidden": states, "cu_seqlens": prepared.cu_seqlens}  # [S, H]

    def computed_tokens(self, prepared: TokenPack) -> int:
        return prepared.ids.numel()
