"""The refresh benchmark: its arithmetic, a small run of it, and how its suites are named."""

import argparse
import json

import numpy as np
import pytest
import torch
from model_world import make_embedder, make_store, one_thread, real_documents  # noqa: F401
from realm_fast.benchmarks import bench_refresh
from realm_fast.benchmarks import refresh_throughput as bench
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from realm_fast.bench import run_benchmark
from realm_fast.packing import Row, pad_batch


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("bench_refresh"), real_documents(20))


def embedder_of(store, pooling="mean"):
    return make_embedder(store, pooling=pooling, projection="none", layer_norm=False, embedding_dim=16)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_operations_are_those_a_counter_sees(store, pooling):
    embedder = embedder_of(store, pooling).eval()
    batch = pad_batch([Row(np.full(12, 5, np.int32), np.zeros(12, np.uint8))] * 3, 0, 4)
    # As plain products, because the counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        embedder.block_side.pooled_states(batch)
    assert bench.trunk_operations(embedder, np.full(3, 12)) == counter.get_total_flops()


def test_overlap_counts_shared_results():
    queries = torch.eye(20)[:1]
    expected = torch.zeros(20, 20)
    expected[:, 0] = torch.arange(20.0)
    assert bench.overlap(queries, expected, expected) == 1.0
    shifted = expected.clone()
    shifted[:3, 0] = 100.0  # three strangers push three of the ten out
    assert bench.overlap(queries, shifted, expected) == pytest.approx(0.7)


def test_a_small_run(store, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"question": f"who was {w}", "answer": ["x"]}) + "\n" for w in ("first", "last"))
    )
    options = argparse.Namespace(
        slices=2, slice_blocks=10, token_budget=256, dtype="int8", bfloat16=True, pooling="mean",
        questions=str(questions), num_questions=0, trunk="small", arms=None,
    )  # fmt: skip
    result = bench.measure(embedder_of(store), store, options)
    assert result["blocks"] == 20
    by_arm = {row["arm"]: row for row in result["rows"]}
    assert {"float32, packed", "float32, padded", "bfloat16, packed", "transformers, batches of 32"} <= set(
        by_arm
    )
    for name, row in by_arm.items():
        assert len(row["slice_blocks_per_s"]) == 2
        if name.startswith("float32") or "transformers" in name:
            assert row["overlap_at_10"] == 1.0
            assert row["largest_error"] < 1e-5
    assert by_arm["float32, packed"]["padding_waste"] == 0
    assert by_arm["transformers, batches of 32"]["padding_waste"] > 0.1
    page = tmp_path / "page.md"
    page.write_text("\n".join(["before", bench.MARKS[0], "old", bench.MARKS[1], "after"]))
    bench.put_between_marks(page, bench.as_markdown(result))
    assert page.read_text().startswith(f"before\n{bench.MARKS[0]}\n")
    assert page.read_text().endswith(f"{bench.MARKS[1]}\nafter")
    assert "| float32, packed |" in page.read_text()
    assert "old" not in page.read_text()
    bench.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_chosen_arms_and_unknown_ones(store, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "who", "answer": ["x"]}\n')
    options = argparse.Namespace(
        slices=1, slice_blocks=5, token_budget=256, dtype="float32", bfloat16=True, pooling="cls",
        questions=str(questions), num_questions=0, trunk="small", arms=["bfloat16, packed"],
    )  # fmt: skip
    result = bench.measure(embedder_of(store, "cls"), store, options)
    assert [row["arm"] for row in result["rows"]] == ["float32, packed", "bfloat16, packed"]
    assert result["left_out"]["float32, padded"] == "not among --arms"
    options.arms = ["float16"]
    with pytest.raises(SystemExit, match="--arms: expected some of"):
        bench.measure(embedder_of(store, "cls"), store, options)


def test_a_range_beyond_the_corpus_is_refused(store):
    options = argparse.Namespace(slices=3, slice_blocks=1000)
    with pytest.raises(SystemExit, match=f"the corpus has {len(store)} blocks only"):
        bench.measure(embedder_of(store), store, options)


def test_suites_by_name(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(bench, "main", calls.append)
    run_benchmark("refresh", ["throughput", "--quick"])
    assert calls == [["--quick"]]
    run_benchmark("refresh", ["--help"])
    assert "throughput" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="one of the suites throughput, training first, got 'speed'"):
        bench_refresh.main(["speed"])
