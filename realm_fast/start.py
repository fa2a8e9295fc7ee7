"""What joint training starts from: the modules that earlier stages of the run made, or the configured trunks.

    embedder    pretrain.start_embedder, or the run's newest `ict` checkpoint, or embedder.trunk
    reader      pretrain.start_reader, or the run's newest `warmup` checkpoint, or reader.trunk

The first of these that there is. Whatever was not made by a stage is new and a function of settings and seed.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from realm_fast.checkpoint import newest_checkpoint
from realm_fast.config import Config
from realm_fast.embedder import Embedder
from realm_fast.errors import ConfigError, ProvenanceError
from realm_fast.optim import step_seed
from realm_fast.reader import Reader
from realm_fast.run_folder import RunFolder
from realm_fast.token_store import TokenStore


@dataclass(frozen=True)
class StartingModels:
    """Where training starts, and where each half came from ("ict/checkpoints/step-00000250", for one)."""

    embedder: Embedder
    reader: Reader
    embedder_from: str
    reader_from: str


def starting_models(run: RunFolder, config: Config, store: TokenStore) -> StartingModels:
    """The models that pre-training, or fine-tuning without it, starts from.

    Raises:
        UserError: a folder that was named holds no such module, or one of other settings or of another
            tokenizer.
    """
    tokenizer = store.tokenizer()
    torch.manual_seed(step_seed(config.seed, 0))
    embedder = Embedder.from_config(config.embedder, tokenizer)
    reader = Reader.from_config(config.reader, tokenizer)
    embedder_from, reader_from = config.embedder.trunk, config.reader.trunk
    if (folder := _module_folder(run, config.pretrain.start_embedder, "ict", "embedder")) is not None:
        embedder, embedder_from = Embedder.load(folder[0]), folder[1]
        _check_settings(embedder.settings, config.embedder, "embedder", embedder_from)
    if (folder := _module_folder(run, config.pretrain.start_reader, "warmup", "reader")) is not None:
        reader, reader_from = Reader.load(folder[0]), folder[1]
        _check_settings(reader.settings, config.reader, "reader", reader_from)
    for module, origin in ((embedder, embedder_from), (reader, reader_from)):
        if module.tokenizer_hash != store.tokenizer_hash:
            raise ProvenanceError(
                f"{origin}: its tokenizer is {module.tokenizer_hash[:16]}, "
                f"that of {store.path} is {store.tokenizer_hash[:16]}."
            )
    return StartingModels(embedder, reader, embedder_from, reader_from)


def _module_folder(run: RunFolder, named: str, stage: str, module: str) -> tuple[Path, str] | None:
    """(verified folder, its name for people), or None where the settings' trunk is to be used."""
    if named:
        return Path(named), named
    checkpoint = newest_checkpoint(run.path / stage / "checkpoints")
    if checkpoint is None:
        return None
    return checkpoint.module_folder(module), checkpoint.path.relative_to(run.path).as_posix()


def _check_settings(loaded: object, configured: object, section: str, origin: str) -> None:
    if loaded != configured:
        raise ConfigError(
            f"{origin}: was made with the settings {loaded}, but the run's section [{section}] says "
            f"{configured}. Use the same settings, or another start."
        )
