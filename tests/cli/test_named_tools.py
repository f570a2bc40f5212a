"""What `--tools MODULE:ATTRIBUTE` takes, in the commands that ask and in those that train."""

import asyncio
from pathlib import Path

import pytest

from metis_agent.cli.agent_options import choose_agent
from metis_agent.cli.curate_parts import open_tools
from metis_agent.errors import ConfigurationError
from metis_agent.worlds.almanac.agent import COLD_START

NAMED = '''
from langchain_core.tools import BaseTool

class Doubling(BaseTool):
    name: str = "double"
    description: str = "Twice n."
    times: int

    def __init__(self, **fields):
        super().__init__(times=2, **fields)

    def _run(self, n: int) -> int:
        return self.times * n

def double(n: int) -> int:
    """Twice n."""
    return 2 * n

def make():
    return [double]

def make_any(*a, **kw):
    return Doubling(**kw)

def make_one(kind=Doubling):
    return kind

BOTH = [Doubling]

def now():
    """The time."""
    return "noon"

async def soon():
    """The time."""
    return "noon"

def bare(n: int) -> int:
    return n

def none():
    return []
'''


@pytest.fixture
def named(tmp_path: Path) -> str:
    (tmp_path / "named_tools.py").write_text(NAMED)
    return f"{tmp_path}/named_tools.py:"


@pytest.mark.parametrize("name", ["double", "make", "make_any", "make_one", "Doubling", "BOTH"])
def test_a_function_or_class_is_a_tool_and_a_function_that_needs_no_arguments_makes_them(name: str, named: str) -> None:
    (tool,), _ = open_tools([named + name], python=False, corpus=None, sessions=1)
    assert (tool.name, tool.invoke({"n": 21})) == ("double", 42)


@pytest.mark.parametrize("name", ["now", "soon"])
def test_a_function_without_parameters_that_makes_no_tools_is_one(name: str, named: str) -> None:
    (tool,), _ = open_tools([named + name], python=False, corpus=None, sessions=1)
    assert (tool.name, asyncio.run(tool.ainvoke({}))) == (name, "noon")


def test_a_function_that_makes_no_tool_is_refused(named: str) -> None:
    with pytest.raises(ConfigurationError, match=r"bare.*Give the function a docstring"):
        open_tools([f"{named}bare"], python=False, corpus=None, sessions=1)
    with pytest.raises(ConfigurationError, match=r"none' gives \[\]"):
        open_tools([f"{named}none"], python=False, corpus=None, sessions=1)
    with pytest.raises(ConfigurationError, match=r"bare.*Give the function a docstring"):
        choose_agent(str(COLD_START), [f"{named}bare"], None)


def test_the_commands_that_ask_take_the_same_tools(named: str) -> None:
    names = [f"{named}{name}" for name in ("now", "Doubling")]
    assert choose_agent(str(COLD_START), names, None).tools == ("now", "double")
