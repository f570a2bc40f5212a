"""Metis: a LangGraph agent that knows when not to call a tool.

Example:
    ```python
    from metis_agent import Budget, PythonTool, create_metis_agent

    agent = create_metis_agent(model, [PythonTool()], budget=Budget(calls=3))
    agent.invoke({"messages": [("user", "hi")]})
    ```
"""

from typing import TYPE_CHECKING

from metis_agent.errors import MetisError, lazy_names

if TYPE_CHECKING:
    from metis_agent.agent import MetisAgent, create_metis_agent
    from metis_agent.gates.base import Gate
    from metis_agent.gates.decision import DecisionModelGate
    from metis_agent.gates.policy import PolicyGate
    from metis_agent.gates.reference import AlwaysGate, DraftConfidenceGate, ModelGate, NeverGate
    from metis_agent.gates.wrappers import ExploringGate, ShadowGate
    from metis_agent.hdpo.config import HDPOConfig
    from metis_agent.hdpo.policy_trainer import HDPOTrainer
    from metis_agent.middleware import MetisGateMiddleware
    from metis_agent.recording.recorder import Recorder
    from metis_agent.recording.store import TrajectoryStore
    from metis_agent.rules.budget import Budget
    from metis_agent.tools.python import PythonTool
    from metis_agent.tools.text_search import TextSearchTool
    from metis_agent.types import GateDecision, GateRequest, Question, ToolOutcome, ToolSpec, Trajectory

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
    "ToolSpec",
    "Trajectory",
    "TrajectoryStore",
    "__version__",
    "create_metis_agent",
]

__version__ = "0.1.0"

_HOMES = {
    "AlwaysGate": "gates.reference",
    "Budget": "rules.budget",
    "DecisionModelGate": "gates.decision",
    "DraftConfidenceGate": "gates.reference",
    "ExploringGate": "gates.wrappers",
    "Gate": "gates.base",
    "GateDecision": "types",
    "GateRequest": "types",
    "HDPOConfig": "hdpo.config",
    "HDPOTrainer": "hdpo.policy_trainer",
    "MetisAgent": "agent",
    "MetisGateMiddleware": "middleware",
    "ModelGate": "gates.reference",
    "NeverGate": "gates.reference",
    "PolicyGate": "gates.policy",
    "PythonTool": "tools.python",
    "Question": "types",
    "Recorder": "recording.recorder",
    "ShadowGate": "gates.wrappers",
    "TextSearchTool": "tools.text_search",
    "ToolOutcome": "types",
    "ToolSpec": "types",
    "Trajectory": "types",
    "TrajectoryStore": "recording.store",
    "create_metis_agent": "agent",
}
"""Public name -> the module that has it, which is imported when the name is asked for."""

__getattr__ = lazy_names(__name__, _HOMES, "train")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
