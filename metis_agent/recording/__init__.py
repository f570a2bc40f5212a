"""Runs kept as trajectories: the schema of a record, the store of records, the images beside them."""

from metis_agent.recording.images import ImageStore
from metis_agent.recording.recorder import Recorder, RecorderReport, trajectory_of
from metis_agent.recording.schema import SCHEMA_VERSION, dumps, loads
from metis_agent.recording.store import BadLine, StoreReport, TrajectoryStore

__all__ = [
    "SCHEMA_VERSION",
    "BadLine",
    "ImageStore",
    "Recorder",
    "RecorderReport",
    "StoreReport",
    "TrajectoryStore",
    "dumps",
    "loads",
    "trajectory_of",
]
