"""Hypothesis strategies that several tests share: embeddings of the kinds that break searches."""

import torch
from hypothesis import strategies as st

KINDS = (
    "normal",
    "integers",  # exact sums, many ties
    "duplicates",
    "norm_spread",  # norms over eight orders of magnitude
    "power_law",  # a few dimensions hold nearly all the variance
    "near_ties",
    "all_equal",
    "zeros",
    "denormal",
)


def make_embeddings(kind: str, rows: int, dim: int, seed: int) -> torch.Tensor:
    """float32 [rows, dim] of one of KINDS."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, dim, generator=generator)
    if kind == "normal":
        return normal
    if kind == "integers":
        return torch.randint(-3, 4, (rows, dim), generator=generator).float()
    if kind == "duplicates":
        return normal[torch.randint(0, max(rows // 7, 1), (rows,), generator=generator)] if rows else normal
    if kind == "norm_spread":
        return normal * 10 ** (torch.rand(rows, 1, generator=generator) * 8 - 4)
    if kind == "power_law":
        return normal * (torch.arange(1, dim + 1) ** -1.5)
    if kind == "near_ties":
        return normal[:1] + 1e-7 * normal if rows else normal
    if kind == "all_equal":
        return normal[:1].expand(rows, dim).clone()
    if kind == "zeros":
        return torch.zeros(rows, dim)
    if kind == "denormal":
        return normal * 1e-40
    raise ValueError(kind)


@st.composite
def searches(draw: st.DrawFn, max_rows: int = 400, max_dim: int = 40, max_queries: int = 20) -> dict:
    """{"queries", "blocks", "k", "exclude_ids"} for a search, edges included."""
    rows = draw(st.integers(0, max_rows) | st.sampled_from([0, 1, 47, 48, 49, 96]))
    dim = draw(st.integers(0, max_dim) | st.sampled_from([1, 2, 3, 4, 16, 17]))
    queries = draw(st.integers(0, max_queries) | st.sampled_from([1, 2, 3, 4, 8, 9]))
    seed = draw(st.integers(0, 2**31))
    blocks = make_embeddings(draw(st.sampled_from(KINDS)), rows, dim, seed)
    values = make_embeddings(draw(st.sampled_from(KINDS)), queries, dim, seed + 1)
    if draw(st.booleans()) and rows and queries:  # a query that is a block: its best match is sure
        values[0] = blocks[seed % rows]
    k = draw(st.integers(0, 12) | st.sampled_from([rows, rows + 3]))
    excluded = None
    if draw(st.booleans()):
        width = draw(st.integers(0, 4))
        generator = torch.Generator().manual_seed(seed + 2)
        excluded = torch.randint(-1, max(rows, 1), (queries, width), generator=generator)
        excluded = excluded.clamp(max=rows - 1)
    return {"queries": values, "blocks": blocks, "k": k, "exclude_ids": excluded}
