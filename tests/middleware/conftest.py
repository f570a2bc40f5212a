import pytest

from tests.middleware.helpers import make_tools


@pytest.fixture
def ran():
    return []


@pytest.fixture
def tools(ran):
    return make_tools(ran)
