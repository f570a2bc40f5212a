"""HDPO: from recorded trajectories to a gate or a policy that calls a tool only where it helps.

In flow order: `rewards` -> `advantages` -> `loss`; `exploration` says how a group's rollouts start. `policy_trainer`
trains the whole model, `gate_trainer` a gate on recorded outcomes, which `export` writes. Each name is imported when it
is asked for, and the runtime asks for none: reading a gate costs no import of torch.

Source: "Act Wisely: Cultivating Meta-Cognitive Tool Use in Agentic Multimodal Models", arXiv:2604.08545.
"""

from typing import TYPE_CHECKING

from metis_agent.errors import lazy_names

if TYPE_CHECKING:
    from metis_agent.hdpo.advantages import Objective, register_objective
    from metis_agent.hdpo.config import HDPOConfig
    from metis_agent.hdpo.exploration import StratifiedGroups
    from metis_agent.hdpo.export import set_threshold, write_artefact
    from metis_agent.hdpo.gate_trainer import train_gate
    from metis_agent.hdpo.policy_trainer import HDPOTrainer
    from metis_agent.hdpo.rewards import score

__all__ = [
    "HDPOConfig",
    "HDPOTrainer",
    "Objective",
    "StratifiedGroups",
    "register_objective",
    "score",
    "set_threshold",
    "train_gate",
    "write_artefact",
]

_MODULES = {
    "HDPOConfig": "config",
    "HDPOTrainer": "policy_trainer",
    "Objective": "advantages",
    "StratifiedGroups": "exploration",
    "register_objective": "advantages",
    "score": "rewards",
    "set_threshold": "export",
    "train_gate": "gate_trainer",
    "write_artefact": "export",
}

__getattr__ = lazy_names(__name__, _MODULES, "train")
