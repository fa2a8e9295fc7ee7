"""That it learns: joint training alone, from masked words alone, teaches the retriever what to look for.

A made-up corpus of events (who, where, what came of it). Each event is told several times, each time beside other
words; every telling has two twins that share those words and tell of other events. To untrained embeddings the twins are
the closest blocks; what helps the reader is another telling of the same event. Some events are told once only: for them
no block helps, and the null block should be chosen.

The reader is warmed up first, on masked words too (realm_fast.warmup): one that cannot copy teaches the retriever
nothing. No stage ever tells the retriever which block is right.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from realm_fast.checkpoint import newest_checkpoint
from realm_fast.config import Config, load_config
from realm_fast.corpus import build_corpus
from realm_fast.embedder import Embedder
from realm_fast.embedding import embed_blocks
from realm_fast.index import Index, MipsIndex
from realm_fast.masking import MaskedQuery, build_salient_spans
from realm_fast.model import RealmModel, realm_step
from realm_fast.reader import Reader
from realm_fast.run_folder import RunFolder
from realm_fast.snapshot import list_snapshots, open_snapshot
from realm_fast.start import starting_models
from realm_fast.token_store import TokenStore
from realm_fast.train import pretrain
from realm_fast.warmup import warmup

WHO, WHERE, OUTCOMES, SCENERY = 25, 16, 100, 400
TELLINGS = 4  # of an event that is told more than once
SHARE_SCENERY = 3  # blocks that tell of different events beside the same words
TOLD_ONCE = 80
STEPS = 150
NO_EVENT = -1


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small lose more to waking a second thread than it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(count: int) -> list[str]:
    """Invented words of three syllables."""
    syllables = [c + v for c in "bcdfghklmnprstvz" for v in "aeiou"]
    draw = random.Random(0)
    found = dict.fromkeys("".join(draw.choices(syllables, k=3)) for _ in range(2 * count))
    return list(found)[:count]


WORDS = names(WHO + WHERE + OUTCOMES + SCENERY)


def tellings(seed: int) -> list[tuple[int, str]]:
    """(event, sentence) of every block, in random order; NO_EVENT for an event that no other block tells."""
    draw = random.Random(seed)
    who, where = WORDS[:WHO], WORDS[WHO : WHO + WHERE]
    outcomes, scenery = WORDS[WHO + WHERE :][:OUTCOMES], WORDS[-SCENERY:]
    events = [(a, b, draw.choice(outcomes)) for a in who for b in where]
    draw.shuffle(events)
    often, once = events[TOLD_ONCE:], events[:TOLD_ONCE]

    def tell(numbers: list[int], of: list[tuple[str, str, str]], kind: str) -> list[str]:
        draw.shuffle(numbers)
        sentences = []
        for place, number in enumerate(numbers):
            if place % SHARE_SCENERY == 0:
                scene = draw.choice(scenery)
            a, b, outcome = of[number]
            sentences.append(f"{scene} {a} {b} {kind} {scene} {a} {b} {outcome.capitalize()} {scene} .")
        return sentences

    blocks: list[tuple[int, str]] = []
    for _ in range(TELLINGS):
        numbers = list(range(len(often)))
        sentences = tell(numbers, often, "often")
        blocks += zip(numbers, sentences, strict=True)
    blocks += [(NO_EVENT, sentence) for sentence in tell(list(range(len(once))), once, "once")]
    draw.shuffle(blocks)
    return blocks


@dataclass
class World:
    folder: Path
    store: TokenStore
    event: np.ndarray  # [N] of each block, NO_EVENT where nothing else tells of it
    queries: list[MaskedQuery]  # one of every block, its outcome masked


def settings(folder: Path, *overrides: str) -> Config:
    return load_config(
        None,
        [
            "device=cpu",
            f"corpus.source={folder / 'corpus.jsonl'}",
            f"corpus.tokenizer={folder / 'vocabulary'}",
            "corpus.max_block_tokens=32",
            "corpus.num_workers=1",
            # distilbert: no segment embeddings, which drown the words of a random trunk in what all blocks share
            "embedder.trunk=fresh:type=distilbert,layers=1,hidden=64,heads=2,dropout=0,positions=64",
            "embedder.embedding_dim=64",
            "embedder.pooling=mean",
            "embedder.dropout=0",
            "reader.trunk=fresh:layers=1,hidden=128,heads=1,dropout=0,positions=64",
            "reader.max_joint_tokens=64",
            "masking.entity_tagger=rules",
            "masking.max_query_tokens=32",
            "masking.max_masks=1",
            "warmup.steps=120",
            "warmup.batch_queries=64",
            "warmup.evidence_probability=0.8",  # the other blocks of this corpus are distractors enough
            "warmup.distractor_probability=0",
            "warmup.reader_lr=4e-3",
            f"pretrain.steps={STEPS}",
            "pretrain.batch_queries=32",
            "pretrain.num_candidates=6",
            "pretrain.score_temperature=16",
            "pretrain.reader_lr=5e-4",
            "pretrain.embedder_lr=2e-3",
            "pretrain.warmup_steps=10",
            "pretrain.illustrations=0",
            "refresh.mode=inline",
            "refresh.every_steps=25",
            "evaluate.held_out_queries=8",
            f"evaluate.questions={folder / 'none.jsonl'}",
            *overrides,
        ],
    )


def make_world(folder: Path, seed: int) -> World:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocabulary").mkdir()
    pieces = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "tale", "often", "once", *WORDS, *pieces]
    (folder / "vocabulary" / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)) + "\n")
    blocks = tellings(seed)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for i, (_, sentence) in enumerate(blocks):
            file.write(json.dumps({"id": str(i), "title": "tale", "text": sentence}) + "\n")
    config = settings(folder)
    store = build_corpus(config.corpus, folder / "store", progress=False)
    event = np.array([blocks[document][0] for document in store.array("block_document")])
    spans = build_salient_spans(store, "rules", progress=False, num_workers=1)
    mask_id = store.tokenizer().mask_id
    queries = []
    for i in range(len(store)):
        ((first, last),) = spans.spans(i).tolist()
        assert last == first + 1
        tokens = store.body_tokens(i).astype(np.int32)
        label = tokens[[first]]
        tokens[first] = mask_id
        positions = np.array([first], dtype=np.int32)
        queries.append(MaskedQuery(i, tokens, positions, label, (0, len(tokens))))
    return World(folder, store, event, queries)


@dataclass
class Outcome:
    """What a run's last checkpoint can do."""

    recall_at_1: float  # the best block but the query's own tells of the same event
    null_often: float  # mean p(null block | x) where evidence exists
    null_once: float  # and where there is none
    accuracy_often: float  # of the masked outcome, with retrieval
    accuracy_without: float  # the same with the null block alone


def recall_at_1(world: World, model: RealmModel, index: Index) -> float:
    """How often the best block but the query's own tells of the same event."""
    often = [q for q in world.queries if world.event[q.origin_block_id] != NO_EVENT]
    own = torch.tensor([q.origin_block_id for q in often])
    best = index.search(model.search_emb(often), 1, exclude_ids=own).ids[:, 0].numpy()
    return float(np.mean(world.event[best] == world.event[own.numpy()]))


def measure(world: World, model: RealmModel, index: Index, config: Config) -> Outcome:
    often = [q for q in world.queries if world.event[q.origin_block_id] != NO_EVENT]
    once = [q for q in world.queries if world.event[q.origin_block_id] == NO_EVENT]
    with torch.no_grad():
        shown = [
            realm_step(model, index, world.store, queries, num_candidates=config.pretrain.num_candidates)[0]
            for queries in (often[::5], once)
        ]
    return Outcome(
        recall_at_1(world, model, index),
        float(shown[0].stats.null_probability),
        float(shown[1].stats.null_probability),
        float(shown[0].stats.masked_accuracy),
        float(shown[0].stats.masked_accuracy_null),
    )


def trained(world: World, name: str, *overrides: str) -> tuple[Outcome, Outcome, float]:
    """What a run's models can do before joint training and after it, and recall@1 in the index that the last
    steps of training searched.
    """
    config = settings(world.folder, *overrides)
    run = RunFolder.create(world.folder / name, config, world.store)
    temperature = config.pretrain.score_temperature
    start = starting_models(run, config, world.store)
    before = RealmModel(start.embedder, start.reader, temperature=temperature).eval()
    index = MipsIndex.from_embeddings(embed_blocks(start.embedder, world.store))
    pretrain(run, config)
    checkpoint = newest_checkpoint(run.pretrain_dir / "checkpoints")
    assert checkpoint is not None
    after = RealmModel(
        Embedder.load(checkpoint.module_folder("embedder")),
        Reader.load(checkpoint.module_folder("reader")),
        temperature=temperature,
    ).eval()
    *_, in_use, last = (
        open_snapshot(path).index for path in list_snapshots(run.pretrain_dir / "snapshots").values()
    )
    return (
        measure(world, before, index, config),
        measure(world, after, last, config),
        recall_at_1(world, after, in_use),
    )


def warm_reader(world: World) -> str:
    """The setting that names a reader warmed up on this world."""
    config = settings(world.folder)
    run = RunFolder.create(world.folder / "warm", config, world.store)
    warmup(run, config)
    checkpoint = newest_checkpoint(run.path / "warmup" / "checkpoints")
    assert checkpoint is not None
    return f"pretrain.start_reader={checkpoint.path / 'reader'}"


@pytest.mark.slow
def test_joint_training_teaches_the_retriever_and_nothing_else_does(tmp_path):
    world = make_world(tmp_path / "world", seed=0)
    reader = warm_reader(world)
    before, joint, in_use = trained(world, "joint", reader)
    same, cut, _ = trained(world, "cut", reader, "pretrain.train_retriever=false")
    print(before, joint, cut, in_use, sep="\n")
    assert before == same
    assert before.recall_at_1 < 0.2
    assert joint.recall_at_1 > 0.9
    assert in_use > 0.9  # the refresh brought the trainer an index of what it had learnt
    assert cut.recall_at_1 == before.recall_at_1  # its embedder has not moved
    assert joint.accuracy_often > 0.9 > cut.accuracy_often
    # Where no block helps, the null block gains; where one does, it loses. Were a query's own block among its
    # candidates, it would help always; without the null block there is nothing to gain.
    assert joint.null_once > 2 * before.null_once
    assert joint.null_often < before.null_often / 2
