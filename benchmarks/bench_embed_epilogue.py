"""embed_epilogue beside plain torch and torch.compile, and beside the encoder it follows.

    realm-fast bench epilogue [--quick] [--threads N]
    realm-fast bench epilogue --tune          on a GPU: measures every candidate configuration

Every implementation is checked against float64 before anything is timed; they take turns inside every
repetition, so that a busy machine is busy for all. Bytes are the least that can be moved: token states that
are pooled, read once; the projection, read once; stored rows, written once. Their rate is held against the
rate of a plain sum over memory, measured in the same run.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from realm_fast.build import build_info, cpu_features
from realm_fast.ops.embed_epilogue import embed_epilogue, embed_rows_reference

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "realm_fast"
ENCODER_ROWS = 16  # its time is taken on these and scaled to the pack: a whole one takes many seconds
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Case:
    """One pack of `rows` blocks of `tokens` tokens. dim 0: no projection."""

    name: str
    rows: int
    tokens: int
    hidden: int
    dim: int
    pooling: str
    layer_norm: bool
    normalize: bool
    dtype: str = "f32"
    stored: str = "f32"
    trunk: str = ""

    @property
    def width(self) -> int:
        return self.dim or self.hidden

    @property
    def least_bytes(self) -> int:
        read = self.rows * self.hidden * (self.tokens if self.pooling == "mean" else 1)
        size = TYPES[self.dtype].itemsize
        extra = {"f32": 0, "bf16": 4, "int8": 8}[self.stored]
        return (read + self.dim * self.hidden) * size + self.rows * (
            self.width * TYPES[self.stored].itemsize + extra
        )


MINILM = "fresh:layers=6,hidden=384,heads=12,intermediate=1536"
BERT = "fresh:layers=12,hidden=768,heads=12,intermediate=3072"
CASES = [
    Case("REALM, MiniLM", 128, 128, 384, 128, "cls", True, False, trunk=MINILM),
    Case("REALM, BERT-base", 128, 128, 768, 128, "cls", True, False, trunk=BERT),
    Case("MiniLM", 128, 128, 384, 0, "mean", False, True, trunk=MINILM),
    Case("MiniLM to int8", 128, 128, 384, 0, "mean", False, True, stored="int8", trunk=MINILM),
    Case("mean, projected to int8", 128, 128, 768, 128, "mean", True, False, stored="int8", trunk=BERT),
    Case("mean, bf16, projected", 128, 128, 768, 256, "mean", True, False, "bf16", "bf16", trunk=BERT),
    Case("long blocks", 57, 288, 768, 128, "mean", True, False, stored="int8", trunk=BERT),
]


@dataclass
class Inputs:
    hidden: torch.Tensor  # [R, T, H]; for "cls" the first tokens alone, as the trunk gives them
    lengths: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    ln: tuple[torch.Tensor, torch.Tensor] | None
    row_ids: torch.Tensor
    out: torch.Tensor
    scale: torch.Tensor | None
    residual_norm: torch.Tensor | None


def make_inputs(case: Case, device: str, index_rows: int = 4096) -> Inputs:
    """Lengths as in a length-sorted pack: within 8 tokens of each other."""
    generator = torch.Generator().manual_seed(0)
    tokens = case.tokens if case.pooling == "mean" else 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(TYPES[case.dtype]).to(device)

    low_precision = case.stored != "f32"
    return Inputs(
        hidden=normal(case.rows, tokens, case.hidden),
        lengths=torch.randint(max(1, tokens - 8), tokens + 1, (case.rows,), generator=generator).to(device),
        weight=normal(case.dim, case.hidden) / math.sqrt(case.hidden) if case.dim else None,
        bias=normal(case.dim) if case.dim else None,
        ln=(normal(case.width), normal(case.width)) if case.layer_norm else None,
        row_ids=torch.randperm(index_rows, generator=generator)[: case.rows].to(device),
        out=torch.zeros(index_rows, case.width, dtype=TYPES[case.stored], device=device),
        scale=torch.zeros(index_rows, device=device) if case.stored == "int8" else None,
        residual_norm=torch.zeros(index_rows, device=device) if low_precision else None,
    )


def ours(case: Case, x: Inputs) -> Callable[[], None]:
    def run() -> None:
        embed_epilogue(
            x.hidden,
            lengths=x.lengths,
            pooling=case.pooling,
            weight=x.weight,
            bias=x.bias,
            ln_eps=1e-3 if x.ln else None,
            ln_weight=x.ln[0] if x.ln else None,
            ln_bias=x.ln[1] if x.ln else None,
            normalize=case.normalize,
            out=x.out,
            row_ids=x.row_ids,
            scale=x.scale,
            residual_norm=x.residual_norm,
        )

    return run


def plain_rows(case: Case, hidden, lengths, weight, bias, ln):
    """The layers of an embedder, one after the other."""
    if case.pooling == "mean":
        mask = (torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]).float()
        pooled = torch.einsum("rth,rt->rh", hidden.float(), mask) / mask.sum(1, keepdim=True)
    else:
        pooled = hidden[:, 0].float()
    x = F.linear(pooled, weight.float(), bias.float()) if weight is not None else pooled
    if ln is not None:
        x = F.layer_norm(x, x.shape[-1:], ln[0].float(), ln[1].float(), 1e-3)
    return F.normalize(x, dim=-1) if case.normalize else x


def plain(case: Case, x: Inputs, *, compiled: bool) -> Callable[[], None]:
    def stored(hidden, lengths, weight, bias, ln):
        rows = plain_rows(case, hidden, lengths, weight, bias, ln)
        if case.stored == "f32":
            return rows, None, None
        if case.stored == "bf16":
            low = rows.bfloat16()
            return low, None, torch.linalg.vector_norm(rows - low.float(), dim=-1)
        scale = (rows.abs().amax(-1) / 127).clamp(min=2.0**-100)
        low = (rows / scale[:, None]).round().clamp(-127, 127)
        lost = torch.linalg.vector_norm(rows - low * scale[:, None], dim=-1)
        return low.to(torch.int8), scale, lost

    run = torch.compile(stored) if compiled else stored

    def call() -> None:
        rows, scale, residual = run(x.hidden, x.lengths, x.weight, x.bias, x.ln)
        x.out[x.row_ids] = rows
        if scale is not None:
            x.scale[x.row_ids] = scale
        if residual is not None:
            x.residual_norm[x.row_ids] = residual

    return call


def check(case: Case, x: Inputs, call: Callable[[], None]) -> float:
    """Its largest error against float64, relative to the largest value; raises if it is wrong."""

    def double(t):
        return None if t is None else t.double()

    truth = embed_rows_reference(
        double(x.hidden), x.lengths, False, case.pooling == "mean", double(x.weight), double(x.bias),
        1e-3 if x.ln else None, *(map(double, x.ln) if x.ln else (None, None)), case.normalize,
    )  # fmt: skip
    x.out.zero_()
    call()
    got = x.out[x.row_ids].double()
    if x.scale is not None:
        got *= x.scale[x.row_ids].double()[:, None]
    error = ((got - truth).abs().max() / truth.abs().max()).item()
    if not error < {"f32": 1e-5, "bf16": 5e-3, "int8": 5e-3}[case.stored]:
        raise AssertionError(f"{case.name}: off by {error:.1e} of the largest value")
    return error


def seconds_of(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def time_together(
    calls: dict[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each call; the calls take turns. Two untimed calls each come first."""
    for call in (*calls.values(), *calls.values()):
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    return seconds


def memory_rate(device: str) -> Callable[[], object]:
    values = torch.ones(64 << 20, device=device)
    return values.sum


def encoder_call(case: Case, device: str) -> Callable[[], object]:
    """The trunk on ENCODER_ROWS rows of the pack that the epilogue follows."""
    from realm_fast.encoder import load_trunk
    from realm_fast.packing import TokenBatch

    trunk = load_trunk(case.trunk, mlm_head=False, vocab_size=30522).eval().to(device)
    ids = torch.randint(1000, 2000, (ENCODER_ROWS, case.tokens), device=device)
    batch = TokenBatch(ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
    precision = TYPES[case.dtype]

    def run() -> object:
        with (
            torch.inference_mode(),
            torch.autocast(device, torch.bfloat16, enabled=precision == torch.bfloat16),
        ):
            return trunk(batch)

    return run


def run_case(case: Case, device: str, repeats: int, with_encoder: bool, compile_too: bool) -> list[dict]:
    x = make_inputs(case, device)
    calls = {OURS: ours(case, x), "torch": plain(case, x, compiled=False)}
    if compile_too:
        calls["torch.compile"] = plain(case, x, compiled=True)
    errors = {}
    for name, call in list(calls.items()):
        try:
            errors[name] = check(case, x, call)
        except Exception as error:
            if name != "torch.compile" or isinstance(error, AssertionError):
                raise
            print(f"torch.compile left out: {str(error).splitlines()[0]}", file=sys.stderr)
            del calls[name]
    read = memory_rate(device)
    seconds = time_together({**calls, "read": read}, repeats, device)
    rate = (64 << 20) * 4 / statistics.median(seconds.pop("read"))
    encoder = None
    if with_encoder:
        run = encoder_call(case, device)
        run()
        encoder = statistics.median(seconds_of(run, device) for _ in range(3)) * case.rows / ENCODER_ROWS
    own = statistics.median(seconds[OURS])
    rows = []
    for name, values in seconds.items():
        quartiles = statistics.quantiles(values, n=4)
        median = statistics.median(values)
        rows.append({
            **asdict(case), "implementation": name, "error": errors[name], "median_us": median * 1e6,
            "quartiles_us": [quartiles[0] * 1e6, quartiles[2] * 1e6], "times_ours": median / own,
            "least_bytes": case.least_bytes, "share_of_read_rate": case.least_bytes / median / rate,
            "read_gb_per_s": rate / 1e9, "share_of_encoder": None if encoder is None else median / encoder,
        })  # fmt: skip
    return rows


def print_rows(rows: list[dict]) -> None:
    case = rows[0]
    print(
        f"\n{case['name']}: {case['rows']} x {case['tokens']} tokens, {case['pooling']}, H={case['hidden']} "
        f"D={case['dim'] or case['hidden']}, {case['dtype']} to {case['stored']}, "
        f"{case['least_bytes'] / 1e6:.1f} MB at least, memory read at {case['read_gb_per_s']:.1f} GB/s"
    )
    for row in rows:
        low, high = row["quartiles_us"]
        share = "" if row["share_of_encoder"] is None else f"{row['share_of_encoder']:>9.3%} of the encoder"
        print(
            f"  {row['implementation']:14}{row['median_us']:>10.0f} us ({low:.0f}-{high:.0f})"
            f"{row['times_ours']:>7.2f} x ours{row['share_of_read_rate']:>7.0%} of the read rate{share}",
            flush=True,
        )


def tune() -> None:
    """Measures every candidate configuration on the GPU at hand and prints what CONFIGS would say."""
    from realm_fast.kernels import embed_epilogue as kernels

    if not torch.cuda.is_available():
        raise SystemExit(
            "--tune measures on a GPU, and torch finds none here (torch.cuda.is_available() is False)."
        )
    if kernels.UNAVAILABLE is not None:
        raise SystemExit(f"--tune: {kernels.UNAVAILABLE}")
    backend = "hip" if torch.version.hip else "cuda"
    target = kernels.target_of(backend, torch.cuda.get_device_capability()[0])
    for mean, project in ((True, True), (True, False), (False, True), (False, False)):
        shape = Case(
            "tune", 128, 128, 768, 128 if project else 0, "mean" if mean else "cls", True, False, "bf16"
        )
        x = make_inputs(shape, "cuda")

        def call(config: kernels.Config, x: Inputs = x, shape: Case = shape, mean: bool = mean) -> None:
            kernels.launch(
                x.hidden, x.lengths, x.row_ids, x.weight, x.bias, *x.ln, x.out, None, None, None,
                ragged=False, mean=mean, ln_eps=1e-3, normalize=False, dim=shape.width,
                num_out_rows=len(x.out), config=config,
            )  # fmt: skip

        measured = []
        for config in kernels.candidates(mean, project):
            try:
                times = [seconds_of(lambda config=config: call(config), "cuda") for _ in range(22)][2:]
            except Exception as error:  # a configuration may ask for more shared memory than the part has
                print(f"  {config}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            measured.append((statistics.median(times), config))
        measured.sort(key=lambda pair: pair[0])
        table = kernels.config_for(target, mean, project, shape.width)
        own = next((t for t, config in measured if config == table), None)
        print(f"({target!r}, {mean}, {project}): {measured[0][1]},  # {measured[0][0] * 1e6:.1f} us", end="")
        print("" if own is None else f"; the table's choice: {own * 1e6:.1f} us")


def machine(device: str) -> dict[str, object]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None, "levels": cpu_features()["levels"],
        "torch": torch.__version__, "compiler": build_info()["compiler"], "date": date.today().isoformat(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench_embed_epilogue", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="three cases, without the encoder and torch.compile"
    )
    parser.add_argument("--repeats", type=int, default=0, help="timed calls of each (0: 50; quick: 15)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's default)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-encoder", action="store_true", help="do not time the encoder beside it")
    parser.add_argument(
        "--tune", action="store_true", help="measure every Triton configuration (needs a GPU)"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/...; quick: none)")
    options = parser.parse_args(argv)
    if options.tune:
        tune()
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here (torch.cuda.is_available() is False).")
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(machine(options.device)))
    rows: list[dict] = []
    for case in [CASES[0], CASES[2], CASES[4]] if options.quick else CASES:
        with_encoder = not (options.quick or options.no_encoder)
        found = run_case(
            case,
            options.device,
            options.repeats or (15 if options.quick else 50),
            with_encoder,
            not options.quick,
        )
        print_rows(found)
        rows += found
    name = machine(options.device)["gpu" if options.device == "cuda" else "cpu"].replace(" ", "-")
    stem = f"embed_epilogue-{name}-{torch.get_num_threads()}t-{date.today()}"
    out = options.out or (None if options.quick else RESULTS / f"{stem}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(options.device), "rows": rows}, indent=1) + "\n")
        print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
