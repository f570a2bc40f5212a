"""How good are an agent and its gate: figures with intervals, thresholds with guarantees, drift, benchmarks.

Each name is imported when it is asked for.
"""

from typing import TYPE_CHECKING

from metis_agent.errors import lazy_names

if TYPE_CHECKING:
    from metis_agent.evaluation.agents import measure
    from metis_agent.evaluation.benchmarks import register_benchmark
    from metis_agent.evaluation.calibration import Promise, choose_threshold
    from metis_agent.evaluation.gates import Scored, evaluate_gate, score_table

__all__ = [
    "Promise",
    "Scored",
    "choose_threshold",
    "evaluate_gate",
    "measure",
    "register_benchmark",
    "score_table",
]

_MODULES = {
    "Promise": "calibration",
    "Scored": "gates",
    "choose_threshold": "calibration",
    "evaluate_gate": "gates",
    "measure": "agents",
    "register_benchmark": "benchmarks",
    "score_table": "gates",
}

__getattr__ = lazy_names(__name__, _MODULES, "train")
