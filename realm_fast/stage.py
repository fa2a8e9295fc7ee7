"""The loop that the stages before pre-training share: steps, rates, metrics, checkpoints, stop requests.

    class Ict(StageTrainer): ...     # names its modules, draws a batch, says how it is measured
    run_stage(Ict, run, config, resume=True, progress=True)

A stage writes RUN/NAME/{metrics.jsonl,evaluations.jsonl,tensorboard/,checkpoints/step-…/MODULE}. Every random
choice is a function of (seed, step), so that a stage that was killed and resumed takes the same steps.
"""

import abc
import logging
import time
from pathlib import Path
from typing import Any, ClassVar

import torch

from realm_fast.checkpoint import (
    Checkpoint,
    clean_checkpoints,
    identity_of,
    newest_checkpoint,
    save_checkpoint,
)
from realm_fast.config import Config
from realm_fast.device import resolve_device
from realm_fast.embedder import Embedder
from realm_fast.errors import UserError
from realm_fast.metrics import MetricsLog, write_evaluations
from realm_fast.optim import (
    build_optimizer,
    clip_gradients,
    finetune_warmup_steps,
    set_learning_rates,
    step_seed,
)
from realm_fast.progress import bar
from realm_fast.reader import Reader
from realm_fast.run_folder import RunFolder
from realm_fast.signals import StopRequest, stop_on_signal

log = logging.getLogger(__name__)


class StageTrainer(abc.ABC):
    """One stage: its model and optimizer, from a checkpoint or anew, and the loop over its steps.

    A subclass sets `name` (which is also its section of the settings), `module_name`, `shapes` (the sections
    that shape what is computed), and defines `load`, `prepare`, `update` and `measure`.
    """

    name: ClassVar[str]
    module_name: ClassVar[str]  # of what it trains: "embedder" or "reader"
    shapes: ClassVar[tuple[str, ...]]

    model: Embedder | Reader

    def __init__(self, run: RunFolder, config: Config, checkpoint: Checkpoint | None, progress: bool) -> None:
        self.run, self.config, self.progress = run, config, progress
        self.settings: Any = getattr(config, self.name)
        self.folder = stage_dir(run, self.name)
        self.store = run.store()
        self.identity = identity_of(
            config,
            self.shapes,
            corpus_hash=self.store.corpus_hash,
            tokenizer_hash=self.store.tokenizer_hash,
        )
        if checkpoint is not None:
            checkpoint.check_identity(self.identity)
        self.device = resolve_device(config.device)
        torch.manual_seed(step_seed(config.seed, 0))  # new layers are a function of the seed
        self.model = self.load(checkpoint).to(self.device)
        for note in self.model.notes if checkpoint is None else ():
            log.info("%s", note)
        learning_rate = getattr(self.settings, f"{self.module_name}_lr")
        self.optimizer = build_optimizer(
            {self.module_name: (self.model, learning_rate)}, weight_decay=self.settings.weight_decay
        )
        self.step = 0
        self.window: dict[str, float] = {}  # sums since the last line of metrics
        if checkpoint is not None:
            checkpoint.load_optimizer(self.optimizer)
            self.step, self.window = checkpoint.step, dict(checkpoint.state["window"])
        self.prepare()

    @abc.abstractmethod
    def load(self, checkpoint: Checkpoint | None) -> Any:
        """The model, from the checkpoint or by the settings."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """What else the stage needs: samplers, tables."""

    @abc.abstractmethod
    def update(self, step: int) -> dict[str, float]:
        """Adds the gradient of step `step` to the parameters; returns what is averaged into the metrics."""

    @abc.abstractmethod
    def measure(self) -> dict[str, Any]:
        """How good the model is on what it was not trained on: a line of evaluations.jsonl."""

    @property
    def evaluations_path(self) -> Path:
        return self.folder / "evaluations.jsonl"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def train(self, stop: StopRequest) -> None:
        """The loop, from the step reached to the last."""
        steps, first = self.settings.steps, self.step
        warmup = finetune_warmup_steps(self.settings.warmup_steps, steps)
        if first == 0:
            self._evaluate("before")
        metrics = MetricsLog(self.folder / "metrics.jsonl", self.folder / "tensorboard")
        shown = bar(total=steps, initial=first, desc=self.name, unit="step", enabled=self.progress)
        with self.run.stage(self.name) as details, metrics, shown:
            metrics.truncate_after(first)
            self.model.train()
            for step in range(first + 1, steps + 1):
                begin = time.monotonic()
                rates = set_learning_rates(self.optimizer, step, warmup_steps=warmup, total_steps=steps)
                torch.manual_seed(step_seed(self.config.seed, step))
                means = self.update(step)
                grad_norm = clip_gradients(self.optimizer, self.settings.clip_grad_norm, step)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step = step
                means |= {"steps": 1, "grad_norm": grad_norm, "step_s": time.monotonic() - begin}
                for key, value in means.items():
                    self.window[key] = self.window.get(key, 0.0) + value
                shown.update()
                shown.set_postfix(loss=means["loss"])
                if step % self.settings.log_every_steps == 0 or step == steps:
                    self._log(metrics, rates)
                if step % self.settings.checkpoint_every_steps == 0 or step == steps or stop:
                    metrics.flush()
                    self._save()
                if stop and step < steps:
                    stop.raise_interrupted(
                        f"{self.name} stopped after step {step} of {steps}; --resume goes on from here"
                    )
            details |= {"steps": steps - first, "queries": (steps - first) * self.settings.batch_queries}
        self._evaluate("after")

    def _evaluate(self, when: str) -> None:
        was_training = self.model.training
        self.model.eval()
        try:
            with self.run.stage(f"measure {when} {self.name}"), torch.no_grad():
                write_evaluations(self.evaluations_path, when, [{"step": self.step, **self.measure()}])
        finally:
            self.model.train(was_training)

    def _log(self, metrics: MetricsLog, rates: dict[str, float]) -> None:
        steps = self.window.pop("steps")
        means = {name: total / steps for name, total in self.window.items()}
        metrics.write(
            {
                "step": self.step,
                **means,
                **{f"{module}_lr": rate for module, rate in rates.items()},
                "queries_per_s": self.settings.batch_queries / means["step_s"],
            }
        )
        self.window.clear()

    def _save(self) -> None:
        save_checkpoint(
            self.folder / "checkpoints",
            self.step,
            modules={self.module_name: self.model},
            optimizer=self.optimizer,
            state={"window": dict(self.window)},
            identity=self.identity,
            keep=self.settings.keep_checkpoints,
        )


def stage_dir(run: RunFolder, name: str) -> Path:
    return run.path / name


def run_stage(
    kind: type[StageTrainer], run: RunFolder, config: Config, *, resume: bool = False, progress: bool = False
) -> None:
    """Runs a stage of `run` to its last step.

    Args:
        resume: go on from the newest checkpoint. Without it, a stage that has one is refused.

    Raises:
        UserError: settings, corpus, run and checkpoint do not fit together.
        TrainingDivergedError: the loss or a gradient is not finite; the last checkpoint is intact.
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
    """
    with run.lock(kind.name), stop_on_signal() as stop:
        folder = stage_dir(run, kind.name) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        clean_checkpoints(folder)
        checkpoint = newest_checkpoint(folder)
        if checkpoint is not None and not resume:
            raise UserError(
                f"{folder}: already has a checkpoint of step {checkpoint.step}. "
                "Add --resume to go on from it, or name a new run folder."
            )
        trainer = kind(run, config, checkpoint, progress)
        run.save_config(config)
        trainer.train(stop)
