"""Other people's traces, read into trajectories, and trajectories read as the steps of a run."""

from metis_agent.traces.importing import ImportProgress, ImportReport, import_traces
from metis_agent.traces.messages import messages_of, reply_of, tool_definitions
from metis_agent.traces.registry import Importer, importer_names, register_importer
from metis_agent.traces.steps import Step, ToolRound, steps_of
from metis_agent.traces.traced import ModelSpan, ToolSpan, Trace

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
