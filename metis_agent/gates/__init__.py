"""Gates: what decides, at every turn of an agent, whether to answer or to let tools be called."""

from metis_agent.gates.base import Gate, SupportsDecide, allows, as_gate
from metis_agent.gates.baselines import AlwaysGate, BranchGate, ModelGate, NeverGate

__all__ = [
    "AlwaysGate",
    "BranchGate",
    "Gate",
    "ModelGate",
    "NeverGate",
    "SupportsDecide",
    "allows",
    "as_gate",
]
