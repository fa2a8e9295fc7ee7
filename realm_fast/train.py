"""Pre-training: the retriever and the reader learn together from masked sentences.

    query (masked sentence) -> embedder -> search in the snapshot's index -> K candidates (slot 0: null block)
    -> reader on the query with each candidate: log p(y | x, z);  fresh scores: log p(z | x)
    -> marginal log-likelihood -> gradient into reader and embedder -> AdamW step
    -> when refresh.trigger says so the weights go to the refresher; its snapshots come back between two steps

Every random choice is a function of (seed, step, rank), so a checkpoint holds no generator state, and a run
that was killed and resumed takes the same steps (bit for bit where the refresh is inline or off).
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from realm_fast.checkpoint import (
    Checkpoint,
    SavesItself,
    checkpoint_name,
    checkpoint_steps,
    clean_checkpoints,
    identity_of,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from realm_fast.config import Config
from realm_fast.device import HostCopy, resolve_device
from realm_fast.drift import Drift, DriftProbe, QueryCorrection
from realm_fast.embedder import Embedder
from realm_fast.embedding import EmbeddingStopped
from realm_fast.errors import ConfigError, CorruptArtifactError, DataError, UserError
from realm_fast.evaluate import parse_cutoffs
from realm_fast.gradient_cache import cached_backward
from realm_fast.ict import IctSampler, ict_rows
from realm_fast.masking import MaskedQuery, Masker, prepare_spans
from realm_fast.metrics import MetricsLog
from realm_fast.model import RealmModel, realm_step
from realm_fast.objective import in_batch_contrastive_loss
from realm_fast.optim import (
    build_optimizer,
    check_loss,
    clip_gradients,
    pretrain_warmup_steps,
    set_learning_rates,
    step_seed,
)
from realm_fast.probe import Probe
from realm_fast.progress import bar
from realm_fast.reader import Reader
from realm_fast.refresh import RefreshTask, make_refresher
from realm_fast.residence import Residence
from realm_fast.retriever import MAX_RETRIEVED_BLOCKS
from realm_fast.run_folder import RunFolder
from realm_fast.schedule import Reason, RefreshSchedule, ShardTally
from realm_fast.signals import StopRequest, stop_on_signal
from realm_fast.snapshot import (
    IndexSnapshot,
    open_snapshot,
    prune_snapshots,
    published_snapshots,
    retire_snapshot,
    trained_snapshot,
)
from realm_fast.start import starting_models
from realm_fast.streams import training_stream

WAIT_POLL_S = 0.02
SHOWN = ("retrieval_utility", "masked_accuracy", "null_probability")  # of StepStats, beside the loss
log = logging.getLogger(__name__)


def pretrain(
    run: RunFolder,
    config: Config,
    *,
    resume: bool = False,
    progress: bool = False,
    measure: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Pre-trains `run` to config.pretrain.steps.

    Args:
        run: the run's folder; checkpoints, snapshots and metrics go below run.pretrain_dir.
        config: the settings. On resume they must be the checkpoint's, but for those that change nothing in
            what is computed (checkpoint.FREE_SETTINGS).
        resume: go on from the newest checkpoint. Without it, a run that has one is refused.
        progress: show bars on stderr.
        measure: write evaluations.jsonl, before and after.
        on_step: called with the number of every step that was made.

    Raises:
        TrainingDivergedError: the loss or a gradient is not finite; the last checkpoint is intact.
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
        UserError: settings, corpus or run do not fit together.
    """
    with run.lock("pretrain"), stop_on_signal() as stop:
        trainer = Pretrainer(run, config, resume=resume, progress=progress, stop=stop)
        try:
            trainer.train(measure=measure, on_step=on_step)
        finally:
            trainer.close()


@dataclass
class Window:
    """Sums since the last line of metrics. A checkpoint holds them, so that a resumed run logs the same."""

    steps: int = 0
    loss: float = 0.0
    ict_loss: float = 0.0  # without its weight
    retrieval_utility: float = 0.0
    null_probability: float = 0.0
    grad_norm: float = 0.0
    step_s: float = 0.0
    trainer_wait_s: float = 0.0
    handover_s: float = 0.0  # giving weights to the refresher and taking its snapshots

    def add(self, **values: float) -> None:
        self.steps += 1
        for name, value in values.items():
            setattr(self, name, getattr(self, name) + value)

    def means(self) -> dict[str, float]:
        return {name: value / self.steps for name, value in asdict(self).items() if name != "steps"}


class Pretrainer:
    """The parts of one pre-training process, and the loop over them."""

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        *,
        resume: bool,
        progress: bool,
        stop: StopRequest | None = None,
    ) -> None:
        self.run, self.config, self.progress = run, config, progress
        self.stop = StopRequest() if stop is None else stop  # an unset one is false
        self.folder = run.pretrain_dir
        self.checkpoints, self.snapshots = self.folder / "checkpoints", run.snapshots_dir
        checkpoint = newest_checkpoint(self.checkpoints)
        if checkpoint is not None and not resume:
            raise UserError(
                f"{run.path}: already has a checkpoint of step {checkpoint.step}. "
                "Add --resume to go on from it, or name a new run folder."
            )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        run.clean()
        clean_checkpoints(self.checkpoints)
        self.store = run.store()
        if len(self.store) < config.pretrain.num_candidates:
            raise ConfigError(
                f"pretrain.num_candidates: expected at most {len(self.store)}, as the corpus has so many "
                f"blocks, got {config.pretrain.num_candidates}"
            )
        shaping = ["embedder", "reader", "index", "masking", "pretrain", "refresh"]
        self.identity = identity_of(
            config,
            [*shaping, "ict"] if config.pretrain.ict_weight else shaping,
            corpus_hash=self.store.corpus_hash,
            tokenizer_hash=self.store.tokenizer_hash,
        )
        if checkpoint is not None:
            checkpoint.check_identity(self.identity)
        self.device = resolve_device(config.device)
        spans = prepare_spans(self.store, config.masking, progress=progress)
        self.masker = Masker(self.store, config.masking, config.seed, spans, split="train")
        try:
            held_out = self.masker.with_split("heldout")
        except DataError as error:
            log.warning("no sentences are held out, so masked accuracy is not measured: %s", error)
            held_out = None

        self.ict = self._ict_sampler()
        self.model = self._load_model(checkpoint).to(self.device)
        trained: dict[str, tuple[torch.nn.Module, float]] = {
            "reader": (self.model.reader, config.pretrain.reader_lr)
        }
        if config.pretrain.train_retriever:
            trained["embedder"] = (self.model.embedder, config.pretrain.embedder_lr)
        self.optimizer = build_optimizer(trained, weight_decay=config.pretrain.weight_decay)
        self.step, self.window = 0, Window()
        self.handed_over_step = 0  # whose weights went to the refresher last
        self.drift: Drift | None = None  # measured since the last line of metrics
        self.checked_s = 0.0  # spent on measuring drift
        self.correction: QueryCorrection | None = None  # of the snapshot in use, if refresh.correct_queries
        self.ahead: tuple[int, list[list[MaskedQuery]], Counter[str]] | None = None  # the next step's queries
        if checkpoint is not None:
            checkpoint.load_optimizer(self.optimizer)
            self.step = checkpoint.step
            self.window = Window(**checkpoint.state["window"])
            self.handed_over_step = checkpoint.state["handed_over_step"]
            if checkpoint.state["drift"] is not None:
                self.drift = Drift(**checkpoint.state["drift"])
            self.masker.skipped = Counter(checkpoint.state["skipped"])
        self.metrics = MetricsLog(self.folder / "metrics.jsonl", self.folder / "tensorboard")
        self.refreshes = MetricsLog(self.folder / "refreshes.jsonl")
        for written in (self.metrics, self.refreshes):
            written.truncate_after(self.step)

        self.schedule = RefreshSchedule.from_config(config.refresh)
        for published in published_snapshots(self.snapshots):
            if published.step > self.step:  # of a future that was not reached again yet
                retire_snapshot(published.path, even_if_open=True)
        # Two copies: one is searched while the next arrives, be it from a refresh or at the end.
        self.residence = Residence(
            config.index.residence,
            self.device,
            copies=2,
            most_blocks=max(MAX_RETRIEVED_BLOCKS, *parse_cutoffs(config.evaluate.recall_at)),
        )
        task = RefreshTask(self.snapshots, self.store, config.index, config.refresh)
        self.refresher = self.residence.beside(
            make_refresher(task, work_dir=run.handover_dir), waits=config.refresh.mode == "inline"
        )
        self.snapshot = self._placed(self._first_snapshot(checkpoint))
        if checkpoint is None:
            self._note_snapshot()
        elif config.refresh.correct_queries and self.snapshot.path.name == checkpoint.state["snapshot"]:
            self.correction = QueryCorrection.load(checkpoint.module_folder("correction"))
        self.refresh_failures = 0
        self.tally = ShardTally(
            len(self.store),
            self.snapshot.manifest.shard_blocks,
            half_life_steps=config.refresh.priority_half_life_steps,
        )
        if checkpoint is not None:
            self.tally.restore(checkpoint.state["tally"])
        probed = held_out if held_out is not None else self.masker.with_split("train")
        self.drift_probe = DriftProbe(
            self.store,
            [probed.query(0, slot) for slot in range(config.refresh.drift_queries)],
            k=config.pretrain.blocks_a_query,
            sample_blocks=config.refresh.drift_sample_blocks,
            seed=step_seed(config.seed, 0),
            token_budget=config.refresh.token_budget,
        )
        if checkpoint is not None and config.refresh.mode in ("thread", "process", "follow"):
            self._hand_over("resume")  # for what was on its way when the run stopped
        run.save_config(config)
        self.probe = Probe(run, config, self.model, self.store, held_out, progress=progress)

    # --- the loop -----------------------------------------------------------------------------------------

    def train(self, *, measure: bool = True, on_step: Callable[[int], None] | None = None) -> None:
        settings, stop = self.config.pretrain, self.stop
        if measure:
            self.probe.measure("before", self.snapshot, only_if_missing=True)
        warmup = pretrain_warmup_steps(settings.warmup_steps, settings.steps)
        first = self.step
        self.model.train()
        with (
            training_stream(self.device),
            self.run.stage("pretrain") as details,
            bar(
                total=settings.steps, initial=first, desc="pretrain", unit="step", enabled=self.progress
            ) as shown,
        ):
            self.snapshot = self._placed(self.snapshot)  # this stream searches it from here on
            for step in range(first + 1, settings.steps + 1):
                begin = time.monotonic()
                waited_s = self._wait_while_too_stale(step)
                rates = set_learning_rates(
                    self.optimizer, step, warmup_steps=warmup, total_steps=settings.steps
                )
                torch.manual_seed(step_seed(self.config.seed, step))
                self.model.set_retriever_training(
                    settings.train_retriever and step > settings.freeze_retriever_steps
                )
                logged = step % settings.log_every_steps == 0 or step == settings.steps
                means = self._forward_backward(step, with_accuracy=logged)
                accuracy = means.pop("masked_accuracy")
                grad_norm = clip_gradients(self.optimizer, settings.clip_grad_norm, step)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step = step
                searched = self.snapshot
                handed_over_at_s, checked_s = time.monotonic(), self.checked_s
                if step < settings.steps:
                    self._refresh_if_due()
                self._swap_snapshot()

                end = time.monotonic()
                self.window.add(
                    **means,
                    grad_norm=grad_norm,
                    step_s=end - begin,
                    trainer_wait_s=waited_s,
                    handover_s=end - handed_over_at_s - (self.checked_s - checked_s),
                )
                shown.set_postfix(
                    loss=means["loss"],
                    stale=step - 1 - searched.step,
                    refresh_blocks_s=self.snapshot.manifest.blocks_per_s,
                )
                shown.update()
                if on_step is not None:
                    on_step(step)
                if logged:
                    self._log(rates, searched, accuracy)
                if step % settings.checkpoint_every_steps == 0 or step == settings.steps or stop:
                    self._save()
                if stop and step < settings.steps:
                    stop.raise_interrupted(
                        f"stopped after step {step} of {settings.steps}; --resume goes on from here"
                    )
            details |= {"steps": self.step - first, "queries": (self.step - first) * self.queries_per_step}
        if measure:
            self.probe.measure("after", self.snapshot)
        self.probe.illustrate(self.snapshot, self.step)

    def _forward_backward(self, step: int, *, with_accuracy: bool) -> dict[str, float]:
        """Accumulates the gradient of the mean loss over the step's queries; returns what it showed.

        The best word of every marginal (with_accuracy) costs a third of the loss again. What was shown is
        read after all of the step was queued, so that a GPU need not wait for the host in between.
        """
        settings = self.config.pretrain
        batches = self._take_batches(step)
        weights = [self._weight(queries) for queries in batches]
        shown: list[tuple[float, dict[str, HostCopy]]] = []
        ict_loss = 0.0
        for queries, weight in zip(batches, weights, strict=True):
            share = weight / max(sum(weights), 1)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                output, candidates = realm_step(
                    self.model,
                    self.snapshot.index,
                    self.store,
                    queries,
                    num_candidates=settings.num_candidates,
                    exclude_trivial=settings.exclude_trivial,
                    use_null_block=settings.use_null_block,
                    with_accuracy=with_accuracy,
                    correction=self.correction,
                )
            self.tally.add(step, candidates.block_ids.cpu().numpy(), candidates.runner_up_ids.cpu().numpy())
            loss = output.loss * share
            if output.retriever_loss is not None:  # a mean over queries, of which every batch has as many
                loss = loss + output.retriever_loss / len(batches)
            loss.backward()
            values = {"loss": output.loss, **{name: getattr(output.stats, name) for name in SHOWN}}
            shown.append((share, {name: HostCopy(v) for name, v in values.items() if v is not None}))
        if self.ict is not None and self.model.train_retriever:
            ict_loss = self._ict_backward(self.ict, step)
        if step < settings.steps:
            self.ahead = (step + 1, *self._draw_batches(step + 1))  # while the device is at this step
        means = dict.fromkeys(("loss", *SHOWN), 0.0) | {"ict_loss": ict_loss}
        for share, copies in shown:
            check_loss(copies["loss"].wait(), step, self.optimizer)
            for name, copy in copies.items():
                means[name] += float(copy.wait()) * share
        return means

    def _ict_backward(self, sampler: IctSampler, step: int) -> float:
        """Adds the gradient of pretrain.ict_weight times the inverse cloze loss; returns that loss.

        The draws go on where those of the `ict` stage ended. A batch needs all its embeddings at once, so its
        gradients are cached; the marginal likelihood is a sum over queries, where accumulation does.
        """
        settings, ict = self.config.pretrain, self.config.ict
        examples = sampler.batch(ict.steps + step, settings.ict_queries)

        def loss_of(query_emb: torch.Tensor, block_emb: torch.Tensor) -> torch.Tensor:
            loss = in_batch_contrastive_loss(query_emb, block_emb, temperature=ict.score_temperature)
            return settings.ict_weight * loss

        loss = cached_backward(
            ict_rows(self.store, self.model.embedder, examples, precision=settings.precision),
            loss_of,
            token_budget=ict.token_budget,
            seed=step_seed(self.config.seed, step),
        )
        return check_loss(loss, step, self.optimizer) / settings.ict_weight

    def _take_batches(self, step: int) -> list[list[MaskedQuery]]:
        """The micro-batches of a step. Repeated draws are counted now, not when they were made."""
        number, batches, skipped = self.ahead or (0, [], Counter())
        if number != step:
            batches, skipped = self._draw_batches(step)
        self.ahead = None
        self.masker.skipped.update(skipped)
        return batches

    def _draw_batches(self, step: int) -> tuple[list[list[MaskedQuery]], Counter[str]]:
        """Micro-batches, and the draws that were skipped on the way."""
        size = self.config.pretrain.batch_queries
        counted, self.masker.skipped = self.masker.skipped, Counter()
        batches = [
            [self.masker.query(step, slot) for slot in range(start, start + size)]
            for start in range(0, self.queries_per_step, size)
        ]
        skipped, self.masker.skipped = self.masker.skipped, counted
        return batches, skipped

    def _weight(self, queries: list[MaskedQuery]) -> int:
        """What the loss is a mean over: masked positions, or queries at sequence level."""
        if self.config.pretrain.level == "sequence":
            return len(queries)
        return sum(len(query.labels) for query in queries)

    @property
    def queries_per_step(self) -> int:
        return self.config.pretrain.batch_queries * self.config.pretrain.accumulate_batches

    # --- parts --------------------------------------------------------------------------------------------

    def _load_model(self, checkpoint: Checkpoint | None) -> RealmModel:
        settings = self.config.pretrain
        if checkpoint is None:
            start = starting_models(self.run, self.config, self.store)
            embedder, reader = start.embedder, start.reader
            log.info("embedder: %s; reader: %s", start.embedder_from, start.reader_from)
            for note in (*embedder.notes, *reader.notes):
                log.info("%s", note)
        else:
            embedder = Embedder.load(checkpoint.module_folder("embedder"))
            reader = Reader.load(checkpoint.module_folder("reader"))
        return RealmModel(
            embedder,
            reader,
            level=settings.level,
            temperature=settings.score_temperature,
            null_score_offset=settings.null_score_offset,
            train_retriever=settings.train_retriever,
            objective=settings.objective,
            distill_temperature=settings.distill_temperature,
        )

    def _ict_sampler(self) -> IctSampler | None:
        """Where the sentences of the inverse cloze term come from; None where it is off."""
        settings, ict = self.config.pretrain, self.config.ict
        if settings.objective == "ict":
            if not settings.train_retriever:
                raise ConfigError("pretrain.train_retriever: expected true with pretrain.objective=ict")
            if not settings.ict_weight:
                raise ConfigError(
                    "pretrain.ict_weight: expected more than 0 with pretrain.objective=ict, got 0"
                )
        if not (settings.ict_weight and settings.train_retriever):
            return None
        sampler = IctSampler(
            self.store,
            self.config.seed,
            split="train",
            max_query_tokens=ict.max_query_tokens,
            keep_sentence_probability=ict.keep_sentence_probability,
        )
        if settings.ict_queries > len(sampler):
            raise ConfigError(
                f"pretrain.ict_queries: expected at most {len(sampler)}, as so many training blocks have two "
                f"sentences and are no copies of each other, got {settings.ict_queries}"
            )
        return sampler

    def _first_snapshot(self, checkpoint: Checkpoint | None) -> IndexSnapshot:
        """The snapshot the checkpoint was trained with; for a new run, one of the starting weights."""
        if checkpoint is not None:
            try:
                return open_snapshot(trained_snapshot(self.snapshots, checkpoint.state), verify=True)
            except (DataError, CorruptArtifactError) as error:
                log.warning(
                    "%s The index is embedded again with the checkpoint's weights; the losses will differ "
                    "from those of an uninterrupted run.",
                    error,
                )
        with self.run.stage("index") as details:
            snapshot = self._make_index()
            details |= {
                "blocks": snapshot.manifest.num_blocks,
                "blocks_per_s": snapshot.manifest.blocks_per_s,
            }
        return snapshot

    def _make_index(self) -> IndexSnapshot:
        """The index of the present weights; waits for it, unless somebody asks this process to stop."""
        try:
            return self.refresher.make_now(
                self.step,
                self.model.embedder,
                should_stop=lambda: bool(self.stop),
                progress=self.progress,
            )
        except EmbeddingStopped:
            self.stop.raise_interrupted(
                f"stopped while the index of step {self.step} was being made; "
                "--resume goes on from the newest checkpoint, if there is one"
            )
            raise

    def _placed(self, snapshot: IndexSnapshot) -> IndexSnapshot:
        """`snapshot`, with its index where this run searches."""
        return replace(snapshot, index=self.residence.place(snapshot.index))

    def _refresh_if_due(self) -> None:
        """Measures drift where that is due, and hands the weights over where the schedule says so."""
        overlap = None
        if self.schedule.is_check_due(self.step):
            overlap = self._measure_drift().overlap
        reason = self.schedule.due(
            self.step,
            handed_over_step=self.handed_over_step,
            oldest_shard_step=self.snapshot.oldest_step,
            overlap=overlap,
        )
        if reason is not None:
            self._hand_over(reason)

    def _measure_drift(self) -> Drift:
        self.drift, fitted = self.drift_probe.measure(self.model, self.snapshot.index, self.correction)
        self.checked_s += self.drift.seconds
        if self.config.refresh.correct_queries:
            self.correction = fitted
        return self.drift

    def _hand_over(self, reason: Reason) -> None:
        order = None
        if self.config.refresh.order == "priority":
            order = self.tally.order([shard.step for shard in self.snapshot.manifest.shards])
        self.refresher.submit(self.step, self.model.embedder, shard_order=order)
        self.handed_over_step = self.step
        self.refreshes.write({"step": self.step, "event": "handed over", "reason": reason})

    def _swap_snapshot(self) -> None:
        """Takes the newest finished snapshot, if there is one: an assignment, nothing is copied."""
        newest = self.refresher.poll()
        if newest is not None:
            self.snapshot = newest
            self._prune()
            self._note_snapshot()
            if self.config.refresh.correct_queries:
                self.correction = None  # it was the old index's
                self._measure_drift()
        for failure in self.refresher.failures:
            log.warning("%s; training goes on with the index of step %d", failure, self.snapshot.step)
        self.refresh_failures += len(self.refresher.failures)
        self.refresher.failures.clear()

    def _note_snapshot(self) -> None:
        manifest = self.snapshot.manifest
        self.refreshes.write(
            {
                "step": self.step,
                "event": "in use",
                "snapshot_step": self.snapshot.step,
                "oldest_shard_step": self.snapshot.oldest_step,
                "fresh_shards": manifest.fresh_shards,
                "shards": len(manifest.shards),
                "blocks_per_s": manifest.blocks_per_s,
            }
        )

    def _wait_while_too_stale(self, step: int) -> float:
        """Waits only if max_staleness_steps is set, would be exceeded, and a fresher index is on its way."""
        limit = self.config.refresh.max_staleness_steps
        if not limit:
            return 0.0
        begin = time.monotonic()
        while step - 1 - self.snapshot.oldest_step > limit and self.refresher.is_busy() and not self.stop:
            time.sleep(WAIT_POLL_S)
            self._swap_snapshot()
        return time.monotonic() - begin

    def _save(self) -> None:
        if self.step == self.config.pretrain.steps:  # what comes next searches an index of the final weights
            if self.config.refresh.mode != "follow":
                self.refresher.close()  # whatever it is at would be older
            self.snapshot = self._placed(self._make_index())
        modules: dict[str, SavesItself] = {"embedder": self.model.embedder, "reader": self.model.reader}
        if self.config.refresh.correct_queries:
            modules["correction"] = self.correction or QueryCorrection.none(self.model.embedder.dim)
        save_checkpoint(
            self.checkpoints,
            self.step,
            modules=modules,
            optimizer=self.optimizer,
            state={
                "snapshot": self.snapshot.path.name,
                "window": asdict(self.window),
                "handed_over_step": self.handed_over_step,
                "drift": None if self.drift is None else asdict(self.drift),
                "tally": self.tally.state(),
                "skipped": dict(self.masker.skipped),
            },
            identity=self.identity,
            keep=self.config.pretrain.keep_checkpoints,
        )
        self._prune()
        self.metrics.flush()
        self.refreshes.flush()

    def _prune(self) -> None:
        needed = {
            read_checkpoint(self.checkpoints / checkpoint_name(step)).state["snapshot"]
            for step in checkpoint_steps(self.checkpoints)
        }
        prune_snapshots(self.snapshots, keep=self.config.refresh.keep_snapshots, pinned=needed)

    def _log(self, rates: dict[str, float], searched: IndexSnapshot, masked_accuracy: float) -> None:
        means = self.window.means()
        drift = {} if self.drift is None else {
            "probe_overlap": self.drift.overlap,
            "score_drift": self.drift.score_drift,
            "drift_check_s": self.drift.seconds,
        }  # fmt: skip
        self.metrics.write(
            {
                "step": self.step,
                **means,
                "masked_accuracy": masked_accuracy,  # of this step alone
                "staleness_steps": self.step - 1 - searched.step,
                "oldest_staleness_steps": self.step - 1 - searched.oldest_step,
                "snapshot_step": self.snapshot.step,
                **drift,
                "reader_lr": rates.get("reader", 0.0),
                "embedder_lr": rates.get("embedder", 0.0),
                "queries_per_s": self.queries_per_step / means["step_s"],
                "refresh_blocks_per_s": self.snapshot.manifest.blocks_per_s,
                "refresh_failures": self.refresh_failures,
                "skipped": dict(self.masker.skipped),
            }
        )
        self.window, self.drift = Window(), None

    def close(self) -> None:
        self.refresher.close(is_done=self.step == self.config.pretrain.steps)
        self.metrics.close()
        self.refreshes.close()
