"""Other people's traces, read into trajectories, and trajectories read as the steps of a run."""

from metis_agent.traces.importing import ImportProgress, ImportReport, import_traces
from metis_agent.traces.messages import messages_of, reply_of, tool_definitions
from metis_agent.traces.registry import Importer, ModelSpan, ToolSpan, Trace, importer_names, register_importer
from metis_agent.traces.threads import Step, ToolRound, steps_of

__all__ = [
    "ImportProgress",
    "ImportReport",
    "Importer",
    "ModelSpan",
    "Step",
    "ToolRound",
    "ToolSpan",
    "Trace",
    "import_traces",
    "importer_names",
    "messages_of",
    "register_importer",
    "reply_of",
    "steps_of",
    "tool_definitions",
]
