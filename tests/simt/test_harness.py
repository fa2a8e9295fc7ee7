"""The harness itself: right kernels pass in every order, and each planted fault is reported."""

import json
import subprocess

import pytest

from simt.harness import ENVIRONMENT, HERE

ORDERS = ["ascending", "descending", "random"]


@pytest.fixture(scope="module")
def run(harness):
    def run(case, fault="", order="ascending", seed=1, build="hooks"):
        program = harness.build("", [HERE / "selftest.cu"], build=build)
        done = subprocess.run(
            [program, case, order, str(seed), fault],
            capture_output=True,
            text=True,
            timeout=60,
            env=ENVIRONMENT,
        )
        if done.returncode:
            return {"error": float("nan"), "kinds": {done.stderr}, "launches": []}
        answer = json.loads(done.stdout)
        kinds = {error["kind"] for error in answer["report"]["errors"]}
        return {"error": answer["error"], "kinds": kinds, "launches": answer["report"]["launches"]}

    return run


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ["sums", "bf16", "f16", "s8", "lock", "warpgroup bf16", "warpgroup f16"])
def test_right_kernels_pass(run, case, order):
    for seed in (1, 2, 3) if order == "random" else (1,):
        answer = run(case, order=order, seed=seed)
        assert answer["error"] == 0
        assert answer["kinds"] == set()


def test_a_launch_of_more_thread_blocks_than_there_can_be_is_refused(run):
    assert run("too many thread blocks")["error"] == 0


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("no barrier", "shared memory race"),
        ("no wait", "shared memory read before cp.async was waited for"),
        ("off by one", "global memory out of bounds"),
        ("past the end", "shared memory out of bounds"),
        ("divergent barrier", "barrier divergence"),
        ("missed barrier", "deadlock"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_planted_faults_are_reported(run, fault, kind, order):
    assert kind in run("sums", fault, order)["kinds"]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("no proxy fence", "wgmma reads a thread's stores without fence.proxy.async"),
        ("one waits", "shared memory read before tma_load was waited for"),
        ("no order fence", "wgmma without wgmma.fence"),
        ("touch", "accumulators written while wgmma is under way"),
        ("overwrite", "shared memory race"),
    ],
)
def test_planted_faults_of_warpgroups_are_reported(run, fault, kind):
    for order in ORDERS:
        assert kind in run("warpgroup bf16", fault, order)["kinds"]


def test_a_missing_lock_shows_in_random_order(run):
    assert any(run("lock", "no lock", "random", seed)["error"] for seed in range(1, 6))


@pytest.mark.parametrize("fault", ["bf16_swapped_fragment", "bf16_swapped_matrix"])
def test_fragments_lie_where_ptx_puts_them(run, fault):
    """The products above are right with PTX's layout and wrong with two registers exchanged."""
    assert run(fault)["error"] > 0


def test_the_sanitizers_see_an_access_past_the_end(run):
    assert run("sums", build="sanitizers")["error"] == 0
    kinds = run("sums", "off by one", build="sanitizers")["kinds"]
    assert any("AddressSanitizer" in kind for kind in kinds)


def test_bytes_are_counted(run):
    launch = run("sums")["launches"][0]
    assert launch["copy_bytes"] == (512 * 5 - 3) * 4
    assert launch["global_bytes_read"] == launch["copy_bytes"]
    assert launch["global_bytes_written"] == 5 * 4
    assert launch["atomics"] == 5
    assert launch["barriers"] == 2 * 5
