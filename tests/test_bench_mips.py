"""The benchmark of mips_topk: it must notice wrong answers, and run from end to end."""

import json

import numpy as np
import pytest
from realm_fast.benchmarks import bench_mips_topk as bench
from realm_fast.benchmarks import roofline


@pytest.fixture
def small():
    generator = np.random.default_rng(0)
    blocks = generator.standard_normal((700, 16), np.float32)
    return blocks, generator.standard_normal((9, 16), np.float32)


def answer(blocks, queries, k):
    scores = queries @ blocks.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, 1), ids


def test_right_answers_pass_and_wrong_ones_are_named(small):
    blocks, queries = small
    truth = bench.Truth(blocks, queries)
    scores, ids = answer(blocks, queries, 5)
    assert truth.judge(scores, ids, 5) == (1.0, "")
    wrong = ids.copy()
    wrong[7, 2] = answer(blocks, queries, 6)[1][7, 5]  # the sixth instead of the third
    found, problem = truth.judge(scores, wrong, 5)
    assert found < 1
    assert "query 7: not the top 5" in problem
    repeated = ids.copy()
    repeated[0, 1] = repeated[0, 0]
    assert truth.judge(scores, repeated, 5)[0] < 1
    assert "rounding" in truth.judge(scores + 1e-3, ids, 5)[1]


def test_methods_run_in_their_processes_and_are_compared(small, tmp_path, capsys):
    blocks, queries = small
    cases = [bench.Case("headline", "normal", 700, 16, b, 3) for b in (1, 9)]
    methods = ["realm_fast int8", "numpy"]
    rows = bench.run_cases(cases, methods, blocks, queries, 1, budget_s=0.0, limit_s=5.0)
    assert [row.method for row in rows] == methods * 2
    for row in rows:
        assert row.note == ""
        assert len(row.seconds) == 3
        assert 0 < row.limit_seconds < 1
    limits = roofline.measure(1, seconds=0.01, repeats=1)
    table = bench.markdown(rows, limits)
    assert "| normal | 700 | 16 | 3 | 9 |" in table
    bench.plot(rows, limits, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    json.dumps(bench._finite([row.seconds for row in rows]), allow_nan=False)
    assert "realm_fast int8" in capsys.readouterr().out


def test_a_method_that_cannot_start_says_so(small, tmp_path):
    blocks, queries = small
    case = bench.Case("headline", "normal", 700, 16, 1, 3)
    np.save(tmp_path / "queries.npy", queries)
    worker = bench.Worker("numpy", tmp_path / "absent.npy", tmp_path / "queries.npy", 1)
    assert "ended" in worker.problem or "absent" in worker.problem
    worker.close()
    truth = bench.Truth(blocks, queries)
    (row,) = bench._run_case(case, {"numpy": worker}, truth, 1, {}, tmp_path, 0.0, 1.0)
    assert row.note == worker.problem


def test_limits_are_plausible():
    limits = roofline.measure(1, seconds=0.02, repeats=1)
    assert all(1e8 < limits.operations[kind] < 1e13 for kind in roofline.KINDS)
    assert 1e8 < limits.read_bytes < 1e12
    assert limits.seconds("float32", limits.operations["float32"] * 2, 0) == pytest.approx(2)
