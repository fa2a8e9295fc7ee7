"""Data that many tests use: the excerpt under tests/data as token stores, built once in a test run."""

import os
from pathlib import Path

import hypothesis
import pytest

from realm_fast.config import CorpusConfig
from realm_fast.corpus import build_corpus
from realm_fast.masking import SalientSpans, build_salient_spans
from realm_fast.token_store import TokenStore
from realm_fast.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"

hypothesis.settings.register_profile("realm_fast", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("realm_fast")

# Fewer threads than cores in every process a test starts: the machine may be small and shared.
os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none, instead of failing one by one."""
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: `make gpu-check` on a machine that has one")
    for item in items:
        if item.get_closest_marker("gpu"):  # not item.keywords: they hold folder names too
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """tests/data: wiki_leads.jsonl, questions.jsonl, tokenizer/, user/{documents,questions}.jsonl."""
    return DATA


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """bert-base-uncased's tokenizer with the 9,950 wordpieces that tests/data needs."""
    return Tokenizer.load(DATA / "tokenizer")


@pytest.fixture(scope="session")
def wiki_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """400 Wikipedia leads in blocks of at most 128 tokens. Read-only: shared by all tests."""
    return _build(DATA / "wiki_leads.jsonl", tmp_path_factory.mktemp("wiki") / "corpus", 128)


@pytest.fixture(scope="session")
def wiki_spans(wiki_store: TokenStore) -> SalientSpans:
    """Salient spans of `wiki_store`, by the rules (no model needed)."""
    return build_salient_spans(wiki_store, "rules", progress=False, num_workers=1)


@pytest.fixture(scope="session")
def user_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """50 short documents in a user's own form."""
    return _build(DATA / "user" / "documents.jsonl", tmp_path_factory.mktemp("user") / "corpus", 96)


def _build(source: Path, out: Path, max_block_tokens: int) -> TokenStore:
    config = CorpusConfig(
        source=str(source),
        tokenizer=str(DATA / "tokenizer"),
        max_block_tokens=max_block_tokens,
        num_workers=1,
    )
    return build_corpus(config, out, progress=False)
