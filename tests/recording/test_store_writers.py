"""Those who write to a store: several at once, killed, or without room on the disk. Nothing kept is lost."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from metis_agent.errors import StorageError
from metis_agent.recording import TrajectoryStore
from tests.recording.shards import line, make, read_ids, shard_files, write_shard

SCRIPT = """
import sys
from metis_agent.recording import TrajectoryStore
from metis_agent.types import Question, Trajectory

def make(i, size):
    return Trajectory(id=str(i), question=Question(id="q", text="Who?"), answer="x" * size)

store = TrajectoryStore(sys.argv[1])
"""


def test_two_writers_never_share_a_shard(url):
    with TrajectoryStore(url) as one, TrajectoryStore(url) as other:
        for i in range(5):
            one.append(make(f"one-{i}"))
            other.append(make(f"other-{i}"))
    assert len(TrajectoryStore(url).shards()) == 2
    assert len(read_ids(url)) == 10


def test_a_new_writer_leaves_a_torn_shard_as_it_is(tmp_path):
    write_shard(tmp_path, "0", line(1) + line(2)[:30])
    before = shard_files(tmp_path)[0].read_bytes()
    with TrajectoryStore(tmp_path) as writer:
        writer.append(make(3))
        assert [trajectory.id for trajectory in writer.read()] == ["1", "3"]
    assert shard_files(tmp_path)[0].read_bytes() == before


def test_threads_append_whole_lines(url):
    with TrajectoryStore(url, shard_bytes=20_000) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: writer.append(make(i, answer="x" * (i % 700))), range(400)))
    reader = TrajectoryStore(url)
    assert sorted(int(trajectory.id) for trajectory in reader.read()) == list(range(400))
    assert (reader.report.torn, reader.report.corrupt) == (0, 0)


def test_a_forked_child_opens_a_shard_of_its_own(url, tmp_path):
    writer = TrajectoryStore(url)
    writer.append(make("parent"))
    child_sees = tmp_path / "child"

    def child():
        writer.append(make("child"))
        writer.close()
        child_sees.write_text(json.dumps(read_ids(url)))  # memory:// is the child's own copy

    with writer._writer._lock:  # as if another thread of the parent were writing during the fork
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
    process.join(30)
    assert process.exitcode == 0
    writer.append(make("parent again"))
    writer.close()
    if url.startswith("memory://"):
        assert json.loads(child_sees.read_text()) == ["child"]  # not the parent's buffer a second time
        assert read_ids(url) == ["parent", "parent again"]
    else:
        assert sorted(read_ids(url)) == ["child", "parent", "parent again"]
        assert len(TrajectoryStore(url).shards()) == 2


def test_a_store_can_be_sent_to_a_spawned_worker(tmp_path):
    writer = TrajectoryStore(tmp_path, shard_bytes=10)
    writer.append(make(1))
    with pickle.loads(pickle.dumps(writer)) as copy:
        copy.append(make(2))
        copy.append(make(3))
    assert read_ids(tmp_path) == ["1", "2", "3"]
    assert len(shard_files(tmp_path)) == 3


def test_a_killed_writer_loses_nothing_that_it_was_told_is_kept(tmp_path):
    script = SCRIPT + "\nfor i in range(10**9):\n    store.append(make(i, 400_000))\n    print(i, flush=True)\n"
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    for _ in range(40):
        acknowledged = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    rest = writer.communicate()[0].split()
    acknowledged = int(rest[-1]) if rest else acknowledged
    assert writer.returncode == -signal.SIGKILL

    with TrajectoryStore(tmp_path) as reader:
        reader.append(make("after"))
        ids = [trajectory.id for trajectory in reader.read()]
        assert reader.report.corrupt == 0
        assert reader.report.torn <= 1
    assert ids[: acknowledged + 1] == [str(i) for i in range(acknowledged + 1)]
    assert ids[-1] == "after"
    assert len(shard_files(tmp_path)) == 2


def test_many_processes_write_at_once(tmp_path):
    script = SCRIPT + "\nfor i in range(200):\n    store.append(make(sys.argv[2] + str(i), 3000))\n"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    reader = TrajectoryStore(tmp_path)
    assert len(reader.ids()) == reader.count() == 600
    assert len(shard_files(tmp_path)) == 3


def test_a_full_disk_leaves_no_partial_line(tmp_path):
    # RLIMIT_FSIZE makes the kernel write what still fits and then refuse, as a full disk does.
    script = SCRIPT + (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "store.append(make('first', 1000))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        store.append(make('large', 10_000))\n"
        "    except OSError as error:\n"
        "        print(type(error).__name__, error)\n"
        "store.append(make('small', 10))\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    messages = run.stdout.splitlines()
    assert len(messages) == 2
    assert all(message.startswith("StorageError a trajectory could not be written") for message in messages)
    reader = TrajectoryStore(tmp_path)
    assert [trajectory.id for trajectory in reader.read()] == ["first", "small"]
    assert (reader.report.torn, reader.report.corrupt) == (0, 0)
    assert len(shard_files(tmp_path)) == 1


def test_where_the_partial_line_stays_the_next_goes_to_another_shard(tmp_path, monkeypatch):
    writer = TrajectoryStore(tmp_path)
    writer.append(make(1))
    write = os.write

    def half(fd, content):
        write(fd, content[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    def stuck(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", half)
        broken.setattr(os, "ftruncate", stuck)
        with pytest.raises(StorageError, match="No space left on device"):
            writer.append(make(2))
    writer.append(make(3))
    assert [trajectory.id for trajectory in writer.read()] == ["1", "3"]
    assert (writer.report.torn, writer.report.corrupt) == (1, 0)


def test_a_failed_upload_keeps_the_lines_for_the_next_flush(monkeypatch):
    url = f"memory://{uuid.uuid4().hex}"
    writer = TrajectoryStore(url)
    writer.append(make(1))

    def down(*_, **__):
        raise OSError("503 Slow Down")

    with monkeypatch.context() as broken:
        broken.setattr(type(writer._storage.fs), "pipe_file", down)
        with pytest.raises(StorageError, match="503 Slow Down"):
            writer.flush()
    writer.close()
    assert read_ids(url) == ["1"]


def test_fsync_waits_for_each_line(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    with TrajectoryStore(tmp_path, fsync=True) as writer:
        writer.append(make(1))
        writer.append(make(2))
    assert len(synced) == 3  # the folder with the new shard's name, then two lines
