"""Dependencies point one way, and `import metis_agent` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metis_agent

from .public_api import MODULES as API_MODULES

PACKAGE = Path(metis_agent.__file__).parent
HEAVY = {"torch", "transformers", "trl", "datasets", "numpy", "matplotlib"}

# Everybody's: they import nothing but each other.
LEAVES = {"types", "errors", "formats", "messages", "sqlite"}

# What each room may import of the others.
ALLOWED = {
    "types": set(),
    "errors": set(),
    "formats": set(),
    "messages": set(),
    "sqlite": set(),
    "turns": set(),
    "deadline": set(),
    "gates": {"deadline", "tools"},  # `tools` for loading images safely
    "tools": {"deadline"},
    "models": {"tools"},
    "recording": {"tools"},
    "traces": {"recording", "rules", "tools"},
    # What holds in every turn; its two hosts only translate, and know nothing of each other.
    "rules": {"deadline", "gates", "recording"},
    "graphs": {"deadline", "rules"},
    "middleware": {"deadline", "gates", "recording", "rules"},
    "agent": {"gates", "graphs", "middleware", "recording", "rules"},
    "judging": {"deadline", "recording"},
    "rollouts": {"agent", "gates", "judging", "recording", "tools", "traces"},
    "evaluation": {"agent", "gates", "judging", "recording", "rollouts", "tools"},
    "curation": {"agent", "gates", "judging", "recording", "rollouts"},
    "hdpo": {"evaluation", "gates", "judging", "recording", "rollouts"},
    "report": {"evaluation", "gates", "judging", "recording", "rollouts"},
    "audit": {"evaluation", "judging", "report", "traces"},
    "engines": {"hdpo", "judging", "models"},
    "publish": {"gates"},
    "worlds": {"agent", "evaluation", "gates", "hdpo", "judging", "models", "recording", "rollouts", "rules", "tools"},
    "cli": {
        "agent",
        "audit",
        "curation",
        "evaluation",
        "gates",
        "hdpo",
        "judging",
        "models",
        "publish",
        "recording",
        "report",
        "rollouts",
        "rules",
        "tools",
        "traces",
        "worlds",
    },
    # What langgraph.json names: a whole agent, made when it is asked for.
    "graphs/metis": {"agent", "gates", "tools", "worlds"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts) if "/".join(parts) in ALLOWED else parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    used = {name.split(".")[1] for name in imports(path) if name.startswith("metis_agent.")}
    assert used - {here, *LEAVES} <= ALLOWED[here]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, metis_agent; print(sorted({HEAVY!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import metis_agent", {"langgraph", "langchain_core", "pydantic", "fsspec", "rich", "typer", "httpx"}),
        ("from metis_agent.cli import app; app(['--help'], standalone_mode=False)", {"langgraph", "langchain_core"}),
        ("from metis_agent.cli import app; app(['doctor', '--help'], standalone_mode=False)", {"langgraph"}),
    ],
)
def test_what_is_not_used_yet_is_not_imported_yet(code: str, unwanted: set[str]) -> None:
    code += f"; import sys; print(sorted({HEAVY | unwanted!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


EXTRAS = (
    "numpy", "scipy", "sklearn", "torch", "transformers", "trl", "peft", "datasets", "pyarrow", "matplotlib",
    "safetensors", "e2b", "e2b_code_interpreter", "ddgs", "tantivy", "PIL", "langchain", "langchain_openai",
    "math_verify", "genai_prices", "psycopg", "yaml",
)  # fmt: skip
"""What comes with extras only."""

WITHOUT_EXTRAS = """
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
sys.meta_path.insert(0, Absent())
wrong = []
for module in modules:
    found = importlib.import_module(module)
    for name in found.__all__:
        try:
            getattr(found, name)
        except Exception as error:
            if type(error).__name__ != "MissingDependencyError" or "pip install 'langgraph-metis[" not in str(error):
                wrong.append((module, name, repr(error)))
print(wrong)
"""


def test_without_any_extra_each_public_name_is_there_or_says_what_to_install() -> None:
    code = f"absent, modules = {EXTRAS!r}, {[name for name in API_MODULES if name != 'metis_agent.traces']!r}"
    ran = subprocess.run([sys.executable, "-c", code + WITHOUT_EXTRAS], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


def test_every_public_name_exists_and_is_listed() -> None:
    assert sorted(metis_agent.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(metis_agent, name) is not None


PUBLIC = [
    "AlwaysGate",
    "Budget",
    "DecisionModelGate",
    "DraftConfidenceGate",
    "ExploringGate",
    "Gate",
    "GateDecision",
    "GateRequest",
    "HDPOConfig",
    "HDPOTrainer",
    "MetisAgent",
    "MetisError",
    "MetisGateMiddleware",
    "ModelGate",
    "NeverGate",
    "PolicyGate",
    "PythonTool",
    "Question",
    "Recorder",
    "ShadowGate",
    "TextSearchTool",
    "ToolOutcome",
    "ToolSpec",
    "Trajectory",
    "TrajectoryStore",
    "__version__",
    "create_metis_agent",
]
