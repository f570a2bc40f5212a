"""What an agent's tool calls were for: probes of recorded runs, verdicts, redundant calls, their price, a page.

In flow order: `turns` reads recorded runs, `probes` asks the model to answer at each of their steps, `agreement` rules
on what it said, `accounting` counts, `figures` and `frontier` measure, `money` prices, `page` shows. `run` is all of
it in one call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metis_agent.errors import MissingDependencyError

if TYPE_CHECKING:
    from metis_agent.audit.accounting import Prices
    from metis_agent.audit.agreement import AgreementJudge, Verdicts
    from metis_agent.audit.page import audit_page
    from metis_agent.audit.probes import Prober, Probing
    from metis_agent.audit.run import Findings, audit, plan_probes
    from metis_agent.audit.summary import headline
    from metis_agent.audit.turns import Survey, ToolEffects, survey

__all__ = [
    "AgreementJudge",
    "Findings",
    "Prices",
    "Prober",
    "Probing",
    "Survey",
    "ToolEffects",
    "Verdicts",
    "audit",
    "audit_page",
    "headline",
    "plan_probes",
    "survey",
]

_MODULES = {
    "AgreementJudge": "agreement", "Findings": "run", "Prices": "accounting", "Prober": "probes", "Probing": "probes",
    "Survey": "turns", "ToolEffects": "turns", "Verdicts": "agreement", "audit": "run", "audit_page": "page",
    "headline": "summary", "plan_probes": "run", "survey": "turns",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ImportError as missing:
        if (missing.name or "").partition(".")[0] == "metis_agent":
            raise
        raise MissingDependencyError(
            f"{name} needs {missing.name!r}; install it with: pip install 'langgraph-metis[audit]'"
        ) from missing
