"""For all tests: nothing of the developer's own is used."""

import os

import pytest
from hypothesis import settings

# A key would have the `python` tool run its code at E2B, past pytest-socket, which does not see that client.
os.environ.pop("E2B_API_KEY", None)

# A busy machine is no failure.
settings.register_profile("metis", deadline=None)
settings.load_profile("metis")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: what starts last decides when two processes are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
