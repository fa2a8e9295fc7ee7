"""The benchmark of linear_marginal_cross_entropy: it must notice wrong values, and join parts of its table."""

import json

import pytest
from realm_fast.benchmarks import bench_linear_marginal_ce as bench


def test_right_values_pass_and_wrong_ones_are_named():
    case = bench.Case(8, 40, "f32", candidates=2, positions=3)
    errors = bench.check_values(case, {bench.OURS: bench.ours(), "eager": bench.eager})
    assert set(errors) == {bench.OURS, "eager"}
    assert set(errors["eager"]) == {"loss", "hidden", "weight", "scores", "bias"}

    def wrong(hidden, weight, bias, labels, scores):
        loss = bench.eager(hidden, weight, bias, labels, scores)
        return loss + 1e-3 * (scores - scores.detach()).sum()  # the right loss, a wrong gradient

    with pytest.raises(AssertionError, match=r"almost: scores of Case\(width=8, .* is off by"):
        bench.check_values(case, {"almost": wrong})


def test_parts_of_the_table_are_joined(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "implementations", lambda: {bench.OURS: bench.ours(), "eager": bench.eager})
    monkeypatch.setattr(bench, "SETTLE_SECONDS", 0)
    common = ["--width", "8", "--seconds", "0.01", "--no-memory"]
    first, second, joined = (tmp_path / f"{name}.json" for name in ("first", "second", "joined"))
    bench.main([*common, "--vocab", "40", "60", "--dtype", "f32", "--out", str(first)])
    bench.main([*common, "--vocab", "40", "--dtype", "f32", "bf16", "--only", "eager", "--out", str(second)])
    chart = tmp_path / "chart.png"
    pytest.importorskip("matplotlib")
    bench.main(["--merge", str(first), str(second), "--out", str(joined), "--plot", str(chart)])
    rows = json.loads(joined.read_text())["rows"]
    cases = {(row["vocab"], row["dtype"], row["pass"], row["implementation"]) for row in rows}
    assert len(rows) == len(cases) == 3 * 2 * 2
    later = json.loads(second.read_text())["rows"]
    assert all(row in rows for row in later)
    assert all(row["median_ms"] > 0 and row["least_cpu_ms"] > 0 for row in rows)
    assert chart.stat().st_size > 1000
    assert "B=8 K=8 M=10 H=8 V=60" in capsys.readouterr().out

    elsewhere = json.loads(second.read_text())
    elsewhere["machine"]["cpu"] = "another"
    second.write_text(json.dumps(elsewhere))
    with pytest.raises(ValueError, match="merge: expected parts of one machine, got cpu"):
        bench.main(["--merge", str(first), str(second), "--out", str(joined)])
