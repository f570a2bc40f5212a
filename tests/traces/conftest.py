from functools import partial

import pytest

from tests.traces.exports import imported_from


@pytest.fixture
def imported(tmp_path):
    return partial(imported_from, tmp_path)
