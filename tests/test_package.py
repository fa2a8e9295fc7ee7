"""The package as a whole: what importing it does, what it says about itself."""

import subprocess
import sys

import pytest

import realm_fast as rf


def python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_import_is_free():
    """No torch, no kernel, no random number, no thread, no file."""
    result = python(
        "import random, sys, threading; before = random.getstate()\n"
        "import realm_fast, realm_fast.cli\n"
        "assert random.getstate() == before\n"
        "assert threading.active_count() == 1\n"
        "heavy = {'torch', 'transformers', 'spacy', 'faiss', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there_and_nothing_else_is():
    for name in rf.__all__:
        assert getattr(rf, name) is not None
        assert name in dir(rf)
    assert set(rf._HOMES) == set(rf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'mips_topl'"):
        _ = rf.mips_topl


def test_using_the_ops_draws_no_random_number_and_needs_no_cuda_driver():
    result = python(
        "import torch, realm_fast as rf\n"
        "before = torch.get_rng_state()\n"
        "rf.mips_topk, rf.MipsIndex, rf.linear_marginal_cross_entropy\n"
        "assert torch.equal(before, torch.get_rng_state())\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert result.returncode == 0, result.stderr


def test_build_info_says_what_was_built():
    info = rf.build_info()
    assert info["version"] == rf.__version__
    assert info["cuda"] == bool(info["cuda_archs"])
    assert info["compiler"]


def test_cpu_features_and_a_forced_level():
    features = rf.cpu_features()
    assert features["levels"][0] == "generic"
    for level in features["levels"]:
        result = python("import realm_fast as rf; print(rf.cpu_features()['forced'])", REALM_FAST_CPU=level)
        assert result.stdout.strip() == level
    result = python(
        "import torch, realm_fast as rf; rf.mips_topk(torch.ones(1, 2), torch.ones(3, 2), 1)",
        REALM_FAST_CPU="avx9000",
    )
    assert result.returncode != 0
    assert "REALM_FAST_CPU: expected generic, avx2" in result.stderr
