from pathlib import Path

import pytest
from realm_fast.benchmarks.gpu import environment

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    here = [item for item in items if HERE in item.path.parents]
    reasons = environment.missing() if here else []
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reasons:
            item.add_marker(pytest.mark.skip(reason="; ".join(reasons)))
