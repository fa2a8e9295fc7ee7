"""A corpus of a few real blocks and the smallest models over it, for the tests of the models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from realm_fast.config import CorpusConfig, EmbedderConfig, MaskingConfig, ReaderConfig
from realm_fast.corpus import build_corpus
from realm_fast.embedder import Embedder
from realm_fast.masking import MaskedQuery, Masker
from realm_fast.reader import Reader
from realm_fast.token_store import TokenStore

DATA = Path(__file__).parent / "data"
TRUNK = "fresh:layers=2,hidden=16,heads=2,intermediate=32,positions=128"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For modules that import it: models this small lose more to waking a second thread than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def real_documents(count: int) -> list[tuple[str, str]]:
    """(title, text) of the first entries of the excerpt."""
    with open(DATA / "wiki_leads.jsonl", encoding="utf-8") as file:
        entries = [json.loads(line) for _, line in zip(range(count), file)]
    return [(entry["title"], entry["text"]) for entry in entries]


def make_store(folder: Path, documents: list[tuple[str, str]], max_block_tokens: int = 64) -> TokenStore:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for i, (title, text) in enumerate(documents):
            file.write(json.dumps({"id": str(i), "title": title, "text": text}) + "\n")
    config = CorpusConfig(
        source=str(folder / "corpus.jsonl"),
        tokenizer=str(DATA / "tokenizer"),
        max_block_tokens=max_block_tokens,
        num_workers=1,
    )
    return build_corpus(config, folder / "store", progress=False)


def make_embedder(store: TokenStore, seed: int = 0, **settings) -> Embedder:
    torch.manual_seed(seed)
    settings = {"trunk": TRUNK, "embedding_dim": 8, **settings}
    return Embedder.from_config(EmbedderConfig(**settings), store.tokenizer())


def make_reader(store: TokenStore, seed: int = 1, trunk: str = TRUNK) -> Reader:
    torch.manual_seed(seed)
    return Reader.from_config(ReaderConfig(trunk=trunk, max_joint_tokens=96), store.tokenizer())


def make_queries(store: TokenStore, count: int, *, max_masks: int = 4, seed: int = 0) -> list[MaskedQuery]:
    config = MaskingConfig(strategy="random_span", max_query_tokens=32, max_masks=max_masks)
    return Masker(store, config, seed).queries(0, count)


def query_of(store: TokenStore, block_id: int, positions: list[int], sentence: int = 0) -> MaskedQuery:
    """A query cut from a block by hand: sentence `sentence`, masked at `positions` of it."""
    start, stop = (int(x) for x in store.sentences(block_id)[sentence : sentence + 2])
    tokens = store.body_tokens(block_id)[start:stop].astype(np.int32)
    masked = np.array(positions, dtype=np.int32)
    labels = tokens[masked]
    tokens[masked] = store.tokenizer().mask_id
    return MaskedQuery(block_id, tokens, masked, labels, (start, stop))


def double(module: torch.nn.Module) -> torch.nn.Module:
    """In float64 and evaluation mode: what gradients are checked in."""
    return module.double().eval()
