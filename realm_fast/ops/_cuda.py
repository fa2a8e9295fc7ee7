"""Whether this build's CUDA kernels can run on a device; asked before a call: so errors name the cause."""

import torch

from realm_fast import _native

MINIMUM_CAPABILITY = (8, 0)


def device_reasons(device: torch.device) -> list[str]:
    """Every reason why the kernels cannot run on this device; empty when they can. Launches nothing."""
    if device.type != "cuda":
        return [f"the tensors are on {device}"]
    if not _native.build_info()["cuda"]:
        return ["this build has no CUDA kernels (no nvcc was found when it was built)"]
    if torch.version.hip is not None:
        return ["the CUDA kernels do not run on ROCm"]
    return [reason for reason in (_driver_reason(), capability_reason(device)) if reason is not None]


def cuda_reason(tensor: torch.Tensor) -> str | None:
    """Why the kernels cannot take this tensor, or None."""
    return "; ".join(device_reasons(tensor.device)) or None


def _driver_reason() -> str | None:
    """The CUDA runtime in this build is a later major version than the driver knows."""
    needed, found = _native.cuda_runtime_version(), _native.cuda_driver_version()
    if found // 1000 >= needed // 1000:  # minor versions of one major run on each other's drivers
        return None
    has = f"the driver runs CUDA {_version(found)} at most" if found else "no NVIDIA driver is loaded"
    return f"{has}, this build needs {_version(needed)}: install a newer driver, or build with an older nvcc"


def capability_reason(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= MINIMUM_CAPABILITY:
        return None
    needed, found = (".".join(map(str, version)) for version in (MINIMUM_CAPABILITY, capability))
    return f"the kernels need compute capability {needed}, {device} has {found}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
