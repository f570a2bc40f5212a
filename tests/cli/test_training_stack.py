import pytest

from metis_agent.cli.output import training_libraries
from metis_agent.errors import MissingDependencyError


def test_a_missing_library_is_named_with_what_installs_it() -> None:
    with pytest.raises(MissingDependencyError, match=r"'torch'.*langgraph-metis\[train\]"), training_libraries():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


def test_a_fault_of_our_own_is_not_taken_for_a_missing_library() -> None:
    with pytest.raises(ImportError, match="cannot import name"), training_libraries():
        from metis_agent.types import Nothing  # type: ignore[attr-defined]  # noqa: F401
