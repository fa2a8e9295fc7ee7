"""Worker processes: results, errors that cross the pipe, large messages, death, and no main module."""

import os
import subprocess
import sys
import textwrap

import pytest

from realm_fast.errors import DiskFullError, RealmFastError
from realm_fast.workers import map_unordered

HELPERS = """
import errno, os, sys
from pathlib import Path
from realm_fast.files import disk_errors

def scale(factor):
    return lambda task: (task * factor, os.getpid(), "torch" in sys.modules)

def echo(_):
    return lambda task: task

def full(path):
    def do(task):
        with disk_errors(Path(path)):
            raise OSError(errno.ENOSPC, "No space left on device")
    return do

def odd(_):
    def do(task):
        raise LookupError(f"no {task}")
    return do

def unset(_):
    raise ValueError("cannot set up")

def die(_):
    return lambda task: os._exit(3)
"""


@pytest.fixture
def helpers(tmp_path, monkeypatch):
    (tmp_path / "worker_helpers.py").write_text(HELPERS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "worker_helpers"
    sys.modules.pop("worker_helpers", None)


def run(setup, argument, tasks, num_workers=2):
    return list(map_unordered(setup, argument, tasks, num_workers=num_workers, what="help"))


def test_every_task_is_done_once_in_other_processes_without_torch(helpers):
    results = run(f"{helpers}:scale", 3, range(20))
    assert sorted((task, value) for task, (value, _, _) in results) == [(i, 3 * i) for i in range(20)]
    assert 1 <= len({pid for _, (_, pid, _) in results} - {os.getpid()}) <= 2
    assert os.getpid() not in {pid for _, (_, pid, _) in results}
    assert not any(torch for _, (_, _, torch) in results)


def test_one_worker_is_this_process(helpers):
    assert [pid for _, (_, pid, _) in run(f"{helpers}:scale", 1, range(3), num_workers=1)] == [
        os.getpid()
    ] * 3


def test_messages_larger_than_a_pipe_holds_do_not_block(helpers):
    tasks = [bytes([i]) * 2_000_000 for i in range(6)]
    assert sorted(result for _, result in run(f"{helpers}:echo", None, tasks)) == tasks


def test_tasks_are_taken_only_as_workers_become_free(helpers):
    taken = []
    stream = map_unordered(
        f"{helpers}:scale", 1, (taken.append(i) or i for i in range(100)), num_workers=2, what="help"
    )
    next(stream)
    assert len(taken) <= 4
    stream.close()


def test_errors_cross_the_pipe(helpers):
    with pytest.raises(DiskFullError, match="no space left"):
        run(f"{helpers}:full", "/tmp/x", [1])
    with pytest.raises(RealmFastError, match="LookupError: no 1"):
        run(f"{helpers}:odd", None, [1])
    with pytest.raises(RealmFastError, match="ValueError: cannot set up"):
        run(f"{helpers}:unset", None, [1])


def test_a_worker_that_dies_is_reported(helpers):
    with pytest.raises(RealmFastError, match=r"a process that was to help died \(exit code 3\)"):
        run(f"{helpers}:die", None, [1, 2, 3])


def test_the_callers_main_module_is_not_run_again(helpers, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys
            sys.path.insert(0, {str(tmp_path)!r})
            print("main runs")
            from realm_fast.workers import map_unordered
            print(len(list(map_unordered("{helpers}:scale", 2, range(5), num_workers=2, what="help"))))
        """),
        encoding="utf-8",
    )
    for command in ([sys.executable, str(script)], [sys.executable, "-"]):
        stdin = script.read_text(encoding="utf-8") if command[1] == "-" else ""
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.split("\n")[:2] == ["main runs", "5"]
