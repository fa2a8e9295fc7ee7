"""How far from the float64 truth a result may be: one table for all tests.

The rule: at most twice the error of the same computation by torch in the same dtype, plus a floor that
covers an error of torch that happens to be (nearly) nothing. Floors are relative to the largest magnitude
of the truth.
"""

import torch

FLOOR = {
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
    torch.float64: 1e-12,
}
FLOAT32_UNIT = 2.0**-24  # half the distance from 1 to the next float32


def largest_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """max |actual - truth|; equal infinities agree, and a NaN agrees with a NaN only."""
    actual, truth = actual.detach().double(), truth.detach().double()
    if bool((actual.isnan() != truth.isnan()).any()):
        return float("inf")
    same = (actual == truth) | truth.isnan()
    difference = torch.where(same, 0.0, (actual - truth).abs())
    return float(difference.max()) if difference.numel() else 0.0


def assert_as_good_as_torch(
    actual: torch.Tensor, truth: torch.Tensor, by_torch: torch.Tensor, *, scale: float = 0.0, what: str = ""
) -> None:
    """Asserts |actual - truth| <= 2 |by_torch - truth| + floor * max(|truth|, scale); truth is float64.

    `scale` is the size of the terms of a result that may cancel (p - r, say, of probabilities).
    """
    assert truth.dtype == torch.float64
    assert actual.shape == truth.shape
    truth = truth.detach()
    finite = truth[truth.isfinite()]
    scale = max(scale, float(finite.abs().max()) if finite.numel() else 0.0)
    allowed = 2 * largest_error(by_torch, truth) + FLOOR[actual.dtype] * scale
    error = largest_error(actual, truth)
    assert error <= allowed, f"{what} error {error:.3e}, allowed {allowed:.3e}"


def dot_error_bound(queries: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[B, N]: how far any float32 sum of the products may be from the inner product (Higham), doubled."""
    unit = (queries.shape[1] + 2) * FLOAT32_UNIT
    return 2 * unit * (queries.double().abs() @ blocks.double().abs().T) + queries.shape[1] * 1e-44
