import pytest

from simt.harness import Harness, unsupported_reason
from simt.scans import SOURCES, searcher


@pytest.fixture(scope="session")
def harness(request):
    reason = unsupported_reason()
    if reason:
        pytest.skip(reason)
    return Harness(request.config.cache.mkdir("simt"))


@pytest.fixture(scope="session")
def program(harness):
    """The real sources of csrc/mips_topk."""
    return harness.build("drive_mips_topk.cpp", SOURCES)


@pytest.fixture(scope="session")
def search(harness, program):
    return searcher(harness, program)
