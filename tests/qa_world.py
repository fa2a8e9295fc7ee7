"""A world of invented countries, small enough to learn in seconds: blocks, questions, a run folder.

Each block tells a country's capital and river; a question asks for one of them. Retrieval must find the
country, the reader must tell the capital from the river.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from realm_fast.config import Config, load_config
from realm_fast.corpus import build_corpus
from realm_fast.questions import Question
from realm_fast.run_folder import RunFolder
from realm_fast.token_store import TokenStore


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are fastest on one thread, above all on a busy machine. Import it to use it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SYLLABLES = [c + v for c, v in zip("bcdfghklmnprstvwz", "oueiaeiouiaeoaeua", strict=True)]
WORDS = (
    "what is the capital of which river runs through a in and city lies on people live there it old town "
    "country has mountains many . , ? ' - ( ) 1 9 é"
)


def _names(prefix: str, count: int) -> list[str]:
    """`prefix` and two syllables, all different."""
    names = [prefix + a + b for a in SYLLABLES for b in SYLLABLES if a != b]
    return [names[(i * 37) % len(names)] for i in range(count)]


def countries(count: int) -> list[tuple[str, str, str]]:
    """(country, capital, river)"""
    return list(zip(_names("n", count), _names("x", count), _names("y", count), strict=True))


def write_vocabulary(folder: Path, count: int) -> Path:
    """A vocabulary in which every name is one word piece (so that a tiny model can learn it)."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for row in countries(count) for name in row]
    pieces = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789é")]
    words = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *names, *pieces])
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


def questions(count: int) -> list[Question]:
    """Two questions a country."""
    asked = []
    for i, (country, capital, river) in enumerate(countries(count)):
        asked.append(Question(f"capital/{i}", f"What is the capital of {country.capitalize()}?", [capital]))
        asked.append(
            Question(f"river/{i}", f"Which river runs through {country.capitalize()}?", [river, "Rhine"])
        )
    return asked


def settings(folder: Path, *overrides: str) -> Config:
    trunk = "fresh:layers=1,hidden=32,heads=2"
    return load_config(
        None,
        [
            "seed=3",
            "device=cpu",
            f"corpus.source={folder / 'corpus.jsonl'}",
            f"corpus.tokenizer={folder / 'vocabulary'}",
            "corpus.max_block_tokens=48",
            "corpus.num_workers=1",
            f"embedder.trunk={trunk}",
            f"reader.trunk={trunk}",
            "embedder.embedding_dim=32",
            "embedder.pooling=mean",
            "reader.max_joint_tokens=64",
            "masking.max_query_tokens=24",
            "refresh.token_budget=2048",
            "finetune.steps=12",
            "finetune.batch_questions=4",
            "finetune.retriever_beam=8",
            "finetune.reader_beam=3",
            "finetune.max_reader_tokens=64",
            "finetune.max_span_tokens=3",
            "finetune.span_hidden=16",
            "finetune.reader_lr=3e-3",
            "finetune.embedder_lr=3e-3",
            "finetune.checkpoint_every_steps=4",
            "finetune.log_every_steps=2",
            f"finetune.questions={folder / 'train.jsonl'}",
            f"evaluate.questions={folder / 'test.jsonl'}",
            "evaluate.reader_beam=3",
            "evaluate.reachable_top_k=5",
            *overrides,
        ],
    )


def write_questions(path: Path, asked: list[Question]) -> Path:
    lines = [
        json.dumps({"id": q.id, "question": q.text, "answer": q.answers}, ensure_ascii=False) for q in asked
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_store(folder: Path, count: int = 24) -> TokenStore:
    """The corpus, its vocabulary and question files below `folder`."""
    write_vocabulary(folder / "vocabulary", count)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for country, capital, river in countries(count):
            name = country.capitalize()
            text = (
                f"{name} is a country. The capital of {name} is the city {capital.capitalize()}. "
                f"The river {river.capitalize()} runs through {name}."
            )
            file.write(json.dumps({"id": country, "title": name, "text": text}) + "\n")
    asked = questions(count)
    write_questions(folder / "train.jsonl", asked)
    write_questions(folder / "test.jsonl", asked[::3])
    return build_corpus(settings(folder).corpus, folder / "store", progress=False)


def make_run(folder: Path, name: str, store: TokenStore, *overrides: str) -> tuple[RunFolder, Config]:
    config = settings(folder, *overrides)
    return RunFolder.create(folder / name, config, store), config
