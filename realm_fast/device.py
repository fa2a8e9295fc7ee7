"""Which device `config.device` means, and how tensors come to it and back.

Copies between host and GPU go through pinned memory and are queued on the current stream, so that the host
does not wait. torch's allocator of pinned memory keeps the buffers, and gives one away again only when the
copy that reads it is done: they are the staging buffers of everything here.
"""

import torch

from realm_fast.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:1, ...) means; auto prefers CUDA.

    Raises:
        ConfigError: it cannot be had on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: got {name!r}, but torch finds {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`. To a GPU: queued on the current stream, without waiting for it."""
    if tensor.is_cpu and torch.device(device).type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # a copy out of pageable memory would wait for the stream
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host. `wait` gives it when it is there; until then the host is free."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy, self._event = tensor.detach(), None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy


def to_host(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors on the host, detached; one wait for the device, however many there are."""
    copies = [HostCopy(tensor) for tensor in tensors]
    return tuple(copy.wait() for copy in copies)
