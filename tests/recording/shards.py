"""Trajectories and shards, as the tests of the store write and read them."""

from metis_agent.recording import TrajectoryStore, dumps
from metis_agent.types import Question, Trajectory


def make(i, **fields):
    return Trajectory(id=str(i), question=Question(id=f"q{i}", text="Who?"), **fields)


def read_ids(place, **options):
    return [trajectory.id for trajectory in TrajectoryStore(place, **options).read()]


def shard_files(folder):
    return sorted(folder.glob("segment-*.jsonl"))


def write_shard(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / f"segment-{name}.jsonl").write_bytes(content)


def line(i):
    return dumps(make(i)).encode() + b"\n"
