"""Is an answer right? Rules that compare it with a reference, and LLM judges where no rule can.

Each name is imported when it is asked for.
"""

from typing import TYPE_CHECKING

from metis_agent.errors import lazy_names

if TYPE_CHECKING:
    from metis_agent.judging.judge import AnswerJudge
    from metis_agent.judging.verifiers import register_verifier, verify

__all__ = ["AnswerJudge", "register_verifier", "verify"]

_MODULES = {"AnswerJudge": "judge", "register_verifier": "verifiers", "verify": "verifiers"}

__getattr__ = lazy_names(__name__, _MODULES, "train")
