"""The benchmark of training under a refresh, from end to end on a world of sixty countries."""

import json

import pytest
import torch
from realm_fast.benchmarks import bench_refresh_training as bench

from tests import qa_world

SETTINGS = (
    "masking.strategy=random_token", "masking.random_token_rate=0.3", "pretrain.batch_queries=4",
    "pretrain.num_candidates=3", "pretrain.embedder_lr=3e-3", "pretrain.illustrations=0",
    "pretrain.checkpoint_every_steps=1000", "pretrain.log_every_steps=5", "evaluate.held_out_queries=4",
    "refresh.shard_blocks=48", "refresh.drift_every_steps=0", "refresh.drift_sample_blocks=20",
)  # fmt: skip


@pytest.fixture
def work(tmp_path, monkeypatch):
    store = qa_world.make_store(tmp_path, count=60)
    monkeypatch.setattr(bench, "settings", lambda *more: qa_world.settings(tmp_path, *SETTINGS, *more))
    monkeypatch.setattr(bench, "corpus", lambda work, config: store)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def run(work, suite, *options):
    out = work / f"{suite}.json"
    bench.main(["--suites", suite, "--work", str(work), "--threads", "1", "--json", str(out), *options])
    return json.loads(out.read_text())


def test_steps_are_timed_and_their_parts_are_parts_of_them(work, capsys):
    found = run(work, "steps", "--steps", "4")
    assert {mode: len(times) for mode, times in found["steps_s"].items()} == dict.fromkeys(
        ("off", "thread", "process"), 2 * 3
    )
    assert set(found["waited_s"].values()) == {0.0}
    assert found["spent_s"]["off"]["hand over"] == []
    assert found["spent_s"]["thread"]["hand over"]
    assert found["spent_s"]["process"]["hand over"]
    shares = found["shares"]
    assert 0 < shares["index search"] < shares["search and choice of candidates"] < 1
    assert 0 < shares["marginal loss"] < 1
    assert "| process |" in capsys.readouterr().out


def test_searches_go_on_while_snapshots_are_swapped(work):
    found = run(work, "latency", "--seconds", "0.5")
    assert all(0 < arm["p50_ms"] <= arm["p99_ms"] <= arm["worst_ms"] for arm in found["arms"].values())
    assert found["arms"]["thread, publish_every_shards=0, B=1"]["swaps"] > 0
    assert found["arms"]["off, publish_every_shards=0, B=1"]["swaps"] == 0


def test_a_recorded_course_is_replayed(work):
    assert run(work, "trajectory", "--steps", "141")["ticks"] == 15
    found = run(work, "schedules")
    for rows in list(found["regimes"].values())[:2]:
        assert (
            len({row["blocks_embedded"] for row in rows.values() if "never" not in row["arm"]["name"]}) == 1
        )
    assert all(pair["estimate"] >= pair["true"] - 1e-9 for pair in found["estimate"]["pairs"])
    assert all(curve[-1] == 1.0 for curve in found["partial"]["curves"].values())


def test_a_run_leaves_its_time_line(work):
    found = run(
        work, "run", "--steps", "12", "--set", "refresh.mode=inline", "--set", "refresh.every_steps=4"
    )
    assert len(found["ends_s"]) == len(found["staleness"]) == 12
    assert [newest for newest, _ in found["staleness"]] == [s % 4 for s in range(12)]
    assert [step for _, step, _ in found["in_use_at"]] == [4, 8, 12]
    assert (work / "runs" / "run" / "pretrain" / "metrics.jsonl").exists()


def test_each_schedule_is_timed_with_its_own_means(work, monkeypatch):
    in_threads = ("refresh.mode=thread", *SETTINGS)  # quicker to start than processes
    monkeypatch.setattr(bench, "settings", lambda *more: qa_world.settings(work, *in_threads, *more))
    found = run(work, "mechanisms", "--steps", "22")["schedules"]
    assert set(found) == set(bench.MECHANISMS)
    assert all(len(one["step_s"]) == 22 and one["waited_s"] == 0 for one in found.values())
    assert found["plain"]["handovers"] == found["shard by shard"]["handovers"] == 1
    assert found["plain"]["checks_s"] == 0 < found["by drift"]["checks_s"]
    assert found["queries corrected"]["checks_s"] > 0
