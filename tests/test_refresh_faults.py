"""Refresh under fire: killed, starved, corrupted and deceived 200 times, it never serves a wrong answer."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_no_fault_makes_it_serve_what_is_not_one_complete_snapshot(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(TESTS / "refresh_faults.py"), str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=900, check=False,
    )  # fmt: skip
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "200 injections" in result.stdout
