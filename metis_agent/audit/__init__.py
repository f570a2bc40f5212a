"""What an agent's tool calls were for: probes of recorded runs, verdicts, redundant calls, their price, a page.

In flow order: `turns` reads recorded runs, `probes` asks the model to answer at each of their steps, `agreement` rules
on what it said, `accounting` counts and prices, `kinds` and `frontier` measure, `page` shows. `run` is all of it in
one call.
"""

from typing import TYPE_CHECKING

from metis_agent.errors import lazy_names

if TYPE_CHECKING:
    from metis_agent.audit.accounting import Prices
    from metis_agent.audit.agreement import AgreementJudge, Verdicts
    from metis_agent.audit.page import audit_page
    from metis_agent.audit.probes import Prober, Probing
    from metis_agent.audit.run import Findings, audit, plan_probes
    from metis_agent.audit.summary import headline
    from metis_agent.audit.turns import Survey, ToolEffects, survey
    from metis_agent.sqlite import DiskCache

__all__ = [
    "AgreementJudge",
    "DiskCache",
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
    "AgreementJudge": "agreement", "DiskCache": "probes", "Findings": "run", "Prices": "accounting", "Prober": "probes",
    "Probing": "probes", "Survey": "turns", "ToolEffects": "turns", "Verdicts": "agreement", "audit": "run",
    "audit_page": "page", "headline": "summary", "plan_probes": "run", "survey": "turns",
}  # fmt: skip

__getattr__ = lazy_names(__name__, _MODULES, "audit")
