"""The store: what is appended is read back, what is bad is skipped and counted, and where it can be."""

import logging
import uuid

import pytest

from metis_agent.errors import (
    ConfigurationError,
    InputError,
    MissingDependencyError,
    SchemaVersionError,
    StorageError,
)
from metis_agent.recording import TrajectoryStore, dumps, images, store
from metis_agent.recording.shards import Storage
from tests.recording.shards import line, make, read_ids, write_shard


def test_what_is_appended_is_read_back_in_order(url):
    trajectories = [make(i, answer="é漢\u2028", metadata={"i": i}) for i in range(20)]
    with TrajectoryStore(url) as writer:
        for trajectory in trajectories:
            writer.append(trajectory)
    reader = TrajectoryStore(url, read_only=True)
    assert list(reader.read()) == trajectories
    assert reader.count() == 20
    assert (reader.report.read, reader.report.torn, reader.report.corrupt) == (20, 0, 0)


def test_tools_on_offer_are_kept_once_a_distinct_set(url, caplog):
    sets = [({"type": "function", "function": {"name": f"tool {n}"}}, {"type": f"remote {n}"}) for n in range(2)]
    runs = [make(i, tools=sets[i % 2]) for i in range(6)]
    with TrajectoryStore(url) as writer:
        for run in runs:
            writer.append(run)
    reader = TrajectoryStore(url, read_only=True)
    assert list(reader.read()) == runs
    assert [run.tools for run in reader.read(whole=False)] == [()] * 6
    folder = Storage(f"{url}/tools")
    assert len(folder.names()) == 2
    folder.put(next(iter(folder.names())), b"[]")  # damaged: the runs are read, and it is said
    found = [run.tools for run in TrajectoryStore(url, read_only=True).read()]
    assert sorted(map(bool, found)) == [False] * 3 + [True] * 3
    assert "has no tools" in caplog.text


def test_where_each_turn_has_tools_of_its_own_they_stay_in_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_MOST_SETS", 2)
    runs = [make(i, tools=({"name": f"tool {i}"},)) for i in range(5)]
    with TrajectoryStore(tmp_path) as writer:
        for run in runs:
            writer.append(run)
    assert list(TrajectoryStore(tmp_path).read()) == runs
    assert len(list((tmp_path / "tools").iterdir())) == 2


def test_a_local_append_is_readable_at_once(tmp_path):
    writer = TrajectoryStore(tmp_path)
    writer.append(make(1))
    assert read_ids(tmp_path) == ["1"]


def test_a_remote_append_is_readable_after_flush():
    url = f"memory://{uuid.uuid4().hex}"
    writer = TrajectoryStore(url)
    writer.append(make(1))
    assert read_ids(url) == []
    writer.flush()
    assert read_ids(url) == ["1"]
    writer.append(make(2))
    writer.close()
    writer.close()
    assert read_ids(url) == ["1", "2"]
    assert len(TrajectoryStore(url).shards()) == 2


def test_shards_rotate_by_size_and_none_exceeds_it(url):
    size = 3 * len(line(10)) + 1
    with TrajectoryStore(url, shard_bytes=size) as writer:
        for i in range(10, 20):
            writer.append(make(i))
    assert read_ids(url) == [str(i) for i in range(10, 20)]
    assert len(TrajectoryStore(url).shards()) == 4  # 3 + 3 + 3 + 1


def test_a_line_larger_than_a_shard_has_one_of_its_own(url):
    with TrajectoryStore(url, shard_bytes=10) as writer:
        writer.append(make(1))
        writer.append(make(2))
    assert read_ids(url) == ["1", "2"]
    assert len(TrajectoryStore(url).shards()) == 2


def test_reading_can_begin_at_a_shard(url):
    with TrajectoryStore(url, shard_bytes=10) as writer:
        for i in range(4):
            writer.append(make(i))
    shards = TrajectoryStore(url).shards()
    read = TrajectoryStore(url).read(from_shard=shards[2])
    assert [trajectory.id for trajectory in read] == ["2", "3"]


def test_reading_streams(tmp_path):
    write_shard(tmp_path, "a", line(1) + b"garbage\n" + line(2))
    reader = TrajectoryStore(tmp_path)
    stream = reader.read()
    assert next(stream).id == "1"
    assert (reader.report.read, reader.report.corrupt) == (1, 0)  # it has not looked further
    assert next(stream).id == "2"
    assert (reader.report.read, reader.report.corrupt) == (2, 1)


def test_each_read_counts_from_zero(tmp_path):
    write_shard(tmp_path, "a", line(1) + b"garbage\n" + line(2))
    reader = TrajectoryStore(tmp_path)
    for _ in range(2):
        assert len(list(reader.read())) == 2
        assert reader.report.corrupt == 1


@pytest.mark.parametrize(
    "torn", [line(2)[:-1], line(2)[:30], line(2)[:30] + b"\n", b"\x00" * 4096], ids=["a", "b", "c", "zeros"]
)
def test_a_torn_last_line_is_skipped_and_counted(tmp_path, torn, caplog):
    write_shard(tmp_path, "1", line(1) + torn)
    write_shard(tmp_path, "2", line(3))
    reader = TrajectoryStore(tmp_path)
    assert [trajectory.id for trajectory in reader.read()] == ["1", "3"]
    assert (reader.report.torn, reader.report.corrupt) == (1, 0)
    assert "segment-1.jsonl, line 2" in caplog.text


@pytest.mark.parametrize("garbage", [b"\n", b"\xff\x00\xfe\n", b"[]\n", b'{"schema":1,"id":3}\n', line(9)[:40] + b"\n"])
def test_garbage_in_the_middle_is_skipped_counted_and_located(tmp_path, garbage, caplog):
    write_shard(tmp_path, "1", line(1) + garbage + line(2))
    reader = TrajectoryStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [trajectory.id for trajectory in reader.read()] == ["1", "2"]
    report = reader.report
    assert (report.read, report.torn, report.corrupt) == (2, 0, 1)
    assert [(bad.shard, bad.line) for bad in report.bad_lines] == [("segment-1.jsonl", 2)]
    assert report.bad_lines[0].reason
    assert "segment-1.jsonl, line 2" in caplog.text
    assert reader.ids() == {"1", "2"}


def test_a_whole_last_line_that_is_no_trajectory_is_corrupt_not_torn(tmp_path):
    write_shard(tmp_path, "1", line(1) + b'{"schema":1}\n')
    reader = TrajectoryStore(tmp_path)
    assert len(list(reader.read())) == 1
    assert (reader.report.torn, reader.report.corrupt) == (0, 1)


def test_the_list_of_bad_lines_is_bounded_the_count_is_not(tmp_path):
    write_shard(tmp_path, "1", b"x\n" * 500 + line(1))
    reader = TrajectoryStore(tmp_path)
    assert len(list(reader.read())) == 1
    assert reader.report.corrupt == 500
    assert len(reader.report.bad_lines) == 100


def test_a_line_over_the_limit_is_bad_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_MAX_LINE", 2**20)
    write_shard(tmp_path, "1", line(1) + dumps(make(2, answer="x" * 2**22)).encode() + b"\n" + line(3))
    reader = TrajectoryStore(tmp_path)
    assert [trajectory.id for trajectory in reader.read()] == ["1", "3"]
    assert reader.report.corrupt == 1
    with pytest.raises(InputError, match=r"'4' takes \d+ bytes; .* elsewhere"):
        reader.append(make(4, answer="x" * 2**20))


def test_lines_may_cross_blocks(tmp_path):
    trajectories = [make(i, answer="x" * (300_000 + i)) for i in range(12)]
    with TrajectoryStore(tmp_path) as writer:
        for trajectory in trajectories:
            writer.append(trajectory)
    assert list(TrajectoryStore(tmp_path).read()) == trajectories


def test_a_record_of_a_newer_version_stops_the_reading(tmp_path):
    write_shard(tmp_path, "1", line(1) + line(2).replace(b'"schema":1', b'"schema":99'))
    reader = TrajectoryStore(tmp_path)
    with pytest.raises(SchemaVersionError, match=r"segment-1.jsonl line 2.*Upgrade"):
        list(reader.read())
    with pytest.raises(SchemaVersionError, match="Upgrade"):
        reader.ids()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("not a shard")
    (tmp_path / "images").mkdir()
    write_shard(tmp_path, "1", line(1))
    assert read_ids(tmp_path) == ["1"]


def test_ids_are_those_of_finished_runs(url):
    with TrajectoryStore(url) as writer:
        writer.append(make(1))
        writer.append(make(2, status="failed", error="sandbox gone"))
        writer.append(make("half \ud83d"))
    assert TrajectoryStore(url).ids() == {"1", "half \ud83d"}


def test_a_new_store_is_empty(url):
    fresh = TrajectoryStore(url)
    assert (fresh.shards(), list(fresh.read()), fresh.ids(), fresh.count()) == ([], [], set(), 0)
    fresh.close()
    assert TrajectoryStore(url).shards() == []


def test_what_can_not_be_written_is_found_before_any_work(tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    for place in (in_the_way, in_the_way / "runs"):
        with pytest.raises(StorageError, match=r"can't be written to '.*file.*Name a folder"):
            TrajectoryStore(place)
    with pytest.raises(StorageError, match="can't be written"):
        TrajectoryStore("/proc/no-such-place")


def test_a_remote_place_that_can_not_be_written_is_found_before_any_work(monkeypatch):
    fs = type(TrajectoryStore("memory://any")._storage.fs)

    def forbidden(*_, **__):
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(fs, "pipe_file", forbidden)
    with pytest.raises(StorageError, match="403 Forbidden"):
        TrajectoryStore(f"memory://{uuid.uuid4().hex}")


def test_the_probe_leaves_nothing(url):
    writer = TrajectoryStore(url)
    assert writer._storage.names() == []


def test_read_only_neither_makes_nor_writes(tmp_path):
    with pytest.raises(StorageError, match="no such folder"):
        TrajectoryStore(tmp_path / "nothing", read_only=True)
    reader = TrajectoryStore(tmp_path, read_only=True)
    with pytest.raises(StorageError, match="read_only"):
        reader.append(make(1))
    assert list(tmp_path.iterdir()) == []


def test_what_json_can_not_hold_is_refused_and_leaves_nothing(url):
    with TrajectoryStore(url) as writer:
        with pytest.raises(InputError, match="convert the value"):
            writer.append(make(1, metadata={"v": object()}))
        writer.append(make(2))
    assert read_ids(url) == ["2"]


def test_a_wrong_address_is_a_configuration_error(monkeypatch):
    with pytest.raises(ConfigurationError, match="'nope://x' is no address"):
        TrajectoryStore("nope://x")
    with pytest.raises(ConfigurationError, match="empty"):
        TrajectoryStore("")

    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("metis_agent.recording.shards.url_to_fs", missing)
    with pytest.raises(MissingDependencyError, match="s3fs"):
        TrajectoryStore("s3://bucket/runs")


def test_file_urls_and_paths_are_the_same_place(tmp_path):
    with TrajectoryStore(f"file://{tmp_path}/runs") as writer:
        writer.append(make(1))
    assert read_ids(tmp_path / "runs") == ["1"]


def test_a_dropped_store_still_uploads_what_it_holds():
    url = f"memory://{uuid.uuid4().hex}"
    writer = TrajectoryStore(url)
    writer.append(make(1))
    del writer
    assert read_ids(url) == ["1"]
