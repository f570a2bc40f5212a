import pytest

from tests.providers.conversations import Bench


@pytest.fixture(scope="module")
def bench():
    bench = Bench()
    yield bench
    bench.close()
