"""Blocks embedded a second: our engine beside SentenceTransformer.encode and transformers' own forward.

    realm-fast bench refresh throughput [--slices 4] [--slice-blocks 500] [--json FILE] [--plot FILE]

All arms embed the same blocks with the same weights (by default the packaged MiniLM over the packaged corpus,
mean pooling, as it was trained) and take turns slice by slice, so that a busy machine is busy for all; ratios
are those of one slice. Our arms are `embed_index`, from the token store to the finished index. The peers get
what their users give them: SentenceTransformer.encode (title, text) pairs with its defaults, transformers
batches of 32 in the corpus' order. Every arm's values must agree with float32's, and its top 10 for real
questions are compared with float32's.

GFLOP/s count what the trunk must compute for the real tokens, padding not; the linear peak is the faster of
MKL and oneDNN on the trunk's widest layer, measured in the same run.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from realm_fast.benchmarks.roofline import device_slug, machine

import realm_fast.embedding as embedding_module
from realm_fast.block_encoder import BlockEncoder, PackedEncoder, PaddedEncoder, resolve_precision
from realm_fast.config import CorpusConfig, EmbedderConfig
from realm_fast.corpus import build_corpus
from realm_fast.embedder import Embedder
from realm_fast.embedding import EmbeddingStats, embed_index
from realm_fast.packaged import resolve
from realm_fast.packing import block_input, pad_batch, query_input
from realm_fast.questions import load_questions
from realm_fast.token_store import TokenStore

RESULTS = Path(__file__).resolve().parent / "results"
PEER_BATCH_BLOCKS = 32  # also SentenceTransformer's default
TOP_K = 10
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SENTENCE_TRANSFORMER = "SentenceTransformer.encode"
TRANSFORMERS = "transformers, batches of 32"
REFERENCE = "float32, packed"
MARKS = ("<!-- bench refresh throughput: begin -->", "<!-- bench refresh throughput: end -->")


@dataclass
class Arm:
    """One way to embed blocks first .. first + count - 1: -> [count, D] float32 and what it recorded."""

    run: Callable[[int, int], tuple[torch.Tensor, EmbeddingStats]]
    precision: str = "float32"
    seconds: list[float] = field(default_factory=list)  # of each slice
    parts: list[torch.Tensor] = field(default_factory=list)
    stats: EmbeddingStats = field(default_factory=EmbeddingStats)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="realm-fast bench refresh throughput", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--corpus", help="a token store; default: wiki-leads, built for the occasion")
    parser.add_argument(
        "--trunk", default="minilm-l6", help="folder or packaged model (default: %(default)s)"
    )
    parser.add_argument("--pooling", choices=("mean", "cls"), default="mean")
    parser.add_argument("--slices", type=int, default=4, help="turns that each arm takes")
    parser.add_argument("--slice-blocks", type=int, default=500, help="blocks in a turn")
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--dtype", default="int8", help="of the index (default: %(default)s)")
    parser.add_argument(
        "--bfloat16", action="store_true", help="also where the CPU has no instructions for it"
    )
    parser.add_argument("--questions", default="nq.test")
    parser.add_argument("--num-questions", type=int, default=500)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's default)")
    parser.add_argument("--quick", action="store_true", help="2 slices of 60 blocks, nothing written")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/...")
    parser.add_argument("--plot", type=Path, help="also draw the table here")
    parser.add_argument("--table", type=Path, help="also put the table between the marks of this page")
    parser.add_argument("--arms", nargs="+", help="only these beside the reference (default: all)")
    options = parser.parse_args(argv)
    if options.quick:
        options.slices, options.slice_blocks = 2, 60
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        store = (
            TokenStore.open(options.corpus)
            if options.corpus
            else build_corpus(CorpusConfig(tokenizer=options.trunk), Path(scratch) / "corpus", progress=False)
        )
        embedder = load_embedder(options.trunk, options.pooling, store)
        result = measure(embedder, store, options)
    text = as_markdown(result)
    print(text)
    if options.table is not None:
        put_between_marks(options.table, text)
    path = options.json or (
        None if options.quick else RESULTS / f"refresh_throughput-{device_slug()}-{date.today()}.json"
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {path}")
    if options.plot is not None:
        draw(result, options.plot)


def load_embedder(trunk: str, pooling: str, store: TokenStore) -> Embedder:
    """The trunk and its pooling alone, as SentenceTransformer would run the folder."""
    config = json.loads((Path(resolve(trunk, "model")) / "config.json").read_text(encoding="utf-8"))
    settings = EmbedderConfig(
        trunk=trunk, pooling=pooling, projection="none", layer_norm=False, embedding_dim=config["hidden_size"]
    )
    return Embedder.from_config(settings, store.tokenizer()).requires_grad_(False)


def measure(embedder: Embedder, store: TokenStore, options: argparse.Namespace) -> dict:
    count = options.slice_blocks
    slices = [count * i for i in range(options.slices) if count * (i + 1) <= len(store)]
    if len(slices) < options.slices:
        raise SystemExit(
            f"--slices {options.slices} of {count} blocks: the corpus has {len(store)} blocks only."
        )
    embedder.eval()  # the peer runs its modules as they stand
    arms, left_out = make_arms(embedder, store, options)
    if options.arms:
        if unknown := set(options.arms) - set(arms):
            raise SystemExit(f"--arms: expected some of {list(arms)}, got {sorted(unknown)}")
        left_out |= dict.fromkeys(set(arms) - {REFERENCE, *options.arms}, "not among --arms")
        arms = {name: arm for name, arm in arms.items() if name in (REFERENCE, *options.arms)}
    warm_up(arms)
    for first in slices:
        for arm in arms.values():
            gc.collect()
            begin = time.perf_counter()
            values, stats = arm.run(first, count)
            arm.seconds.append(time.perf_counter() - begin)
            arm.parts.append(values)
            add(arm.stats, stats)
    blocks = count * len(slices)
    tokens = np.asarray(store.block_lengths())[:blocks]
    operations = trunk_operations(embedder, tokens)
    queries = embed_questions(embedder, store, options)
    expected = torch.cat(arms[REFERENCE].parts)
    peaks = {
        precision: linear_peak(embedder, precision) for precision in {a.precision for a in arms.values()}
    }
    rows = []
    for name, arm in arms.items():
        values = torch.cat(arm.parts)
        error = float(((values - expected).norm(dim=1) / expected.norm(dim=1)).max())
        if not error < (1e-4 if arm.precision == "float32" else 0.2):
            raise AssertionError(f"{name}: off by {error:.1e} of an embedding's norm")
        rate = operations / sum(arm.seconds)
        row = {
            "arm": name,
            "blocks_per_s": blocks / sum(arm.seconds),
            "slice_blocks_per_s": [count / s for s in arm.seconds],
            "gflop_per_s": rate / 1e9,
            "share_of_linear_peak": rate / peaks[arm.precision],
            "padding_waste": arm.stats.padding_waste,
            "largest_error": error,
            f"overlap_at_{TOP_K}": overlap(queries, values, expected),
            "epilogue_share": arm.stats.epilogue_share,
            "encoder_idle": arm.stats.encoder_idle if arm.stats.encoder_seconds else None,
        }
        for peer in (SENTENCE_TRANSFORMER, TRANSFORMERS):
            if peer in arms:
                ratios = [p / s for p, s in zip(arms[peer].seconds, arm.seconds, strict=True)]
                row[f"times {peer}"] = [min(ratios), statistics.median(ratios), max(ratios)]
        rows.append(row)
    return {
        "machine": {**machine(), "load": os.getloadavg()[0], "date": date.today().isoformat()},
        "trunk": options.trunk, "pooling": options.pooling, "index_dtype": options.dtype,
        "token_budget": options.token_budget, "blocks": blocks, "slice_blocks": count,
        "tokens_per_block": float(tokens.mean()), "questions": [options.questions, len(queries)],
        "linear_peak_gflop_per_s": {precision: rate / 1e9 for precision, rate in peaks.items()},
        "left_out": left_out, "rows": rows,
    }  # fmt: skip


def make_arms(
    embedder: Embedder, store: TokenStore, options: argparse.Namespace
) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms, and why others are missing."""
    arms: dict[str, Arm] = {}
    left_out: dict[str, str] = {}
    precisions = ["float32"]
    if options.bfloat16 or resolve_precision("auto", embedder.device) == "bfloat16":
        precisions.append("bfloat16")
    else:
        left_out["bfloat16"] = "this CPU has no instructions for it (--bfloat16 runs it all the same)"
    for precision in precisions:
        for name, kind in (("packed", PackedEncoder), ("padded", PaddedEncoder)):
            arms[f"{precision}, {name}"] = Arm(
                lambda first, count, kind=kind, precision=precision: ours(
                    embedder, store, kind, precision, first, count, options
                ),
                precision,
            )
    arms[TRANSFORMERS] = Arm(lambda first, count: batches(embedder, store, first, count))
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        left_out[SENTENCE_TRANSFORMER] = f"{error} (pip install 'realm_fast[bench]')"
        return arms, left_out
    if options.pooling != "mean":
        left_out[SENTENCE_TRANSFORMER] = "it pools by the mean where a folder does not say"
        return arms, left_out
    model = SentenceTransformer(str(resolve(options.trunk, "model")), device="cpu")

    def encode(first: int, count: int) -> tuple[torch.Tensor, EmbeddingStats]:
        pairs = [(store.title(i), store.text(i)) for i in range(first, first + count)]
        return torch.from_numpy(model.encode(pairs, show_progress_bar=False)), EmbeddingStats()

    arms[SENTENCE_TRANSFORMER] = Arm(encode)
    return arms, left_out


def ours(
    embedder: Embedder,
    store: TokenStore,
    kind: Callable[[Embedder, str], BlockEncoder],
    precision: str,
    first: int,
    count: int,
    options: argparse.Namespace,
) -> tuple[torch.Tensor, EmbeddingStats]:
    stats = EmbeddingStats()
    original = embedding_module.block_encoder
    embedding_module.block_encoder = kind
    try:
        index = embed_index(
            embedder, store, first, count, dtype=options.dtype, token_budget=options.token_budget,
            precision=precision, stats=stats,
        )  # fmt: skip
    finally:
        embedding_module.block_encoder = original
    return index.reconstruct(index.ids), stats


@torch.inference_mode()
def batches(
    embedder: Embedder, store: TokenStore, first: int, count: int
) -> tuple[torch.Tensor, EmbeddingStats]:
    """transformers' forward, rows as they come, each batch padded to its longest."""
    side, special, stats = embedder.block_side, embedder.special, EmbeddingStats()
    parts = []
    for start in range(first, first + count, PEER_BATCH_BLOCKS):
        chosen = range(start, min(start + PEER_BATCH_BLOCKS, first + count))
        rows = [block_input(store.title_tokens(i), store.body_tokens(i), special) for i in chosen]
        batch = pad_batch(rows, special.pad_id, 1)
        states = side.trunk.model(
            input_ids=batch.ids, attention_mask=batch.attention_mask.long(), token_type_ids=batch.segments
        ).last_hidden_state
        weights = batch.attention_mask[..., None].float()
        mean = (states * weights).sum(1) / weights.sum(1)
        parts.append(states[:, 0].clone() if side.pooling == "cls" else mean)
        stats.tokens += int(batch.attention_mask.sum())
        stats.padded_tokens += batch.ids.numel()
    return torch.cat(parts), stats


def warm_up(arms: dict[str, Arm]) -> None:
    for arm in arms.values():
        arm.run(0, 16)


def add(total: EmbeddingStats, more: EmbeddingStats) -> None:
    for name, value in vars(more).items():
        setattr(total, name, getattr(total, name) + value)


def trunk_operations(embedder: Embedder, tokens: np.ndarray) -> float:
    """Multiplications and additions of the products for rows of so many tokens, without padding.

    A layer's are 8 H^2 + 4 H I a token and 4 H a pair of tokens; with [CLS] pooling the last layer needs keys
    and values of every token and the rest of the first one alone.
    """
    config = embedder.block_side.trunk.config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    t = tokens.astype(np.float64)
    dense = 8 * hidden**2 + 4 * hidden * inner
    whole = dense * t + 4 * hidden * t**2
    if embedder.block_side.pooling != "cls":
        return float(layers * whole.sum())
    last = 4 * hidden**2 * t + (dense - 4 * hidden**2) + 4 * hidden * t
    return float(((layers - 1) * whole + last).sum())


@torch.inference_mode()
def linear_peak(embedder: Embedder, precision: str, rows: int = 4096) -> float:
    """Operations a second of the trunk's widest layer alone: the faster of torch's default and oneDNN."""
    config = embedder.block_side.trunk.config
    hidden, inner = config.hidden_size, config.intermediate_size
    x, weight, bias = (
        torch.randn(*shape).to(TYPES[precision]) for shape in ((rows, hidden), (inner, hidden), (inner,))
    )
    calls = [lambda: F.linear(x, weight, bias)]
    if precision == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        prepared = torch.ops.mkldnn._reorder_linear_weight(weight)
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, prepared, bias, "none", [], ""))
    best = float("inf")
    for call in calls * 4:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return 2 * rows * hidden * inner / best


@torch.inference_mode()
def embed_questions(embedder: Embedder, store: TokenStore, options: argparse.Namespace) -> torch.Tensor:
    texts = [q.text for q in load_questions(options.questions, limit=options.num_questions)]
    tokens = [np.array(ids, np.int32) for ids in store.tokenizer().encode_ids(texts)]
    rows = [query_input(ids[: embedder.max_tokens - 2], embedder.special) for ids in tokens]
    return torch.cat(
        [embedder.query_emb(embedder.pad(rows[i : i + 64])) for i in range(0, len(rows), 64)]
    )  # [B, D]


def overlap(queries: torch.Tensor, values: torch.Tensor, expected: torch.Tensor) -> float:
    """The mean share of float32's top k (by inner product) among the top k of `values`."""
    k = min(TOP_K, len(values))
    got, want = ((queries @ v.T).topk(k, dim=1).indices for v in (values, expected))
    return float((got[:, :, None] == want[:, None, :]).any(2).float().mean())


def as_markdown(result: dict) -> str:
    facts = result["machine"]
    peaks = ", ".join(
        f"{precision} {rate:.0f}" for precision, rate in sorted(result["linear_peak_gflop_per_s"].items())
    )
    lines = [
        f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, load {facts['load']:.1f}, "
        f"{facts['date']}; {result['trunk']}, {result['pooling']} pooling, {result['blocks']} blocks of "
        f"{result['tokens_per_block']:.0f} tokens in {len(result['rows'][0]['slice_blocks_per_s'])} slices, "
        f"index {result['index_dtype']}, packs of {result['token_budget']} tokens; linear peak, GFLOP/s: "
        f"{peaks}. In brackets the slowest and the fastest slice.",
        "",
        "| arm | blocks/s | GFLOP/s | of linear peak | padding | epilogue | idle | overlap@10 | x encode | "
        "x transformers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        slices = row["slice_blocks_per_s"]
        ours_alone = row["encoder_idle"] is not None
        cells = [
            row["arm"], f"{row['blocks_per_s']:.1f} ({min(slices):.1f}-{max(slices):.1f})",
            f"{row['gflop_per_s']:.0f}", f"{row['share_of_linear_peak']:.0%}",
            "" if row["arm"] == SENTENCE_TRANSFORMER else f"{row['padding_waste']:.1%}",
            f"{row['epilogue_share']:.2%}" if ours_alone else "",
            f"{row['encoder_idle']:.2%}" if ours_alone else "",
            f"{row[f'overlap_at_{TOP_K}']:.4f}", _ratio(row.get(f"times {SENTENCE_TRANSFORMER}")),
            _ratio(row.get(f"times {TRANSFORMERS}")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nLeft out: {name}: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def put_between_marks(page: Path, text: str) -> None:
    """Replaces what stands between the page's two marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise SystemExit(f"--table {page}: it holds no lines {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    print(f"wrote {page}")


def _ratio(values: list[float] | None) -> str:
    return "" if values is None else f"{values[1]:.2f} ({values[0]:.2f}-{values[2]:.2f})"


def draw(result: dict, path: Path) -> None:
    """Blocks/s of every arm, each slice a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(rows) + 1.4))
    ours_colour, peer_colour = "#2b6cb0", "#a0aec0"
    for place, row in enumerate(reversed(rows)):
        colour = ours_colour if row["encoder_idle"] is not None else peer_colour
        axes.barh(place, row["blocks_per_s"], color=colour, height=0.6)
        axes.plot(
            row["slice_blocks_per_s"], [place] * len(row["slice_blocks_per_s"]), "k.", markersize=5, alpha=0.6
        )
    axes.set_yticks(range(len(rows)), [row["arm"] for row in reversed(rows)])
    facts = result["machine"]
    axes.set_xlabel("blocks/s (bar: all slices; dots: each)")
    axes.set_title(
        f"{result['trunk']}, {result['tokens_per_block']:.0f} tokens a block: {facts['cpu']}, "
        f"{facts['threads']} threads, {facts['date']}",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
