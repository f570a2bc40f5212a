"""Gates: what decides, at every turn of an agent, whether to answer or to let tools be called."""

from metis_agent.gates.base import Gate, SupportsDecide, allows, as_gate
from metis_agent.gates.decision import DecisionModelGate
from metis_agent.gates.decision_model import as_decision_model
from metis_agent.gates.policy import PolicyGate
from metis_agent.gates.reference import AlwaysGate, BranchGate, DraftConfidenceGate, ModelGate, NeverGate
from metis_agent.gates.wrappers import ExploringGate, ShadowGate, ShadowReport, shadow_report

__all__ = [
    "AlwaysGate",
    "BranchGate",
    "DecisionModelGate",
    "DraftConfidenceGate",
    "ExploringGate",
    "Gate",
    "ModelGate",
    "NeverGate",
    "PolicyGate",
    "ShadowGate",
    "ShadowReport",
    "SupportsDecide",
    "allows",
    "as_decision_model",
    "as_gate",
    "shadow_report",
]
