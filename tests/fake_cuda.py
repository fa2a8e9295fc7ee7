"""CUDA tensors without values, for tests on machines without CUDA: torch's fake tensors, and two additions.

A CPU build of torch cannot index, invert or copy tensors of another device (it has no guard for it): here that
is spelled out in the operations behind it. And what would make the host wait for the device raises HostWaits.
"""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
WAITS = {
    getattr(torch.Tensor, name)
    for name in ("nonzero", "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
}
SPELLED_OUT = {
    torch.Tensor.__invert__: aten.bitwise_not,
    torch.Tensor.contiguous: aten.contiguous,
    torch.Tensor.copy_: aten.copy_,
}


class HostWaits(Exception):
    """A value on the device was asked for."""


class _Additions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in WAITS and args[0].is_cuda:
            raise HostWaits(func.__name__)
        if func is torch.Tensor.__getitem__:
            return _select(*args)
        if func is torch.Tensor.__setitem__:
            return _store(*args)
        if func in SPELLED_OUT:
            return SPELLED_OUT[func](*args)
        return func(*args, **(kwargs or {}))


def _views(tensor, key):
    """The view that slices, numbers and None make, and the index tensors of its dimensions."""
    keys = key if isinstance(key, tuple) else (key,)
    if Ellipsis in [k for k in keys if not isinstance(k, torch.Tensor)]:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        given = sum(k is not None and k is not Ellipsis for k in keys)
        keys = (*keys[:at], *[slice(None)] * (tensor.dim() - given), *keys[at + 1 :])
    indices, dim = [], 0
    for k in keys:
        if isinstance(k, int):
            tensor = aten.select.int(tensor, dim, k)
            continue
        if k is None:
            tensor = aten.unsqueeze(tensor, dim)
        elif isinstance(k, slice):
            tensor = aten.slice.Tensor(tensor, dim, k.start, k.stop, k.step or 1)
        indices.append(k if isinstance(k, torch.Tensor) else None)
        dim += 1
    return tensor, indices


def _select(tensor, key):
    view, indices = _views(tensor, key)
    return aten.index.Tensor(view, indices) if any(i is not None for i in indices) else view


def _store(tensor, key, value):
    view, indices = _views(tensor, key)
    value = (
        value
        if isinstance(value, torch.Tensor)
        else torch.full((), value, dtype=view.dtype, device=view.device)
    )
    if any(i is not None for i in indices):
        aten.index_put_(view, indices, value)
    else:
        aten.copy_(view, value)


@contextlib.contextmanager
def fake_cuda():
    """Inside, device="cuda" makes tensors that have a shape and a dtype only."""
    with FakeTensorMode(), _Additions():
        yield
