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
    rows = []

    def on_case(some):
        bench.print_case(some)
        rows.extend(some)

    bench.run_cases(cases, methods, blocks, queries, 1, budget_s=0.0, limit_s=5.0, on_case=on_case)
    assert [row.method for row in rows] == methods * 2
    for row in rows:
        assert row.note == ""
        assert len(row.seconds) == 3
        assert 0 < row.limit_seconds < 1
    record = bench.merged(None, roofline.measure(1, seconds=0.01, repeats=1), rows)
    json.dumps(record, allow_nan=False)
    assert "| normal | 700 | 16 | 3 | 9 |" in bench.markdown(record)
    bench.plot(*bench.rows_of(record), tmp_path, "here")
    for name in ("roofline", "peers"):
        assert (tmp_path / f"mips_topk_{name}_here.png").stat().st_size > 1000
    assert "realm_fast int8" in capsys.readouterr().out


def test_a_machine_without_a_place_in_the_page_is_named(tmp_path, monkeypatch):
    page = tmp_path / "docs" / "ops" / "mips_topk.md"
    page.parent.mkdir(parents=True)
    page.write_text("before\n<!-- results here: begin -->\nold\n<!-- results here: end -->\nbehind\n")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    bench.write_docs("new", "here")
    assert page.read_text() == (
        "before\n<!-- results here: begin -->\n\nnew\n<!-- results here: end -->\nbehind\n"
    )
    with pytest.raises(SystemExit, match="results elsewhere: begin"):
        bench.write_docs("new", "elsewhere")


def test_runs_add_up_in_one_results_file():
    def limits(peak):
        return roofline.Limits(2, dict.fromkeys(roofline.KINDS, peak), peak)

    def row(suite, queries, seconds):
        return bench.Row(bench.Case(suite, "normal", 700, 16, queries, 3), "numpy", [seconds], 0.5, 1.0)

    first = bench.merged(None, limits(2.0), [row("k", 1, 3.0), row("headline", 8, 4.0)])
    failed = bench.Row(bench.Case("headline", "normal", 700, 16, 1, 3), "faiss", note="absent")
    both = bench.merged(json.loads(json.dumps(first)), limits(1.0), [row("headline", 8, 5.0), failed])
    rows, best = bench.rows_of(json.loads(json.dumps(both, allow_nan=False)))
    assert best == limits(2.0)
    found = [(r.case.suite, r.case.queries, r.method, r.seconds) for r in rows]
    assert found == [("headline", 1, "faiss", []), ("headline", 8, "numpy", [5.0]), ("k", 1, "numpy", [3.0])]
    assert rows[0].note == "absent"


def test_verdicts_name_the_worst_case():
    def row(method, queries, k, seconds, suite="k"):
        return bench.Row(bench.Case(suite, "normal", 1000, 128, queries, k), method, [seconds], 0.9)

    rows = [row("faiss", 64, 10, 20.0), row("faiss threshold", 64, 10, 4.0)]
    rows += [row("realm_fast float32", 64, 10, 1.0), row("realm_fast float32", 64, 100, 1.1)]
    rows += [row("realm_fast float32", 8, 10, 1.2), row("realm_fast float32", 8, 100, 1.8)]
    rows += [row("realm_fast int8", 64, 10, 1.0)]
    table = "\n".join(bench.verdicts(rows))
    assert "| float32, B = 64: 70% of the limit | 90% (normal, D = 128, k = 10, B = 64) | yes |" in table
    assert "| float32, B = 1 and 8: 90% of the limit | 75% (normal, D = 128, k = 10, B = 8) | no |" in table
    assert (
        "| float32, B = 64: 10 x default faiss | 20.00 x (normal, D = 128, k = 10, B = 64) | yes |" in table
    )
    assert "| int8, certified: 5 x tuned faiss | 4.00 x (normal, D = 128, k = 10, B = 64) | no |" in table
    assert "at most 15% slower than k = 10 | +50% (normal, D = 128, k = 100, B = 8) | no |" in table
    assert "bfloat16" not in table


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


def test_a_process_that_was_killed_is_closed_quietly(small, tmp_path):
    blocks, queries = small
    np.save(tmp_path / "blocks.npy", blocks)
    np.save(tmp_path / "queries.npy", queries)
    worker = bench.Worker("numpy", tmp_path / "blocks.npy", tmp_path / "queries.npy", 1)
    assert worker.problem == ""
    worker.process.kill()
    worker.process.wait()
    for _ in range(2):
        assert worker.ask(queries=1, k=3) == {"error": "its process ended (SIGKILL)"}
    worker.close()


def test_limits_are_plausible():
    limits = roofline.measure(1, seconds=0.02, repeats=1)
    assert all(1e8 < limits.operations[kind] < 1e14 for kind in roofline.KINDS)
    assert 1e8 < limits.read_bytes < 1e12
    assert limits.seconds("float32", limits.operations["float32"] * 2, 0) == pytest.approx(2)
