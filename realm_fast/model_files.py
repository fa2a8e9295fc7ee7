"""How a module lies on disk: a folder with config.json and model.safetensors, whole or absent.

config.json holds {"kind", "format_version", ...}: everything needed to build the module again without the
files it first came from. Weights are stored as they are in memory; names are those of `state_dict`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from realm_fast.errors import CorruptArtifactError, DataError
from realm_fast.files import atomic_dir, read_json, write_json

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save_module(module: nn.Module, folder: str | Path, kind: str, values: dict[str, Any]) -> None:
    """Writes `module` into `folder`, which must not exist yet.

    Args:
        kind: "embedder", "reader" or "span_reader".
        values: what is needed to build the module again, as JSON.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: exists already; a saved {kind} is never overwritten.")
    weights = {name: value.detach().contiguous().cpu() for name, value in module.state_dict().items()}
    with atomic_dir(folder) as staging:
        save_file(weights, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(staging / CONFIG_FILE, {"kind": kind, "format_version": FORMAT_VERSION, **values})


def load_module(folder: str | Path, kind: str, build: Callable[[dict[str, Any]], Any]) -> Any:
    """Reads config.json, lets `build` make the module, and fills in every weight.

    Torch's random generator is left as it was.

    Raises:
        DataError: nothing is there, or it is of another kind or a newer format.
        CorruptArtifactError: config.json or the weights are not as they were written.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG_FILE, f"the configuration of a saved {kind}")
    if not isinstance(values, dict) or values.get("kind") != kind:
        found = values.get("kind") if isinstance(values, dict) else None
        raise DataError(f"{folder}: expected a saved {kind}, found {found or 'something else'}.")
    if values.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder}: written in format {values.get('format_version')}; "
            f"this release reads {FORMAT_VERSION}."
        )
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, only to be overwritten
            module = build(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptArtifactError(
            f"{folder / CONFIG_FILE}: not a valid {kind} configuration ({type(error).__name__}: {error})."
        ) from error
    weights = _read_weights(folder / WEIGHTS_FILE, kind)
    _check_weights(weights, module.state_dict(), folder / WEIGHTS_FILE)
    module.load_state_dict(weights, strict=True)
    return module


def _read_weights(path: Path, kind: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: the weights of a saved {kind} do not exist.") from None
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: it vanished while being opened
        raise CorruptArtifactError(f"{path}: not a readable safetensors file ({error}).") from error


def _check_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: Path) -> None:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(found.keys() & expected.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CorruptArtifactError(f"{path}: does not fit its config.json: {problems[0]}{more}.")
