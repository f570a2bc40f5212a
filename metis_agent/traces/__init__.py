"""Other people's traces, read into trajectories, and trajectories read as the steps of a run."""

from metis_agent.traces.steps import Step, ToolRound, steps_of

__all__ = ["Step", "ToolRound", "steps_of"]
