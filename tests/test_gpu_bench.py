"""The GPU's check and benchmark commands: what they say without a GPU, and their machinery on a CPU.

On a CPU in the GPU's place our CUDA calls fail, which a benchmark must survive: one failing method, peers that
are not installed, a case without memory, and the time being up are lines in the result, not its end.
"""

import json
import sys
import time

import pytest
import torch
from realm_fast.benchmarks.gpu import bench, check, environment, peers

SEARCH = bench.Search("float32", 5, 700, 16, 4)
LOSS = bench.Loss(3, 1, 4, 16, 50)


class Cpu(bench.Gpu):
    device = "cpu"

    def free_bytes(self):
        return 1 << 30

    def synchronize(self):
        pass

    def release(self):
        pass

    def timed_ms(self, call):
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)

    def extra_bytes(self, call):
        call()
        return 0


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(bench, "limits", lambda gpu: {"bandwidth": 1e10, "bf16_flops": 1e11})


@pytest.mark.parametrize(("command", "name"), [(check.main, "gpu-check"), (bench.main, "gpu-bench")])
def test_without_a_gpu_they_end_with_2_and_say_why(command, name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "missing", lambda: ["no GPU is visible", "the driver is too old"])
    assert command(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{name} cannot go on:\n  - no GPU is visible\n  - the driver is too old\n" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_reasons_on_this_machine_are_not_empty():
    assert environment.missing()
    assert check.main([]) == bench.main(["--quick"]) == 2


@pytest.mark.parametrize("command", [check.main, bench.main])
def test_unknown_arguments_and_help(command, capsys):
    for arguments, code in ((["--cases", "3"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as raised:
            command(arguments)
        assert raised.value.code == code


def test_a_failing_method_and_missing_peers_do_not_end_a_case(tmp_path, capsys):
    assert bench.run([SEARCH, LOSS], 3, tmp_path, Cpu()) == 1  # none of ours could run
    results = json.loads((tmp_path / "bench.json").read_text())
    search, loss = results["cases"]
    assert list(search["methods"]) == ["torch mm + topk"]
    assert search["compared_with"] == "torch mm + topk"
    assert "the tensors are on cpu" in search["left_out"]["realm_fast"] or search["left_out"]["realm_fast"]
    assert search["left_out"]["FlashLib flash_knn (L2)"].startswith("not available: ModuleNotFoundError")
    assert search["bytes"] == 700 * 16 * 4
    assert search["flops"] == 2 * 5 * 700 * 16
    assert "torch" in loss["methods"]
    assert loss["left_out"]["Liger"].startswith(("not available", "failed"))
    table = (tmp_path / "bench.md").read_text()
    assert table == capsys.readouterr().out[-len(table) - 1 : -1]
    assert all(row.count("|") == 8 for row in table.splitlines() if row.startswith("|"))


def test_answers_are_compared_and_a_method_may_fail_late(monkeypatch, tmp_path):
    calls = {"fragile": 0}

    def fragile():
        calls["fragile"] += 1
        if calls["fragile"] == 3:
            raise RuntimeError("out of luck\nsecond line")
        return torch.ones(2, 2), None

    methods = {
        "realm_fast": lambda: (torch.tensor([[4.0, 2.0]]), None),
        "wrong": lambda: (torch.tensor([[4.0, 1.0]]), None),
        "other metric" + peers.L2: lambda: (torch.zeros(7), None),
        "fragile": fragile,
        "absent": "not available: ImportError: no such library",
    }
    monkeypatch.setattr(bench, "prepare", lambda case, gpu: ({"case": "c", "bytes": 1, "flops": 1}, methods))
    assert bench.run([SEARCH], 4, tmp_path, Cpu()) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert row["methods"]["wrong"]["worst_difference"] == 0.25
    assert set(row["methods"]) == {"realm_fast", "wrong", "other metric" + peers.L2}
    assert row["left_out"] == {
        "absent": "not available: ImportError: no such library",
        "fragile": "failed: RuntimeError: out of luck",
    }
    for measured in row["methods"].values():
        assert measured["min_ms"] <= measured["median_ms"] <= measured["max_ms"]


def test_a_case_that_cannot_be_prepared_and_the_time_being_up(monkeypatch, tmp_path):
    def prepare(case, gpu):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

    monkeypatch.setattr(bench, "prepare", prepare)
    assert bench.run([SEARCH], 1, tmp_path, Cpu()) == 1
    assert "Tried to allocate 64 GiB" in (tmp_path / "bench.md").read_text()
    monkeypatch.setattr(bench, "BUDGET_S", -1.0)
    bench.run([SEARCH, LOSS], 1, tmp_path, Cpu())
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["cases"] == []
    assert [line.rsplit(": ", 1)[1] for line in results["not_run"]] == ["the time was up"] * 2


def test_the_index_shrinks_to_what_the_memory_holds():
    class Small(Cpu):
        def free_bytes(self):
            return 100_000

    row, _ = bench.prepare(SEARCH, Small())
    assert row["bytes"] == int(100_000 * 0.6 / (16 * 8 + 64)) * 16 * 4


def test_torch_topk_over_chunks_is_topk():
    queries, blocks = torch.randn(3, 8), torch.randn(100, 8)
    scores, ids = peers.torch_topk(queries, blocks, 7, chunk=5)
    want = (queries @ blocks.T).topk(7)
    torch.testing.assert_close(scores, want.values)
    assert torch.equal(ids, want.indices)


def test_check_reports_every_step_and_fails_if_one_does(tmp_path, capsys, monkeypatch):
    def python(code):
        return [sys.executable, "-c", code]

    steps = [("good", python("")), ("bad", python("raise SystemExit(3)")), ("good too", python(""))]
    assert check.run_steps(steps, tmp_path, notes=["a tool was not found"]) == 1
    results = json.loads((tmp_path / "check.json").read_text())
    assert [(s["step"], s["passed"], s["why"]) for s in results["steps"]] == [
        ("good", True, ""), ("bad", False, "exit code 3"), ("good too", True, ""),
    ]  # fmt: skip
    assert "Left out: a tool was not found." in (tmp_path / "check.md").read_text()
    assert check.run_steps(steps[:1], tmp_path, notes=[]) == 0
    monkeypatch.setattr(check, "BUDGET_S", 1.0)
    slow = [("slow", python("import time; time.sleep(60)")), ("after", python(""))]
    assert check.run_steps(slow, tmp_path, notes=[]) == 1
    assert [s["passed"] for s in json.loads((tmp_path / "check.json").read_text())["steps"]] == [False, None]
