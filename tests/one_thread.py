"""A fixture for the conftests of those who run tiny models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

__all__ = ["one_thread"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny model is slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
