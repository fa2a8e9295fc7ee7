"""What the tests of several ops share."""

import pytest

from realm_fast import _native


@pytest.fixture(params=_native.available_cpu_levels())
def cpu_level(request):
    _native.force_cpu_level(request.param)
    yield request.param
    _native.force_cpu_level("")
