"""realm_fast.metrics: append-only, tolerant of a kill, resumable, mirrored to TensorBoard."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from realm_fast import metrics
from realm_fast.errors import CorruptArtifactError, DataError, DiskFullError, UserError
from realm_fast.metrics import MetricsLog, read_jsonl, read_metrics


def write_steps(path, steps, **more):
    with MetricsLog(path) as log:
        for step in steps:
            log.write({"step": step, "loss": step / 2, **more})


def test_records_come_back_as_written(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    records = [
        {"step": 10, "loss": 3.5, "skipped": {"no_span": 2}, "note": "naïve ✓"},
        {"step": 20, "loss": 1e-300, "list": [1, 2.5, None], "flag": True},
    ]
    with MetricsLog(path) as log:
        for record in records:
            log.write(record)
    assert read_metrics(path) == records
    assert path.read_text(encoding="utf-8").count("\n") == 2


def test_a_record_is_on_file_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1})
        assert read_metrics(path) == [{"step": 1}]


def test_numpy_and_tensor_numbers_and_non_finite_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(
            {
                "step": np.int64(3),
                "loss": torch.tensor(0.5),
                "rate": np.float32(0.25),
                "bad": float("nan"),
                "nested": {"worse": -np.inf, "n": np.int32(7)},
            }
        )
    assert read_metrics(path) == [
        {"step": 3, "loss": 0.5, "rate": 0.25, "bad": None, "nested": {"worse": None, "n": 7}}
    ]


@pytest.mark.parametrize("record", [{}, {"step": 1.0}, {"step": "1"}, {"step": True}, {"step": None}])
def test_a_record_without_a_whole_step_is_refused(tmp_path, record):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log, pytest.raises(UserError, match='whole number "step"'):
        log.write(record)
    assert path.read_bytes() == b""


def test_opening_again_continues(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    write_steps(path, [3])
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b'{"step": 3, "x": "\xc3', b"{", b"[1]", b"\x00\x00\x00"]
)
def test_a_torn_last_line_is_passed_over_and_removed_on_opening(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write_steps(path, [3])
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert path.read_bytes().startswith(whole)


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write_steps(path, [3])
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("bad", ["not json", "", "[1, 2]", '{"step": 2', "\ufffd", "{}", '{"step": 1.5}'])
def test_a_malformed_line_is_reported_with_its_number(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n', encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)
    with pytest.raises(CorruptArtifactError, match=r"metrics\.jsonl:2: "), MetricsLog(path) as log:
        log.truncate_after(1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: the answers does not exist"):
        read_jsonl(tmp_path / "absent.jsonl", "the answers")


def test_truncate_after_drops_only_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20, 30, 40])
    first_two = path.read_bytes().splitlines(keepends=True)[:2]
    with MetricsLog(path) as log:
        assert log.truncate_after(40) == 0
        assert log.truncate_after(29) == 2
        log.write({"step": 30, "loss": -1.0})
    assert path.read_bytes().splitlines(keepends=True)[:2] == first_two
    assert read_metrics(path)[2:] == [{"step": 30, "loss": -1.0}]


def test_a_process_killed_while_writing_leaves_whole_lines_and_at_most_one_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = (
        "import sys; from realm_fast.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1]); step = 0\n"
        "while True:\n    step += 1; log.write({'step': step, 'text': 'x' * 5000})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])
    try:
        deadline = time.monotonic() + 60
        while not path.exists() or path.stat().st_size < 100_000:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    steps = [record["step"] for record in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 19
    write_steps(path, [len(steps) + 1])
    assert len(read_metrics(path)) == len(steps) + 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_clear_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1})
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl: no space left"):
        log.write({"step": 2})
    assert read_metrics(path) == [{"step": 1}]


def test_numbers_reach_tensorboard_and_resume_purges(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path, folder = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    with MetricsLog(path, folder) as log:
        assert log.tensorboard
        for step in (1, 2, 3):
            log.write({"step": step, "loss": float(step), "skipped": {"no_span": step * 2}, "note": "text"})
    with MetricsLog(path, folder) as log:
        log.truncate_after(2)
        log.write({"step": 3, "loss": 30.0, "skipped": {"no_span": 60}, "bad": float("nan")})
    events = reader.EventAccumulator(str(folder)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "skipped/no_span"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [e.value for e in events.Scalars("skipped/no_span")] == [2.0, 4.0, 60.0]


def test_without_tensorboard_the_file_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_has_tensorboard", lambda: False)
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as log:
        assert not log.tensorboard
        log.write({"step": 1, "loss": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
    assert not (tmp_path / "tensorboard").exists()
