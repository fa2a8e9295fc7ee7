"""The arms of the ablation table and the systems of the QA table: the one list of what each changes."""

import math
from dataclasses import dataclass

REFRESHES = 3  # of the index in a run, evenly spaced: in three hours an index costs as much as a dozen steps
FRESH_TRUNK = "fresh:layers=2,hidden=128,heads=2"  # the shape of the recipe's warm start, with random weights


def refresh_every_steps(steps: int) -> int:
    """So that a run has REFRESHES refreshes (none follows its last step), or one after every step."""
    return math.ceil(steps / (REFRESHES + 1))


@dataclass(frozen=True)
class Published:
    """What the REALM paper's ablation (table 2, NQ dev) has for the nearest arm."""

    exact_match: float
    recall_at_5: float
    arm: str = ""  # where its arm is not quite ours


@dataclass(frozen=True)
class Arm:
    """One way to pre-train.

    Args:
        name: of its folders and files.
        title: in tables.
        changes: settings against the recipe, as `--set` takes them.
        warm: starts from the shared warm start; otherwise from the configured trunks.
        stale_factor: its index is refreshed so many times less often.
    """

    name: str
    title: str
    changes: tuple[str, ...] = ()
    warm: bool = True
    stale_factor: int = 1
    published: Published | None = None


REALM = Arm("realm", "REALM", published=Published(38.2, 38.5))
ABLATIONS = (
    REALM,
    Arm(
        "frozen",
        "retriever frozen",
        # nothing moves the embedder, so its index need not be made again
        ("pretrain.train_retriever=false", "refresh.mode=off"),
        published=Published(35.3, 13.9, "baseline retriever, REALM encoder"),
    ),
    Arm(
        "no-retrieval",
        "reader without retrieval",
        ("pretrain.num_candidates=1", "pretrain.train_retriever=false", "refresh.mode=off"),
        published=Published(31.3, 13.9, "ORQA baseline"),
    ),
    Arm(
        "random-tokens",
        "random-token masks",
        ("masking.strategy=random_token",),
        published=Published(32.3, 24.2),
    ),
    Arm(
        "random-spans",
        "random-span masks",
        ("masking.strategy=random_span",),
        published=Published(35.3, 26.1),
    ),
    Arm("stale", "index 30x staler", stale_factor=30, published=Published(28.7, 15.1)),
    Arm("no-null", "no null block", ("pretrain.use_null_block=false",)),
    Arm("trivial", "trivial candidate allowed", ("pretrain.exclude_trivial=false",)),
    Arm("sequence", "sequence level", ("pretrain.level=sequence",)),
    Arm(
        "random-start",
        "random initialisation",
        # with random weights the null block scores like any other
        (f"embedder.trunk={FRESH_TRUNK}", f"reader.trunk={FRESH_TRUNK}", "pretrain.null_score_offset=0"),
        warm=False,
    ),
)


@dataclass(frozen=True)
class System:
    """One way to answer questions, fine-tuned on the same questions.

    Args:
        from_realm: starts from the REALM arm of the same seed; otherwise from the shared warm start.
    """

    name: str
    title: str
    changes: tuple[str, ...] = ()
    from_realm: bool = False


REALM_QA = System("realm", "REALM, fine-tuned", from_realm=True)
SYSTEMS = (
    REALM_QA,
    System("bm25", "BM25 + reader", ("finetune.retriever=bm25",)),
    System("frozen", "warm start, retriever frozen", ("finetune.embedder_lr=0",)),
    System("warm", "warm start, fine-tuned (as ORQA)"),
)

# Test exact match as published, for the eye; corpora and models there are thousands of times larger.
PUBLISHED_QA = {
    "warm": {"nq.test": 33.3, "wq.test": 36.4, "curated.test": 30.1},
    "realm": {"nq.test": 39.2, "wq.test": 40.2, "curated.test": 46.8},
}
