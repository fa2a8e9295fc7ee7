"""Argument checks, made once, at the boundary, by name: `queries: expected [B, 128] float32, got [128]`."""

from collections.abc import Sequence

import torch


def describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{list(value.shape)} {dtype}{place}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Raises TypeError or ValueError unless `value` is a tensor of this shape, dtype and device.

    `shape` holds a size for a fixed dimension and a letter for a free one.
    """
    if (  # nothing is formatted unless it goes wrong
        isinstance(value, torch.Tensor)
        and value.dim() == len(shape)
        and all(size == actual or not isinstance(size, int) for size, actual in zip(shape, value.shape))
        and (dtypes is None or value.dtype in dtypes)
        and (device is None or value.device == device)
    ):
        return value
    letters = "[" + ", ".join(str(size) for size in shape) + "]"
    names = "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes) if dtypes else "any dtype"
    expected = f"{name}: expected {letters} {names}"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{expected}, got {describe(value)}")
    if value.dim() != len(shape) or any(
        isinstance(size, int) and size != actual for size, actual in zip(shape, value.shape, strict=True)
    ):
        raise ValueError(f"{expected}, got {describe(value)}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{expected}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{expected} on {device}, got {describe(value)}")
    return value


def check_int(name: str, value: object, *, minimum: int | None = None, maximum: int | None = None) -> int:
    """Raises unless `value` is an int (not a bool) within [minimum, maximum]."""
    bounds = f" >= {minimum}" if minimum is not None else ""
    bounds += (" and" if bounds else "") + f" <= {maximum}" if maximum is not None else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int{bounds}, got {describe(value)}")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise ValueError(f"{name}: expected an int{bounds}, got {value}")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)
