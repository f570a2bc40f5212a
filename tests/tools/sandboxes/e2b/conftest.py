"""A sandbox and a session of E2B's real client, against the server on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from metis_agent.tools.sandboxes import E2BSandbox, E2BSession

from ..e2b_server import E2BServer
from .watching import LIMITS


@pytest.fixture
def sandbox(server: E2BServer) -> Iterator[E2BSandbox]:
    with E2BSandbox(LIMITS) as sandbox:
        yield sandbox


@pytest.fixture
def session(sandbox: E2BSandbox) -> Iterator[E2BSession]:
    with sandbox.open() as session:
        yield session
