import pytest

from simt.harness import Harness, unsupported_reason


@pytest.fixture(scope="session")
def harness(request):
    reason = unsupported_reason()
    if reason:
        pytest.skip(reason)
    return Harness(request.config.cache.mkdir("simt"))
