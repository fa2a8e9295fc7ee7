"""When the weights go to the refresher, and which shards of the corpus it embeds first.

Decisions are functions of steps, settings and what was measured; no clock has a say. What they remember is
small and goes into the checkpoint, so that a resumed run decides as the one that was killed would have.

    schedule = RefreshSchedule.from_config(config.refresh)
    reason = schedule.due(step, handed_over_step=..., oldest_shard_step=..., overlap=...)   # or None

    tally = ShardTally(len(store), config.refresh.shard_blocks, half_life_steps=100)
    tally.add(step, candidates.block_ids, candidates.runner_up_ids)
    tally.order(shard_steps)                                                               # [3, 0, 2, 1]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from realm_fast.config import RefreshConfig
from realm_fast.errors import ConfigError, CorruptArtifactError
from realm_fast.types import NO_BLOCK

Reason = Literal["steps", "drift", "ceiling", "resume"]  # why weights were handed over

# A block just behind the last candidate is no candidate yet; a little drift makes it one, or not.
RUNNER_UP_WEIGHT = 0.5


@dataclass(frozen=True)
class RefreshSchedule:
    """When weights are handed to the refresher. A pure function.

    trigger "steps": every `every_steps` steps. Trigger "drift": when the overlap of stale and fresh top-k has
    fallen below `overlap_below`, though not within `min_steps` of the last time, and `max_steps` after it
    whatever the overlap.
    """

    trigger: Literal["steps", "drift"]
    every_steps: int
    check_every_steps: int  # how often the overlap is measured; 0: never
    overlap_below: float
    min_steps: int
    max_steps: int

    @classmethod
    def from_config(cls, config: RefreshConfig) -> Self:
        """Raises ConfigError for settings that cannot work together."""
        if config.trigger == "drift" and not config.drift_every_steps:
            raise ConfigError(
                "refresh.drift_every_steps: expected at least 1 with refresh.trigger=drift, got 0"
            )
        if config.correct_queries and not config.drift_every_steps:
            raise ConfigError(
                "refresh.drift_every_steps: expected at least 1 with refresh.correct_queries, got 0"
            )
        if config.correct_queries and config.publish_every_shards:
            raise ConfigError(
                "refresh.correct_queries: expected refresh.publish_every_shards=0 with it, got "
                f"{config.publish_every_shards}: one correction cannot serve shards of several ages"
            )
        if config.drift_min_steps > config.drift_max_steps:
            raise ConfigError(
                "refresh.drift_min_steps: expected at most refresh.drift_max_steps="
                f"{config.drift_max_steps}, got {config.drift_min_steps}"
            )
        return cls(
            trigger=config.trigger,
            every_steps=config.every_steps,
            check_every_steps=config.drift_every_steps,
            overlap_below=config.drift_overlap_below,
            min_steps=config.drift_min_steps,
            max_steps=config.drift_max_steps,
        )

    def is_check_due(self, step: int) -> bool:
        """Whether drift is measured after `step`, be it as a trigger or only to be seen."""
        return step > 0 and self.check_every_steps > 0 and step % self.check_every_steps == 0

    def due(
        self, step: int, *, handed_over_step: int, oldest_shard_step: int, overlap: float | None
    ) -> Reason | None:
        """Why the weights of `step` are due, or None.

        Args:
            handed_over_step: when weights were last handed over; 0 where they never were.
            oldest_shard_step: the step of the weights behind the oldest shard in use. While it is less than
                handed_over_step a refresh is on its way, and the drift measured is one it will mend.
            overlap: measured after this very step, in [0, 1]; None: it was not.
        """
        if self.trigger == "steps":
            return "steps" if step > 0 and step % self.every_steps == 0 else None
        since = step - handed_over_step
        if since >= self.max_steps:
            return "ceiling"
        under_way = oldest_shard_step < handed_over_step
        drifted = overlap is not None and overlap < self.overlap_below
        return "drift" if drifted and since >= self.min_steps and not under_way else None


class ShardTally:
    """How much each shard's blocks were asked for of late.

        tally[s] = sum over steps u <= now of 2^-((now - u) / half_life) * (hits_u[s] + runner_ups_u[s] / 2)

    A hit is a candidate of one query. A shard that holds many candidates, or blocks that nearly were, is the
    one whose staleness retrieval feels most.

    Args:
        num_blocks: N.
        shard_blocks: blocks in a shard; the last one may have fewer.
        half_life_steps: after so many steps a hit counts half.
    """

    def __init__(self, num_blocks: int, shard_blocks: int, *, half_life_steps: float) -> None:
        self.shard_blocks = shard_blocks
        self.half_life_steps = half_life_steps
        starts = np.arange(0, num_blocks, shard_blocks)
        self.sizes = np.minimum(num_blocks - starts, shard_blocks)  # [S] blocks
        self.tally = np.zeros(len(starts))  # [S], as of `step`
        self.step = 0

    def add(self, step: int, block_ids: np.ndarray, runner_up_ids: np.ndarray) -> None:
        """Counts what the queries of `step` retrieved, after all that was counted before has decayed.

        Args:
            step: not before that of an earlier call; the same one again for the next micro-batch.
            block_ids: candidates, of any shape; NO_BLOCK (null block, empty slots) is passed over.
            runner_up_ids: the blocks after them, of any shape.
        """
        if step < self.step:
            raise ValueError(f"step: expected at least {self.step}, got {step}")
        self.tally *= 0.5 ** ((step - self.step) / self.half_life_steps)
        self.step = step
        self.tally += self._per_shard(block_ids) + RUNNER_UP_WEIGHT * self._per_shard(runner_up_ids)

    def order(self, shard_steps: Sequence[int]) -> list[int]:
        """All shards, the most asked for per block first; among equals the stalest, then the lowest number.

        Args:
            shard_steps: [S] the step of the weights each shard in use was embedded with.
        """
        if len(shard_steps) != len(self.tally):
            raise ValueError(f"shard_steps: expected {len(self.tally)} of them, got {len(shard_steps)}")
        # the last key counts most
        return np.lexsort((np.asarray(shard_steps), -self.tally / self.sizes)).tolist()

    def state(self) -> dict[str, Any]:
        """JSON values from which `restore` makes the same tally, bit for bit."""
        return {"step": self.step, "tally": self.tally.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up where `state()` was called."""
        if len(state["tally"]) != len(self.tally):
            raise CorruptArtifactError(
                f"the checkpoint's shard tally: expected {len(self.tally)} shards, got {len(state['tally'])}."
            )
        self.step, self.tally = int(state["step"]), np.array(state["tally"], dtype=np.float64)

    def _per_shard(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids).ravel()
        return np.bincount(ids[ids != NO_BLOCK] // self.shard_blocks, minlength=len(self.tally))
