"""The harness itself: right kernels pass in every order, and each planted fault is reported."""

import json
import subprocess

import pytest

from simt.harness import ENVIRONMENT, HERE

ORDERS = ["ascending", "descending", "random"]


@pytest.fixture(scope="module")
def run(harness):
    def run(case, fault=None, order="ascending", seed=1, build="hooks"):
        defines = (f"FAULT_{fault}",) if fault else ()
        program = harness.build("", [HERE / "selftest.cu"], build=build, defines=defines)
        done = subprocess.run(
            [program, case, order, str(seed)],
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


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("NO_BARRIER", "shared memory race"),
        ("NO_WAIT", "shared memory read before cp.async was waited for"),
        ("OFF_BY_ONE", "global memory out of bounds"),
        ("UNINITIALISED", "shared memory out of bounds"),
        ("DIVERGENT_BARRIER", "barrier divergence"),
        ("MISSED_BARRIER", "deadlock"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_planted_faults_are_reported(run, fault, kind, order):
    assert kind in run("sums", fault, order)["kinds"]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("NO_PROXY_FENCE", "wgmma reads a thread's stores without fence.proxy.async"),
        ("ONE_WAITS", "shared memory read before tma_load was waited for"),
        ("NO_ORDER_FENCE", "wgmma without wgmma.fence"),
        ("TOUCH", "accumulators written while wgmma is under way"),
        ("OVERWRITE", "shared memory race"),
    ],
)
def test_planted_faults_of_warpgroups_are_reported(run, fault, kind):
    for order in ORDERS:
        assert kind in run("warpgroup bf16", fault, order)["kinds"]


def test_a_missing_lock_shows_in_random_order(run):
    assert any(run("lock", "NO_LOCK", "random", seed)["error"] for seed in range(1, 6))


@pytest.mark.parametrize("fault", ["bf16_swapped_fragment", "bf16_swapped_matrix"])
def test_fragments_lie_where_ptx_puts_them(run, fault):
    """The products above are right with PTX's layout and wrong with two registers exchanged."""
    assert run(fault)["error"] > 0


def test_the_sanitizers_see_an_access_past_the_end(run):
    assert run("sums", build="sanitizers")["error"] == 0
    kinds = run("sums", "OFF_BY_ONE", build="sanitizers")["kinds"]
    assert any("AddressSanitizer" in kind for kind in kinds)


def test_bytes_are_counted(run):
    launch = run("sums")["launches"][0]
    assert launch["copy_bytes"] == (512 * 5 - 3) * 4
    assert launch["global_bytes_read"] == launch["copy_bytes"]
    assert launch["global_bytes_written"] == 5 * 4
    assert launch["atomics"] == 5
    assert launch["barriers"] == 2 * 5
