"""Rollouts: questions run down every branch, recorded, and what came of each branch as a table.

Each name is imported when it is asked for.
"""

from typing import TYPE_CHECKING

from metis_agent.errors import lazy_names

if TYPE_CHECKING:
    from metis_agent.rollouts.branches import BranchPlan, BranchRecorder, branch_rollouts
    from metis_agent.rollouts.outcomes import OutcomeTable, held_out, read_outcomes
    from metis_agent.rollouts.questions import read_questions, register_table_format
    from metis_agent.rollouts.recorded import outcomes_from_trajectories
    from metis_agent.rollouts.runner import Rollouts, groups_of

__all__ = [
    "BranchPlan",
    "BranchRecorder",
    "OutcomeTable",
    "Rollouts",
    "branch_rollouts",
    "groups_of",
    "held_out",
    "outcomes_from_trajectories",
    "read_outcomes",
    "read_questions",
    "register_table_format",
]

_MODULES = {
    "BranchPlan": "branches",
    "BranchRecorder": "branches",
    "OutcomeTable": "outcomes",
    "Rollouts": "runner",
    "branch_rollouts": "branches",
    "groups_of": "runner",
    "held_out": "outcomes",
    "outcomes_from_trajectories": "recorded",
    "read_outcomes": "outcomes",
    "read_questions": "questions",
    "register_table_format": "questions",
}

__getattr__ = lazy_names(__name__, _MODULES, "train")
