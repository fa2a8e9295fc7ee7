"""Early stopping of fine-tuning: which questions are kept out of it, what did best on them, when to stop.

    split = split_dev(questions, config)
    watch = EarlyStopping(patience=3)
    watch.note(50, Score(exact_match=12.0, f1=15.1, recall=40.0))      # True: better than all before
    watch.best_step, watch.stop

Scores are compared by exact match; equal ones by F1, then by recall.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from realm_fast.config import Config
from realm_fast.errors import ConfigError, DataError
from realm_fast.qa_metrics import normalise_answer
from realm_fast.questions import Question, load_questions

log = logging.getLogger(__name__)
_STREAM = 1  # of the seed: epochs are drawn from (seed, epoch)


class Score(NamedTuple):
    """One evaluation on the dev questions, in percent; a tuple, so that > is the order of checkpoints."""

    exact_match: float
    f1: float
    recall: float  # with an answer in one of the blocks read


@dataclass
class EarlyStopping:
    """What did best so far, and how many evaluations there were since; all of it goes into checkpoints."""

    patience: int  # evaluations without gain after which to stop; 0: never
    best_step: int | None = None
    best: Score | None = None
    without_gain: int = 0

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        return cls(**{**state, "best": None if state["best"] is None else Score(*state["best"])})

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def note(self, step: int, score: Score) -> bool:
        """Takes in one evaluation; True where it is the best so far."""
        if self.best is not None and score <= self.best:
            self.without_gain += 1
            return False
        self.best_step, self.best, self.without_gain = step, score, 0
        return True

    @property
    def stop(self) -> bool:
        return 0 < self.patience <= self.without_gain


@dataclass(frozen=True)
class Split:
    """The questions of a fine-tuning job."""

    train: list[Question]
    dev: list[Question]  # empty: none are looked at
    left_out: int  # of the training questions: they are asked in dev too


def split_dev(questions: Sequence[Question], config: Config) -> Split:
    """Sets the dev questions apart: those that finetune.dev_questions names, or a share of `questions`.

    The share is a function of the questions and the seed. Whichever way, a question with the words of a dev
    question, whatever its answers, is not trained on.

    Raises:
        ConfigError: the settings contradict each other.
        DataError: dev, or what is left to train on, is empty.
    """
    tuning = config.finetune
    if tuning.dev_questions and tuning.dev_share:
        raise ConfigError(
            f"finetune.dev_share: expected 0 where finetune.dev_questions names the dev questions "
            f"({tuning.dev_questions}), got {tuning.dev_share}"
        )
    if tuning.dev_questions:
        dev = list(load_questions(tuning.dev_questions, limit=tuning.limit_dev_questions))
        rest = list(questions)
    elif tuning.dev_share:
        count = round(tuning.dev_share * len(questions))
        if not count:
            raise DataError(
                f"finetune.dev_share: {tuning.dev_share} of {len(questions)} questions is no question; "
                "give a larger share, or name finetune.dev_questions."
            )
        order = np.random.default_rng([config.seed, 0, _STREAM]).permutation(len(questions))
        chosen = set(order[:count].tolist())
        dev = [question for i, question in enumerate(questions) if i in chosen]
        rest = [question for i, question in enumerate(questions) if i not in chosen]
    elif tuning.patience:
        raise ConfigError(
            f"finetune.patience: {tuning.patience} evaluations without gain need dev questions to evaluate "
            "on; name finetune.dev_questions, or set finetune.dev_share"
        )
    else:
        return Split(list(questions), [], 0)
    asked = {normalise_answer(question.text) for question in dev}
    train = [question for question in rest if normalise_answer(question.text) not in asked]
    left_out = len(rest) - len(train)
    if not train:
        raise DataError(
            f"{tuning.questions}: no question is left to train on: {len(dev):,} are kept for dev, "
            f"{left_out:,} ask the same."
        )
    also = f"; {left_out:,} that ask the same are not trained on" if left_out else ""
    log.info("%s questions are kept for dev%s", f"{len(dev):,}", also)
    return Split(train, dev, left_out)
