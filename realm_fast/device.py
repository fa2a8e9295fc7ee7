"""Which device `config.device` means."""

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
