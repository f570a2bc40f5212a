"""Metis: a LangGraph agent that knows when not to call a tool.

Example:
    ```python
    from metis_agent import Budget, PythonTool, create_metis_agent

    agent = create_metis_agent(model, [PythonTool()], budget=Budget(calls=3))
    agent.invoke({"messages": [("user", "hi")]})
    ```
"""

from typing import TYPE_CHECKING, Any

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.budget import Budget
from metis_agent.errors import MetisError, MissingDependencyError
from metis_agent.gates.base import Gate
from metis_agent.gates.baselines import AlwaysGate, ModelGate, NeverGate
from metis_agent.gates.confidence import DraftConfidenceGate
from metis_agent.gates.decision import DecisionModelGate
from metis_agent.gates.policy import PolicyGate
from metis_agent.gates.wrappers import ExploringGate, ShadowGate
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from metis_agent.tools.python import PythonTool
from metis_agent.tools.text_search import TextSearchTool
from metis_agent.types import GateDecision, GateRequest, Question, ToolOutcome, Trajectory

if TYPE_CHECKING:
    from metis_agent.hdpo.config import HDPOConfig
    from metis_agent.hdpo.policy_trainer import HDPOTrainer
    from metis_agent.middleware import MetisGateMiddleware

__all__ = [
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
    "Trajectory",
    "TrajectoryStore",
    "__version__",
    "create_metis_agent",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs an extra when it is asked for."""
    if name == "MetisGateMiddleware":
        from metis_agent.middleware import MetisGateMiddleware

        return MetisGateMiddleware
    if name in ("HDPOConfig", "HDPOTrainer"):
        try:
            from metis_agent.hdpo import policy_trainer
        except ImportError as missing:
            raise MissingDependencyError(
                f"{name} needs {missing.name!r}; install it with: pip install 'langgraph-metis[train]'"
            ) from missing
        return getattr(policy_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
