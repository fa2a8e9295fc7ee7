"""Question-answering fine-tuning: the question side of the embedder and a span reader, over a frozen index.

For a question x, its beam of K blocks z and, of these, the best R that are read:

    S(x, z)  = E_q(x) . d_z                        d_z: the index's block embeddings, frozen
    loss     = 1[any block of the beam holds an answer] mml(S(x, z) of the beam; of those that hold one)
             + 1[any block read holds an answer span]   mml(span score + S(x, z) of all spans; of the answers)
    mml(all; correct) = logsumexp(all) - logsumexp(correct)

averaged over the batch. A shared embedder is split here: the question side learns, the block side stays as
the index was made. Source: ORQA (Lee et al. 2019), sections 3 and 4, and its released code.

Where there are dev questions, the model answers them every so many steps. The checkpoint that did best is
kept, and is the one that answers later on; finetune.patience evaluations without gain end the training.

The loop continues bit for bit after a kill: what is random in step s (question order, dropout) is a function
of (seed, s), and the rest is in the checkpoint.
"""

import copy
import dataclasses
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realm_fast import optim
from realm_fast.checkpoint import (
    Checkpoint,
    checkpoint_name,
    clean_checkpoints,
    identity_of,
    newest_checkpoint,
    save_checkpoint,
)
from realm_fast.config import Config
from realm_fast.device import resolve_device, to_device
from realm_fast.early_stopping import EarlyStopping, Score, split_dev
from realm_fast.embedder import Embedder
from realm_fast.errors import CorruptArtifactError, DataError, UserError
from realm_fast.evaluate import predict, summarise
from realm_fast.files import read_json, write_json
from realm_fast.index import Index, Provenance
from realm_fast.metrics import MetricsLog
from realm_fast.objective import orqa_mml_loss
from realm_fast.packing import query_input
from realm_fast.progress import bar
from realm_fast.qa_model import QaModel, StartingPoint, index_of, starting_point
from realm_fast.questions import Bm25Index, Question, load_questions
from realm_fast.reader import SpanReader
from realm_fast.reading import (
    AnswerTable,
    ReadSettings,
    batches,
    bm25_beam,
    embed_questions,
    gold_spans,
    question_tokens,
    questions_hash,
    read_blocks,
    retrieve,
)
from realm_fast.residence import Residence
from realm_fast.run_folder import RunFolder
from realm_fast.signals import stop_on_signal
from realm_fast.snapshot import open_snapshot
from realm_fast.token_store import TokenStore

log = logging.getLogger(__name__)
SELECTION_FILE = "trainable.json"
DEV_FILE = "dev.json"


@dataclass(frozen=True)
class FinetuneResult:
    """What one call of `finetune` ended with."""

    step: int
    loss: float | None  # of the last step, None if no step was left to do
    checkpoint: Path  # that answers from now on: of the best step
    best_step: int  # on the dev questions; the last one where there are none
    questions: dict[str, int]  # how many were given, trainable, and set aside by reason


@dataclass(frozen=True)
class StepLoss:
    """The loss of one batch, with what metrics.jsonl wants to know about it."""

    loss: torch.Tensor
    retriever: torch.Tensor
    reader: torch.Tensor
    with_answer_retrieved: float  # share of the batch
    with_answer_read: float


@dataclass(frozen=True)
class Selection:
    """Which questions are trained on, or which dev questions looked at, and what became of the others."""

    trainable: list[int]  # positions in the list of questions
    counts: dict[str, int]

    def write(self, file: Path, identity: dict[str, Any]) -> None:
        write_json(file, {"identity": identity, "counts": self.counts, "trainable": self.trainable})


NOTHING = Selection([], {})


def finetune(
    run: RunFolder,
    config: Config,
    *,
    questions: Sequence[Question] | None = None,
    resume: bool = False,
    progress: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> FinetuneResult:
    """Fine-tunes from the run's newest pre-training checkpoint, or from the warm start where there is none.

    Args:
        run: read for the checkpoint and its index; written to in RUN/finetune.
        config: the sections finetune, index and refresh (for embedding) matter.
        questions: instead of those that `config.finetune.questions` names.
        resume: go on from the newest fine-tuning checkpoint.
        progress: show a bar.
        on_step: called with the number of every step that was made.

    Raises:
        UserError: nothing to train on or no dev question is left, or the folder holds checkpoints and
            `resume` is False.
        ConfigError: settings contradict each other, or on resume one differs from the checkpoint's; the
            message has both.
        TrainingDivergedError: the loss or the gradient became NaN; the step and the parameter are named.
        Interrupted: SIGINT or SIGTERM came; the step at hand was finished and saved.
    """
    with run.lock("fine-tuning"):
        folder = run.finetune_dir / "checkpoints"
        clean_checkpoints(folder)
        clean_checkpoints(run.finetune_dir / "snapshots")
        checkpoint = newest_checkpoint(folder)
        if checkpoint is not None and not resume:
            raise UserError(
                f"{folder}: holds a checkpoint of step {checkpoint.step}. Give --resume to go on from there, "
                f"or delete {run.finetune_dir} to fine-tune anew."
            )
        if checkpoint is None and resume:
            log.info("%s: no checkpoint yet, so fine-tuning starts from the beginning", run.finetune_dir)
        if questions is None:
            questions = load_questions(config.finetune.questions, limit=config.finetune.limit_questions)
        split = split_dev(questions, config)
        job = functools.partial(
            Trainer.open, run, config, split.train, checkpoint, dev=split.dev, progress=progress
        )
        if checkpoint is not None and _is_finished(checkpoint, config):
            trainer = job()  # for its checks; nothing is left to do, so there is no stage to record
            log.info("%s: all %d steps are done", run.finetune_dir, trainer.step)
            return trainer.result(None)
        with run.stage("finetune") as details:
            trainer = job()
            run.save_config(config)
            first = trainer.step
            result = trainer.train(progress=progress, on_step=on_step)
            details |= {
                "started_from": trainer.started_from,
                "steps": trainer.step - first,
                "questions": trainer.selection.counts,
                "notes": getattr(questions, "notes", []),
            }
            if split.dev:
                details |= {
                    "best_step": result.best_step,
                    "dev_questions": trainer.dev_selection.counts,
                    "left_out_as_dev": split.left_out,
                }
            return result


class Trainer:
    """One fine-tuning job: models, index, questions and the step they have reached."""

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        store: TokenStore,
        embedder: Embedder,
        span_reader: SpanReader,
        questions: list[Question],
        selection: Selection,
        *,
        dev: list[Question],
        dev_selection: Selection,
        index: Index,
        snapshot: str,
        started_from: str,
        identity: dict[str, Any],
        bm25: Bm25Index | None = None,
    ) -> None:
        self.run, self.config, self.store = run, config, store
        self.device = resolve_device(config.device)
        self.embedder, self.span_reader = embedder.to(self.device), span_reader.to(self.device)
        self.index, self.snapshot, self.started_from = index, snapshot, started_from
        self.selection, self.identity = selection, identity
        self.dev = [dev[i] for i in dev_selection.trainable]
        self.dev_selection = dev_selection
        self.watch = EarlyStopping(config.finetune.patience)
        self.settings = ReadSettings.of(config)
        self.bm25 = bm25
        self.texts = [question.text for question in questions]
        self.answers = AnswerTable(questions, store)
        self.tokens, _ = question_tokens(store.tokenizer(), questions, self.settings.max_question_tokens)
        self.block_encoder_hash = embedder.hash()
        self.step = 0
        self.window: dict[str, float] = {}  # sums since the last line of metrics.jsonl
        embedder.block_side.requires_grad_(False)
        tuning = config.finetune
        self.warmup_steps = optim.finetune_warmup_steps(tuning.warmup_steps, tuning.steps)
        self.optimizer = optim.build_optimizer(
            {"reader": (span_reader, tuning.reader_lr), "embedder": (embedder, tuning.embedder_lr)},
            weight_decay=tuning.weight_decay,
        )

    @classmethod
    def open(
        cls,
        run: RunFolder,
        config: Config,
        questions: list[Question],
        checkpoint: Checkpoint | None,
        *,
        dev: Sequence[Question] = (),
        progress: bool = False,
    ) -> "Trainer":
        """Takes up `checkpoint`, or starts anew if it is None."""
        store = run.store()
        identity = identity_of(
            config,
            ["finetune"],
            max_question_tokens=ReadSettings.of(config).max_question_tokens,
            score_temperature=config.pretrain.score_temperature,
            corpus_hash=store.corpus_hash,
            questions_hash=questions_hash(questions),
            dev_questions_hash=questions_hash(dev),
        )
        if checkpoint is not None:
            checkpoint.check_identity(identity)
            embedder = Embedder.load(checkpoint.module_folder("embedder"))
            span_reader = SpanReader.load(checkpoint.module_folder("span_reader"))
            snapshot, started_from = checkpoint.state["snapshot"], checkpoint.state["started_from"]
        else:
            start = starting_point(run, config, store)
            log.info(_describe_start(start))
            embedder = split_question_side(start.embedder)
            torch.manual_seed(optim.step_seed(config.seed, 0))  # the span head is fresh
            span_reader = SpanReader.from_reader(
                start.reader,
                span_hidden=config.finetune.span_hidden,
                max_span_tokens=config.finetune.max_span_tokens,
                max_reader_tokens=config.finetune.max_reader_tokens,
            )
            out = run.finetune_dir / "snapshots"
            path = index_of(
                run,
                embedder.to(resolve_device(config.device)),
                store,
                config,
                out=out,
                step=start.step,
                adopt=True,
                progress=progress,
            )
            snapshot, started_from = path.relative_to(run.path).as_posix(), start.name
        expect = Provenance(embedder.hash(), store.corpus_hash, step=0)
        device = resolve_device(config.device)
        beam = max(config.finetune.retriever_beam, config.finetune.reader_beam)
        residence = Residence(config.index.residence, device, copies=1, most_blocks=beam)
        index = residence.place(open_snapshot(run.path / snapshot, expect=expect).index)
        if config.finetune.retriever_beam > len(index):
            log.info("the corpus has %d blocks: every beam is all of them", len(index))
        bm25 = Bm25Index(store, progress=progress) if config.finetune.retriever == "bm25" else None
        if checkpoint is not None:
            selection = read_selection(run.finetune_dir / SELECTION_FILE, identity)
            dev_selection = read_selection(run.finetune_dir / DEV_FILE, identity) if dev else NOTHING
        else:
            select = functools.partial(
                select_questions,
                embedder.to(device),
                index,
                store,
                beam=config.finetune.retriever_beam,
                max_question_tokens=ReadSettings.of(config).max_question_tokens,
                bm25=bm25,
                progress=progress,
            )
            selection, dev_selection = select(questions), select(dev) if dev else NOTHING
            _check_selection(selection, config, config.finetune.questions, "trained on")
            selection.write(run.finetune_dir / SELECTION_FILE, identity)
            if dev:
                named = config.finetune.dev_questions or f"a share of {config.finetune.questions}"
                _check_selection(dev_selection, config, f"dev, {named}", "evaluated on")
                dev_selection.write(run.finetune_dir / DEV_FILE, identity)
        trainer = cls(
            run, config, store, embedder, span_reader, questions, selection,
            dev=list(dev), dev_selection=dev_selection, index=index, snapshot=snapshot,
            started_from=started_from, identity=identity, bm25=bm25,
        )  # fmt: skip
        if checkpoint is not None:
            checkpoint.load_optimizer(trainer.optimizer)
            trainer.step = checkpoint.step
            trainer.window = dict(checkpoint.state["window"])
            trainer.watch = EarlyStopping.restore(checkpoint.state["early_stopping"])
        return trainer

    @property
    def finished(self) -> bool:
        """Whether the last step was made, or the one that early stopping makes the last."""
        return self.step >= self.config.finetune.steps or self.watch.stop

    def train(self, *, progress: bool, on_step: Callable[[int], None] | None = None) -> FinetuneResult:
        """The loop, from the step reached to the last; metrics, evaluations, checkpoints, stop requests."""
        tuning = self.config.finetune
        loss: float | None = None
        folder = self.run.finetune_dir
        metrics = MetricsLog(folder / "metrics.jsonl", folder / "tensorboard")
        evaluations = MetricsLog(folder / "evaluations.jsonl", folder / "tensorboard" / "dev")
        order = question_order(
            len(self.selection.trainable), tuning.batch_questions, self.config.seed, self.step
        )
        shown = bar(total=tuning.steps, desc="fine-tune", unit="step", initial=self.step, enabled=progress)
        with metrics, evaluations, shown, stop_on_signal() as stop:
            metrics.truncate_after(self.step)
            evaluations.truncate_after(self.step)
            while not self.finished:
                begin = time.perf_counter()
                self.step += 1
                loss, rates, grad_norm = self._update(next(order))
                seconds = time.perf_counter() - begin
                self._add(step_s=seconds)
                shown.update()
                shown.set_postfix(loss=loss, questions_per_s=tuning.batch_questions / seconds)
                if on_step is not None:
                    on_step(self.step)
                gained = False
                if self.dev and (self.step % tuning.evaluate_every_steps == 0 or self.step == tuning.steps):
                    gained = self._evaluate(evaluations)
                if self.step % tuning.log_every_steps == 0 or self.finished:
                    metrics.write(self._record(rates, grad_norm))
                    self.window.clear()
                if self.step % tuning.checkpoint_every_steps == 0 or gained or self.finished or stop:
                    metrics.flush()
                    evaluations.flush()
                    self.save()
                if stop and not self.finished:
                    stop.raise_interrupted(
                        f"fine-tuning stopped after step {self.step} of {tuning.steps} and is saved; "
                        f"`realm-fast finetune {self.run.path} --resume` goes on from there."
                    )
        if self.watch.stop:
            log.info(
                "no gain in %d evaluations: stopped after step %d of %d; step %s was the best",
                self.watch.without_gain, self.step, tuning.steps, self.watch.best_step,
            )  # fmt: skip
        return self.result(loss)

    def _evaluate(self, evaluations: MetricsLog) -> bool:
        """Answers the dev questions and notes how well; True where it is the best so far."""
        begin = time.perf_counter()
        model = QaModel(
            "dev", "finetune", self.embedder.eval(), self.span_reader.eval(), self.index, self.store,
            self.settings, bm25=self.bm25,
        )  # fmt: skip
        reads = self.settings.reader_beam
        row, _ = summarise(
            "dev", predict(model, self.dev, reader_beam=reads, depth=reads), sorted({1, reads})
        )
        score = Score(row["exact_match"], row["f1"], row["recall"][str(reads)])
        gained = self.watch.note(self.step, score)
        kept = ("questions", "exact_match", "f1", "recall", "retrieval_utility")
        evaluations.write(
            {
                "step": self.step,
                **{name: row[name] for name in kept},
                "best": gained,
                "evaluation_s": time.perf_counter() - begin,
            }
        )
        log.info(
            "step %d, dev: EM %.2f, F1 %.2f, R@%d %.2f%s",
            self.step, score.exact_match, score.f1, reads, score.recall,
            ", the best so far" if gained else f" (best: step {self.watch.best_step})",
        )  # fmt: skip
        return gained

    def result(self, loss: float | None) -> FinetuneResult:
        """What `finetune` returns, at the step reached."""
        best_step = self.step if self.watch.best_step is None else self.watch.best_step
        path = self.run.finetune_dir / "checkpoints" / checkpoint_name(best_step)
        return FinetuneResult(self.step, loss, path, best_step, self.selection.counts)

    def _update(self, batch: Sequence[int]) -> tuple[float, dict[str, float], float]:
        tuning = self.config.finetune
        torch.manual_seed(optim.step_seed(self.config.seed, self.step))  # dropout
        self.embedder.train()
        self.span_reader.train()
        rates = optim.set_learning_rates(
            self.optimizer, self.step, warmup_steps=self.warmup_steps, total_steps=tuning.steps
        )
        parts = self.loss([self.selection.trainable[i] for i in batch])
        loss = optim.check_loss(parts.loss, self.step, self.optimizer)
        parts.loss.backward()
        grad_norm = optim.clip_gradients(self.optimizer, tuning.clip_grad_norm, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._add(
            steps=1,
            loss=loss,
            retriever_loss=float(parts.retriever.detach()),
            reader_loss=float(parts.reader.detach()),
            with_answer_retrieved=parts.with_answer_retrieved,
            with_answer_read=parts.with_answer_read,
        )
        return loss, rates, grad_norm

    def loss(self, questions: Sequence[int]) -> StepLoss:
        """The loss of a batch, with its graph. `questions` are positions in the list of questions."""
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.finetune.precision == "bfloat16"
        )
        tokens = [self.tokens[i] for i in questions]
        with autocast:
            rows = [query_input(t, self.embedder.special) for t in tokens]
            query_emb = self.embedder.query_emb(self.embedder.pad(rows))  # [B, D]
        k = max(self.config.finetune.retriever_beam, self.settings.reader_beam)
        if self.bm25 is not None:
            beam = bm25_beam(self.bm25, [self.texts[i] for i in questions], k)
            beam = beam._replace(scores=to_device(beam.scores, self.device))
        else:
            beam = retrieve(self.index, query_emb, k, temperature=self.settings.score_temperature)
        holds = np.stack([self.answers.holds(q, ids) for q, ids in zip(questions, beam.ids, strict=True)])
        retriever = mean_mml(beam.scores, torch.from_numpy(holds).to(self.device))
        reads = self.settings.reader_beam
        with autocast:
            read = read_blocks(self.span_reader, tokens, beam.ids[:, :reads], self.store)
        gold = gold_spans(read, questions, self.answers)  # [B, R, T, W]
        scores = read.scores + beam.scores[:, :reads, None, None]
        reader = mean_mml(scores.flatten(1), gold.flatten(1))
        return StepLoss(
            loss=retriever + reader,
            retriever=retriever,
            reader=reader,
            with_answer_retrieved=float(holds.any(axis=1).mean()),
            with_answer_read=float(gold.flatten(1).any(dim=1).float().mean()),
        )

    def save(self) -> Path:
        """Writes the checkpoint of the step reached; that of the best step stays."""
        return save_checkpoint(
            self.run.finetune_dir / "checkpoints",
            self.step,
            modules={"embedder": self.embedder, "span_reader": self.span_reader},
            optimizer=self.optimizer,
            state={
                "started_from": self.started_from,
                "snapshot": self.snapshot,
                "block_encoder_hash": self.block_encoder_hash,
                "corpus_hash": self.store.corpus_hash,
                "read_settings": dataclasses.asdict(self.settings),
                "questions": self.selection.counts,
                "window": dict(self.window),
                "early_stopping": self.watch.state(),
                "config": self.config.to_dict(),
            },
            identity=self.identity,
            keep=self.config.finetune.keep_checkpoints,
            protect=[] if self.watch.best_step is None else [self.watch.best_step],
        )

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self.window[name] = self.window.get(name, 0) + value

    def _record(self, rates: dict[str, float], grad_norm: float) -> dict[str, Any]:
        """A line of metrics.jsonl: means since the last one; rates and gradient norm of this step."""
        steps = self.window["steps"]
        seconds = self.window["step_s"]
        means = ("loss", "retriever_loss", "reader_loss", "with_answer_retrieved", "with_answer_read")
        return {
            "step": self.step,
            **{name: self.window[name] / steps for name in means},
            **{f"{module}_lr": rate for module, rate in rates.items()},
            "grad_norm": grad_norm,
            "questions_per_s": steps * self.config.finetune.batch_questions / max(seconds, 1e-9),
            "step_s": seconds / steps,
        }


def mean_mml(scores: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Mean over all B questions of 1[any correct] (logsumexp(scores) - logsumexp(correct scores)).

    Every question weighs the same whatever else is in its batch, as with the published batch of one.

    Args:
        scores: [B, J] float32, -inf where there is no alternative.
        correct: [B, J] bool.
    """
    counted = (correct & ~torch.isneginf(scores)).any(dim=1).sum()  # orqa_mml_loss averages over these
    return orqa_mml_loss(scores, correct) * (counted / len(scores))


def split_question_side(embedder: Embedder) -> Embedder:
    """An embedder whose question side can learn while its block side stays: its copy, if they were one."""
    if not embedder.settings.shared:
        return embedder
    return Embedder(
        dataclasses.replace(embedder.settings, shared=False),
        embedder.block_side,
        copy.deepcopy(embedder.block_side),
        embedder.special,
        embedder.tokenizer_hash,
    )


def select_questions(
    embedder: Embedder,
    index: Index,
    store: TokenStore,
    questions: Sequence[Question],
    *,
    beam: int,
    max_question_tokens: int,
    bm25: Bm25Index | None = None,
    progress: bool = False,
) -> Selection:
    """Sorts out what cannot be trained on: no text, no answer, or no block of the beam holds one.

    The beam is that of `embedder` as it is now, or BM25's. Training on a question whose beam holds no answer
    would give no gradient until the retriever has come to find one.
    """
    counts = Counter(given=len(questions), no_text=0, no_answer=0, no_answer_in_beam=0, cut_to_length=0)
    tokens, _ = question_tokens(store.tokenizer(), questions, max_question_tokens + 1)
    usable = []
    for i, question in enumerate(questions):
        if not len(tokens[i]):
            counts["no_text"] += 1
        elif not any(answer.strip() for answer in question.answers):
            counts["no_answer"] += 1
        else:
            counts["cut_to_length"] += len(tokens[i]) > max_question_tokens
            usable.append(i)
    answers = AnswerTable(questions, store)
    short = [tokens[i][:max_question_tokens] for i in usable]
    emb = embed_questions(embedder, short, progress=progress)  # [n, D]
    trainable: list[int] = []
    with bar(total=len(usable), desc="match answers", unit="question", enabled=progress) as shown:
        for rows in batches(len(usable), 256):
            if bm25 is not None:
                ids = bm25_beam(bm25, [questions[usable[row]].text for row in rows], beam).ids
            else:
                ids = retrieve(index, emb[rows.start : rows.stop], beam).ids
            for row, block_ids in zip(rows, ids, strict=True):
                if answers.holds(usable[row], block_ids).any():
                    trainable.append(usable[row])
            shown.update(len(rows))
    counts["no_answer_in_beam"] = len(usable) - len(trainable)
    counts["trainable"] = len(trainable)
    return Selection(trainable, dict(counts))


def read_selection(file: Path, identity: dict[str, Any]) -> Selection:
    """The choice made when this job began; it cannot be made again, since the embedder has moved on.

    Raises:
        DataError, CorruptArtifactError: it is missing, or of another job.
    """
    record = read_json(file, "the choice of trainable questions")
    if not isinstance(record, dict) or record.get("identity") != identity:
        raise CorruptArtifactError(
            f"{file}: is not of the job that the checkpoints are of. Delete {file.parent} to fine-tune anew."
        )
    return Selection(record["trainable"], record["counts"])


def describe_counts(counts: dict[str, int], what: str = "trainable") -> str:
    """`Selection.counts` in a sentence; `what` the chosen ones are."""
    parts = [
        f"{counts[name]:,} {text}"
        for name, text in (
            ("no_answer_in_beam", "without an answer in their beam"),
            ("no_answer", "without answers"),
            ("no_text", "without text"),
        )
        if counts.get(name)
    ]
    aside = f"; set aside: {', '.join(parts)}" if parts else ""
    cut = f"; {counts['cut_to_length']:,} cut to length" if counts.get("cut_to_length") else ""
    return f"{counts['trainable']:,} of {counts['given']:,} questions are {what}{aside}{cut}"


def question_order(count: int, batch: int, seed: int, steps_done: int) -> Iterator[list[int]]:
    """Batches of question numbers, from step `steps_done` + 1 on: every epoch a permutation of its own.

    A batch may reach over the end of an epoch. The same (count, batch, seed) gives the same batches wherever
    one starts.
    """
    position = steps_done * batch
    epoch, permutation = -1, np.empty(0, dtype=np.int64)
    while True:
        chosen = []
        for place in range(position, position + batch):
            if place // count != epoch:
                epoch = place // count
                permutation = np.random.default_rng([seed, epoch]).permutation(count)
            chosen.append(int(permutation[place % count]))
        position += batch
        yield chosen


def _is_finished(checkpoint: Checkpoint, config: Config) -> bool:
    watch = EarlyStopping.restore(checkpoint.state["early_stopping"])
    return checkpoint.step >= config.finetune.steps or watch.stop


def _check_selection(selection: Selection, config: Config, named: str, purpose: str) -> None:
    """Says what was chosen of the questions. Raises DataError where that is none."""
    what = "trainable" if purpose == "trained on" else "to evaluate on"
    log.info(describe_counts(selection.counts, what))
    if not selection.trainable:
        raise DataError(
            f"{named}: no question can be {purpose} ({describe_counts(selection.counts, what)}). Give "
            f"questions that this corpus answers, or a larger finetune.retriever_beam (it is "
            f"{config.finetune.retriever_beam})."
        )


def _describe_start(start: StartingPoint) -> str:
    if start.name == "warm start":
        return "no pre-training checkpoint in this run: fine-tuning starts from the configured trunks"
    return f"fine-tuning starts from {start.name}"
