"""A BERT-like trunk for embedding on the CPU: packed tokens, prepared weights, nothing computed for padding.

    trunk = PackedTrunk(embedder.block_side.trunk, torch.bfloat16, first_only=True)
    states = trunk(pack)  # [R, H]: the last layer's state of every row's first token

Every token-wise layer runs over [S, H], the tokens of a pack one after the other. Attention runs over the
rows of one length at a time, which in a length-sorted pack are many, and so needs neither a mask nor padding.
Query, key and value are one product. Weights are brought into the layout and type of the product once.

The residual stream, LayerNorm and softmax are float32 whatever the products are: bfloat16 rounds only what
enters a product and what leaves it. Values depend on nothing but the pack: no choice is made by timing.

Source: Devlin et al. 2019, in the module layout of transformers' BertModel, as encoder.Trunk runs it.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realm_fast.encoder import Trunk
from realm_fast.packing import TokenPack


class PackedTrunk:
    """One set of weights, made ready. Later changes of the trunk's do not reach it.

    Args:
        trunk: in BERT's layout, on the CPU.
        dtype: float32 or bfloat16, of the products.
        first_only: compute the last layer at every row's first token only.
    """

    def __init__(self, trunk: Trunk, dtype: torch.dtype, *, first_only: bool) -> None:
        self._trunk = trunk
        self._dtype = dtype
        self._first_only = first_only
        layers = list(trunk.model.encoder.layer)
        self._layers = [
            _Layer(layer, dtype, first_only=first_only and layer is layers[-1]) for layer in layers
        ]

    def __call__(self, pack: TokenPack) -> Tensor:
        """The last layer's states.

        Returns:
            [S, H] float32, or [R, H] with `first_only`.
        """
        states = self._embeddings(pack)  # [S, H]
        runs = equal_runs(pack.cu_seqlens)
        for layer in self._layers:
            states = layer(states, runs, pack.cu_seqlens)
        return states

    def _embeddings(self, pack: TokenPack) -> Tensor:
        embeddings = self._trunk.model.embeddings
        starts, lengths = pack.cu_seqlens[:-1], pack.cu_seqlens.diff()
        places = torch.arange(len(pack.ids)) - starts.repeat_interleave(lengths)
        states = embeddings.word_embeddings(pack.ids)
        states += embeddings.position_embeddings(places + self._trunk.first_position)
        states += embeddings.token_type_embeddings(self._trunk.segments(pack.segments))
        return embeddings.LayerNorm(states)


class _Layer:
    def __init__(self, layer: Any, dtype: torch.dtype, *, first_only: bool) -> None:
        attention = layer.attention.self
        self._heads, self._width = attention.num_attention_heads, attention.attention_head_size
        self._dtype = dtype
        self._first_only = first_only
        query, key, value = attention.query, attention.key, attention.value
        # Where queries come from the first tokens alone, keys and values are a product of their own.
        products = [[query], [key, value]] if first_only else [[query, key, value]]
        self._in = [_joined(dtype, layers) for layers in products]
        output = layer.attention.output
        self._out, self._out_norm = _joined(dtype, [output.dense]), output.LayerNorm
        self._up = _joined(dtype, [layer.intermediate.dense], layer.intermediate.intermediate_act_fn)
        self._down, self._down_norm = _joined(dtype, [layer.output.dense]), layer.output.LayerNorm

    def __call__(self, states: Tensor, runs: list[tuple[int, int, int]], cu_seqlens: Tensor) -> Tensor:
        """[S, H] -> [S, H], or [R, H] for the first tokens alone."""
        inputs = states.to(self._dtype)
        if self._first_only:
            first = cu_seqlens[:-1]
            states = states[first]  # [R, H]
            query, key, value = self._in[0](inputs[first]), *self._in[1](inputs).chunk(2, dim=1)
        else:
            query, key, value = self._in[0](inputs).chunk(3, dim=1)
        context = torch.empty(states.shape, dtype=self._dtype)
        done = 0  # rows
        for begin, rows, length in runs:
            end = begin + rows * length
            places = slice(done, done + rows) if self._first_only else slice(begin, end)
            done += rows
            mixed = F.scaled_dot_product_attention(
                self._split(query[places], rows),
                self._split(key[begin:end], rows),
                self._split(value[begin:end], rows),
            )  # [rows, heads, ., width]
            context[places] = mixed.transpose(1, 2).reshape(-1, context.shape[1])
        states = self._out_norm(self._out(context).float().add_(states))
        up = self._up(states.to(self._dtype))
        return self._down_norm(self._down(up).float().add_(states))

    def _split(self, x: Tensor, rows: int) -> Tensor:
        """[rows * ., H] -> [rows, heads, ., width]"""
        return x.view(rows, -1, self._heads, self._width).transpose(1, 2)


def equal_runs(cu_seqlens: Tensor) -> list[tuple[int, int, int]]:
    """Neighbouring rows of one length: (first token, rows, tokens of each)."""
    runs, begin = [], int(cu_seqlens[0]) if len(cu_seqlens) else 0
    for length, group in itertools.groupby(cu_seqlens.diff().tolist()):
        rows = sum(1 for _ in group)
        runs.append((begin, rows, length))
        begin += rows * length
    return runs


def _joined(
    dtype: torch.dtype, layers: list[nn.Linear], activation: nn.Module | None = None
) -> Callable[[Tensor], Tensor]:
    """x -> the layers' outputs side by side, as one product in `dtype`, and then the activation."""
    weight = torch.cat([layer.weight.detach() for layer in layers]).to(dtype)
    bias = torch.cat([layer.bias.detach() for layer in layers]).to(dtype)
    if not _onednn_takes(dtype):
        if activation is None:
            return lambda x: F.linear(x, weight, bias)
        return lambda x: activation(F.linear(x, weight, bias))
    prepared = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise.default
    if _is_exact_gelu(activation):  # inside the product: one pass over [S, 4 H] less
        return lambda x: product(x, prepared, bias, "gelu", [], "none")
    if activation is None:
        return lambda x: product(x, prepared, bias, "none", [], "")
    return lambda x: activation(product(x, prepared, bias, "none", [], ""))


def _is_exact_gelu(activation: nn.Module | None) -> bool:
    """Whether it is x Phi(x) by the error function, which transformers calls "gelu"."""
    if activation is None:
        return False
    x = torch.linspace(-4, 4, 33)
    return torch.equal(activation(x), F.gelu(x))


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies `dtype` here, on weights in its own layout."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
