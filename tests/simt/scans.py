"""What the tests of the scans on the emulated machine share: tensors in, answers checked, sources changed."""

import re
import shutil
from dataclasses import replace

import numpy as np
import torch
from realm_fast.benchmarks.gpu import model

from realm_fast.device_index import DeviceIndex
from realm_fast.ops.mips_topk import mips_topk_reference
from realm_fast.types import TopK
from simt.harness import ROOT, in_parallel

SOURCES = sorted((ROOT / "csrc/mips_topk").glob("*.cu"))
TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMULATED = replace(model.H100, multiprocessors=4)
ORDERS = [
    {"order": "ascending"},
    {"order": "descending"},
    {"order": "random", "seed": 7, "yield_share": 0.003, "resident_blocks": 8},
]


def raw(tensor):
    """The tensor's storage as numpy sees it, rows with their padding."""
    rows = tensor if tensor._base is None else tensor._base
    rows = rows.contiguous()
    return rows.view(torch.int16).numpy() if rows.dtype in (torch.bfloat16, torch.float16) else rows.numpy()


def searcher(harness, program):
    """A function that runs the kernels on torch tensors; `blocks` may be a DeviceIndex."""

    def search(queries, blocks, k, exclude=None, program=program, **options):
        options.setdefault("num_seeds", 256)
        inputs = {"exclude_ids": None if exclude is None else exclude.numpy()}
        if isinstance(blocks, DeviceIndex):
            inputs |= {
                "queries": raw(queries), "blocks": raw(blocks.codes), "originals": raw(blocks.originals),
                "block_residual": raw(blocks.residual), "block_norm": raw(blocks.norm),
                "block_bounds": raw(blocks.bounds),
                "block_scale": raw(blocks.scale) if blocks.dtype == "int8" else None,
            }  # fmt: skip
            options = {
                "dtype": blocks.dtype,
                "block_stride": blocks.codes.stride(0),
                "original_stride": blocks.originals.stride(0),
            } | options
        else:
            inputs |= {"queries": raw(queries), "blocks": raw(blocks)}
            options["dtype"] = str(blocks.dtype).removeprefix("torch.")
            options.setdefault("block_stride", blocks.stride(0) if len(blocks) else blocks.shape[1])
        shape = (len(queries), k)
        return harness.run(
            program,
            inputs=inputs,
            outputs={"scores": (shape, np.float32), "ids": (shape, np.int64)},
            B=len(queries),
            N=len(blocks),
            D=queries.shape[1],
            k=k,
            query_stride=queries.stride(0) if len(queries) else queries.shape[1],
            exclude_width=0 if exclude is None else exclude.shape[1],
            **options,
        )

    return search


def integers(rng, shape, dtype, high=4):
    """Small whole numbers: every sum is exact in every order, so that answers can be compared bit by bit."""
    return torch.from_numpy(rng.integers(-high, high + 1, shape)).to(TORCH_TYPES[dtype])


def in_every_order(search, *arguments, **options):
    """The runs of one search, in each of ORDERS."""
    return in_parallel(lambda order: search(*arguments, **options, **order), ORDERS)


def assert_answer(run, queries, blocks, k, exclude=None):
    assert run.raised == ""
    assert run.returncode == 0, run.stderr
    assert_same(run, mips_topk_reference(queries.double(), blocks.double(), k, exclude_ids=exclude))


def assert_same(run, want):
    """The ids and the scores of `want`, bit for bit, and nothing to report."""
    assert run.errors == [], run.options
    np.testing.assert_array_equal(run.arrays["ids"], want.ids.numpy(), run.options)
    np.testing.assert_array_equal(run.arrays["scores"], want.scores.float().numpy(), run.options)


def answer_of(run):
    assert run.errors == [], run.options
    return TopK(torch.from_numpy(run.arrays["scores"]), torch.from_numpy(run.arrays["ids"]))


def noticed(run, queries, blocks, k):
    """Whether the checks or the answer give a fault away."""
    if run.kinds:
        return True
    want = mips_topk_reference(queries.double(), blocks.double(), k)
    same = np.array_equal(run.arrays["ids"], want.ids.numpy())
    return not (same and np.array_equal(run.arrays["scores"], want.scores.float().numpy()))


def barrier_lines(*files):
    """Every block barrier of these sources of csrc/mips_topk: (file, line number)."""
    for name in files:
        for number, line in enumerate((ROOT / "csrc/mips_topk" / name).read_text().splitlines(), 1):
            if "__syncthreads" in line:
                yield name, number


def build_changed(harness, folder, sources, changes):
    """The search with `changes` made to its sources, a list of (file below csrc, pattern, replacement).

    `sources`, names in csrc/mips_topk, are compiled again; the others are linked unchanged, after those.
    """
    for part in ("mips_topk", "core"):
        ignore = shutil.ignore_patterns("*.cpp", "*.inl")
        shutil.copytree(ROOT / "csrc" / part, folder / part, ignore=ignore)
    for file, pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, (folder / file).read_text())
        assert count >= 1, f"{pattern!r} no longer matches {file}"
        (folder / file).write_text(text)
    changed = [folder / "mips_topk" / name for name in sources]
    kept = [path for path in SOURCES if path.name not in sources]
    return harness.build("drive_mips_topk.cpp", [*changed, *kept], changed=folder)
