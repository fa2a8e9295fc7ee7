"""The models of a run that questions are answered with: which checkpoint, and the index that belongs to it.

    "finetune"   the fine-tuned checkpoint that did best on the dev questions, the newest where there were
                 none: question embedder, span reader, and their index
    "pretrain"   the newest pre-training checkpoint: retrieval alone
    "ict"        the embedder that the inverse cloze task made: retrieval alone
    "start"      what the configuration's trunks are before any training in this run: retrieval alone
    "auto"       the first of these four that there is

An index belongs to an embedder if it was made by exactly its block side, which a hash tells. Where a run
holds no such index (a refresh lags behind training), one is made.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from realm_fast.checkpoint import Checkpoint, checkpoint_name, newest_checkpoint, read_checkpoint
from realm_fast.config import Config
from realm_fast.device import resolve_device
from realm_fast.embedder import Embedder
from realm_fast.errors import DataError, ProvenanceError, RealmFastError
from realm_fast.files import atomic_dir, link_or_copy
from realm_fast.index import Index, Provenance
from realm_fast.optim import step_seed
from realm_fast.questions import Bm25Index
from realm_fast.reader import Reader, SpanReader
from realm_fast.reading import Beam, ReadSettings, bm25_beam, retrieve
from realm_fast.run_folder import RunFolder
from realm_fast.snapshot import list_snapshots, open_snapshot, read_manifest, snapshot_name
from realm_fast.snapshot_writer import write_snapshot
from realm_fast.start import starting_models
from realm_fast.token_store import TokenStore

log = logging.getLogger(__name__)
CHECKPOINTS = ("auto", "finetune", "pretrain", "ict", "start")


@dataclass(frozen=True)
class StartingPoint:
    """What fine-tuning starts from."""

    name: str  # "pretrain/checkpoints/step-00000200", "ict/checkpoints/step-00000250" or "warm start"
    step: int  # pre-training steps behind it
    embedder: Embedder
    reader: Reader


@dataclass(frozen=True)
class QaModel:
    """What answers questions; `span_reader` is None before fine-tuning: then it only retrieves."""

    name: str
    stage: str  # "finetune", "pretrain", "ict" or "start"
    embedder: Embedder
    span_reader: SpanReader | None
    index: Index
    store: TokenStore
    settings: ReadSettings
    started_from: str | None = None  # what fine-tuning started from, if it was fine-tuned
    notes: list[str] = field(default_factory=list)
    bm25: Bm25Index | None = None  # instead of the index, where the reader was fine-tuned so

    def beam(self, texts: Sequence[str], query_emb: torch.Tensor, k: int) -> Beam:
        """The best k blocks of each question."""
        if self.bm25 is not None:
            return bm25_beam(self.bm25, texts, k)
        return retrieve(self.index, query_emb, k, temperature=self.settings.score_temperature)


def starting_point(run: RunFolder, config: Config, store: TokenStore) -> StartingPoint:
    """The newest pre-training checkpoint, or what pre-training would start from where there is none."""
    checkpoint = newest_checkpoint(run.pretrain_dir / "checkpoints")
    if checkpoint is not None:
        embedder = Embedder.load(checkpoint.module_folder("embedder"))
        reader = Reader.load(checkpoint.module_folder("reader"))
        _check_tokenizer(embedder, store, str(checkpoint.path))
        return StartingPoint(_name_in(run, checkpoint.path), checkpoint.step, embedder, reader)
    start = starting_models(run, config, store)
    name = "warm start" if start.embedder_from == config.embedder.trunk else start.embedder_from
    return StartingPoint(name, 0, start.embedder, start.reader)


def untrained_embedder(config: Config, store: TokenStore) -> Embedder:
    """The embedder before any training; a function of settings and seed."""
    torch.manual_seed(step_seed(config.seed, 0))
    return Embedder.from_config(config.embedder, store.tokenizer())


def find_index(folders: Sequence[Path], encoder_hash: str, corpus_hash: str, backend: str) -> Path | None:
    """The newest snapshot in `folders` that this encoder made of this corpus, or None."""
    for folder in folders:
        for path in reversed(list_snapshots(folder).values()):
            try:
                manifest = read_manifest(path)
            except RealmFastError as error:
                log.warning("passing over %s: %s", path, error)
                continue
            if (manifest.encoder_hash, manifest.corpus_hash, manifest.backend) == (
                encoder_hash,
                corpus_hash,
                backend,
            ):
                return path
    return None


def index_of(
    run: RunFolder,
    embedder: Embedder,
    store: TokenStore,
    config: Config,
    *,
    out: Path,
    step: int,
    adopt: bool = False,
    progress: bool = False,
) -> Path:
    """The snapshot made by exactly this embedder's block side: found in the run, or else embedded into `out`.

    Args:
        adopt: link a snapshot that lies elsewhere into `out` too, so that pruning does not take it away.
    """
    encoder_hash = embedder.hash()
    own = [out, run.finetune_dir / "snapshots", run.evaluate_dir / "snapshots"]
    path = find_index(
        [*own, run.pretrain_dir / "snapshots"], encoder_hash, store.corpus_hash, config.index.backend
    )
    if path is None:
        with run.lock("index"):
            log.info(
                "no index of this run was made by these weights: embedding %d blocks into %s", len(store), out
            )
            return write_snapshot(
                out,
                step,
                embedder,
                store,
                config.index,
                token_budget=config.refresh.token_budget,
                shard_blocks=config.refresh.shard_blocks,
                precision=config.refresh.precision,
                progress=progress,
            )
    if not adopt or path.parent == out:
        return path
    target = out / snapshot_name(step)
    if target.exists():  # of other weights, or find_index had found it
        shutil.rmtree(target)
    with atomic_dir(target) as staging:
        for file in path.iterdir():
            link_or_copy(file, staging / file.name)
    return target


def best_checkpoint(newest: Checkpoint) -> Checkpoint:
    """The one that did best on the dev questions, as the newest knows; itself where there were none."""
    best_step = newest.state.get("early_stopping", {}).get("best_step")
    if best_step is None:
        return newest
    return read_checkpoint(newest.path.with_name(checkpoint_name(best_step)))


def load_qa_model(
    run: RunFolder,
    config: Config,
    checkpoint: str = "auto",
    *,
    corpus: TokenStore | None = None,
    progress: bool = False,
) -> QaModel:
    """Loads what answers questions in `run`.

    Args:
        checkpoint: see the module's docstring; or a folder of one.
        corpus: answer from this one instead of the run's: the same models, nothing trained again. Its index
            is embedded the first time and kept in RUN/corpora.

    Raises:
        DataError: there is no such checkpoint.
        ProvenanceError: checkpoint, index and corpus do not belong together, or another tokenizer made
            `corpus`.
    """
    store = run.store() if corpus is None else corpus
    own_corpus = store.corpus_hash == run.manifest["corpus_hash"]
    snapshots = run.evaluate_dir / "snapshots"
    if not own_corpus:
        snapshots = run.path / "corpora" / store.corpus_hash[:16]
    if checkpoint not in CHECKPOINTS:
        found: Checkpoint | None = read_checkpoint(checkpoint)
        held = {name for name in ("span_reader", "reader") if (Path(checkpoint) / name).is_dir()}
        stage = "finetune" if "span_reader" in held else "pretrain" if "reader" in held else "ict"
    else:
        found, stage = None, "start"
        for candidate in ("finetune", "pretrain", "ict"):
            if checkpoint in ("auto", candidate):
                found = newest_checkpoint(run.path / candidate / "checkpoints")
                if found is not None:
                    found, stage = best_checkpoint(found), candidate
                    break
        if found is None and checkpoint in ("finetune", "pretrain", "ict"):
            raise DataError(
                f"{run.path}: holds no {checkpoint} checkpoint; `realm-fast {checkpoint}` makes one."
            )
    if found is None:
        embedder, name, step = untrained_embedder(config, store), "warm start", 0
    else:
        embedder = Embedder.load(found.module_folder("embedder"))
        name, step = _name_in(run, found.path), found.step
        _check_tokenizer(embedder, store, str(found.path))
    if found is not None and stage == "finetune" and own_corpus:
        return _finetuned(run, found, embedder, store, name)
    path = index_of(
        run,
        embedder.to(resolve_device(config.device)),
        store,
        config,
        out=snapshots,
        step=step,
        progress=progress,
    )
    index = open_snapshot(path, expect=Provenance(embedder.hash(), store.corpus_hash, step)).index
    if found is not None and stage == "finetune":
        return _with_span_reader(found, embedder, store, name, index)
    notes = [f"{name}: not fine-tuned, so it retrieves blocks but reads no answers out of them."]
    return QaModel(name, stage, embedder.eval(), None, index, store, ReadSettings.of(config), notes=notes)


def _finetuned(
    run: RunFolder, checkpoint: Checkpoint, embedder: Embedder, store: TokenStore, name: str
) -> QaModel:
    state = checkpoint.state
    for what, expected, found in (
        ("corpus", state["corpus_hash"], store.corpus_hash),
        ("block side of the embedder", state["block_encoder_hash"], embedder.hash()),
    ):
        if expected != found:
            raise ProvenanceError(
                f"{checkpoint.path}: was fine-tuned with {what} {expected[:16]}, found {found[:16]}."
            )
    index = open_snapshot(
        run.path / state["snapshot"],
        expect=Provenance(state["block_encoder_hash"], state["corpus_hash"], checkpoint.step),
    ).index
    return _with_span_reader(checkpoint, embedder, store, name, index)


def _with_span_reader(
    checkpoint: Checkpoint, embedder: Embedder, store: TokenStore, name: str, index: Index
) -> QaModel:
    settings = ReadSettings(**checkpoint.state["read_settings"])
    return QaModel(
        name,
        "finetune",
        embedder.eval(),
        SpanReader.load(checkpoint.module_folder("span_reader")).eval(),
        index,
        store,
        settings,
        started_from=checkpoint.state["started_from"],
        bm25=Bm25Index(store) if settings.retriever == "bm25" else None,
    )


def _check_tokenizer(embedder: Embedder, store: TokenStore, where: str) -> None:
    if embedder.tokenizer_hash != store.tokenizer_hash:
        raise ProvenanceError(
            f"{where}: its tokenizer is {embedder.tokenizer_hash[:16]}, "
            f"that of {store.path} is {store.tokenizer_hash[:16]}."
        )


def _name_in(run: RunFolder, path: Path) -> str:
    try:
        return path.resolve().relative_to(run.path.resolve()).as_posix()
    except ValueError:
        return str(path)
