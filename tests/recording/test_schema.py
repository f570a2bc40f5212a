import json
import math
import tracemalloc
import types as pytypes

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from metis_agent import types
from metis_agent.errors import InputError, SchemaVersionError
from metis_agent.recording import schema
from metis_agent.recording.schema import dumps, loads
from metis_agent.types import GateDecision, ModelCall, Question, ToolOutcome, Trajectory

# Any text at all, lone surrogates included: a tokenizer can cut an emoji in half.
texts = st.text(st.characters(), max_size=12)
floats = st.floats(allow_nan=False)
seconds = st.floats(min_value=0, max_value=1e9)
# In free-form values a number that is not finite comes back as text: JSON has no other form for it.
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=8)
objects = st.dictionaries(texts, values, max_size=3)
ids = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)

questions = st.builds(
    Question,
    id=texts,
    text=texts,
    answer=st.none() | texts,
    verifier=st.sampled_from(["exact", "numeric", "choice"]),
    kind=texts,
    metadata=objects,
)
decisions = st.builds(
    GateDecision,
    allowed=st.lists(texts, max_size=3).map(tuple),
    required=st.booleans(),
    probabilities=st.none() | st.dictionaries(texts, st.floats(0, 1), max_size=3),
    threshold=st.none() | st.floats(0, 1),
    gate=texts,
    version=texts,
    reason=texts,
    seconds=seconds,
    propensity=st.none() | st.floats(0, 1),
    shadow=st.none() | objects,
)
outcomes = st.builds(
    ToolOutcome,
    call_id=texts,
    tool=texts,
    arguments=objects,
    status=st.sampled_from(["ok", "error", "timeout", "blocked", "repeated"]),
    content=texts,
    seconds=seconds,
    cost=floats,
)
calls = st.builds(
    ModelCall,
    node=texts,
    step=st.integers(),
    text=texts,
    tool_calls=st.lists(objects, max_size=2).map(tuple),
    prompt_ids=st.none() | ids,
    completion_ids=st.none() | ids,
    log_probs=st.none() | st.lists(floats, max_size=5).map(tuple),
    allowed_log_probs=st.none() | st.lists(floats, max_size=5).map(tuple),
    forced=st.integers(0, 5),
    continues=st.booleans(),
    sampling=objects,
    weights_version=texts,
    template_hash=texts,
    usage=st.dictionaries(texts, st.integers(), max_size=2),
    model=texts,
    seconds=seconds,
)
trajectories = st.builds(
    Trajectory,
    id=texts,
    question=questions,
    branch=st.sampled_from(["free", "direct", "tool"]),
    answer=texts,
    messages=st.lists(objects, max_size=2).map(tuple),
    calls=st.lists(calls, max_size=2).map(tuple),
    decisions=st.lists(decisions, max_size=2).map(tuple),
    outcomes=st.lists(outcomes, max_size=2).map(tuple),
    status=st.sampled_from(["finished", "failed"]),
    error=texts,
    seconds=seconds,
    started_at=seconds,
    metadata=objects,
    history=st.lists(objects, max_size=2).map(tuple),
    tools=st.lists(objects, max_size=2).map(tuple),
    conversation=texts,
    user=texts,
)


def a_trajectory(**fields):
    return Trajectory(id="t1", question=Question(id="q1", text="Who?"), **fields)


def a_record(**fields):
    return json.loads(dumps(a_trajectory())) | fields


@given(trajectories)
def test_round_trip_is_the_identity(trajectory):
    line = dumps(trajectory)
    assert loads(line) == trajectory
    assert "\n" not in line
    assert "\r" not in line
    assert json.loads(line, parse_constant=pytest.fail)["schema"] == 1
    assert len(line.splitlines()) == 1  # of no kind of line break that any reader knows
    assert schema.identity(line) == (trajectory.id, trajectory.status)


@given(trajectories)
def test_bytes_read_as_text_does(trajectory):
    line = dumps(trajectory)
    assert loads(line.encode()) == loads(line)


def test_the_strategy_covers_every_field():
    # A field added to types.py without its place in the strategies above would go untested.
    covered = {Trajectory: trajectories, Question: questions, ModelCall: calls}
    covered |= {GateDecision: decisions, ToolOutcome: outcomes}
    for noun, strategy in covered.items():
        example_fields = set(noun.__dataclass_fields__)
        assert f"{noun.__name__}" in types.__all__
        assert all(f"{name}=" in repr(strategy) for name in example_fields), noun


def test_log_probs_that_are_not_finite_come_back():
    log_probs = (math.nan, -math.inf, -0.5)
    call = ModelCall(node="answer", step=0, completion_ids=(1, 2, 3), log_probs=log_probs)
    back = loads(dumps(a_trajectory(calls=(call,)))).calls[0].log_probs
    assert math.isnan(back[0])
    assert back[1:] == log_probs[1:]


def test_numbers_that_are_not_finite_are_read_as_they_were_written_before():
    line = json.dumps(a_record(seconds=math.inf, metadata={"n": -math.inf}))
    assert "-Infinity" in line
    assert (loads(line).seconds, loads(line).metadata) == (math.inf, {"n": -math.inf})
    assert loads(dumps(loads(line))).metadata == {"n": "-Infinity"}


def test_huge_integers_keep_every_digit():
    n = 10**4000 + 7
    assert loads(dumps(a_trajectory(metadata={"n": n, "-": -n}))).metadata == {"n": n, "-": -n}


def test_integers_that_python_cannot_print_come_back_as_their_digits():
    n = -(10**6000) - 7
    back = loads(dumps(a_trajectory(metadata={"n": n}))).metadata["n"]
    assert (back[:4], back[-3:], len(back)) == ("-100", "007", 6002)


def test_lone_surrogates_come_back():
    trajectory = a_trajectory(answer="half an emoji: \ud83d", metadata={"\udc00": ["\ud83d"]})
    line = dumps(trajectory)
    line.encode()  # plain UTF-8
    assert loads(line) == trajectory
    assert schema.identity(line) == ("t1", "finished")


def test_free_form_values_come_back_as_json_has_them():
    metadata = {"pair": (1, 2), 3: "int key", "view": pytypes.MappingProxyType({"a": 1})}
    back = loads(dumps(a_trajectory(metadata=metadata)))
    assert back.metadata == {"pair": [1, 2], "3": "int key", "view": {"a": 1}}


def test_typed_sequences_come_back_as_tuples():
    back = loads(dumps(a_trajectory(calls=(ModelCall(node="a", step=0, prompt_ids=(1, 2)),))))
    assert back.calls[0].prompt_ids == (1, 2)


@pytest.mark.parametrize("value", [object(), b"\xff"])
def test_a_value_without_json_form_is_refused(value):
    with pytest.raises(InputError, match=r"'t1' can't be written as JSON.*convert the value"):
        dumps(a_trajectory(metadata={"v": value}))


@pytest.mark.parametrize(
    "odd",
    [
        {"branch": "search"},
        {"status": "abandoned"},
        {"outcomes": (ToolOutcome(call_id="c", tool="t", arguments={}, status="skipped"),)},
    ],
    ids=["branch", "status", "call"],
)
def test_what_no_reader_takes_is_not_written(odd):
    with pytest.raises(InputError, match=r"'t1' has '\w+' for its .*; choose of \('\w+', "):
        dumps(a_trajectory(**odd))


def test_nothing_nests_deeper_than_readers_go():
    def nested(levels, innermost):
        for _ in range(levels):
            innermost = [innermost]
        return innermost

    for innermost in (1, "half \ud83d"):
        line = dumps(a_trajectory(metadata={"v": nested(240, innermost)}))
        assert loads(line).metadata["v"] == nested(240, innermost)
        with pytest.raises(InputError, match="can't be written"):
            dumps(a_trajectory(metadata={"v": nested(260, innermost)}))
    for levels in (320, 900):
        with pytest.raises(InputError, match="not a line of JSON"):
            loads(json.dumps(a_record(metadata={"v": nested(levels, 1)})))


def test_a_line_of_a_million_faults_costs_little():
    fault = (
        {"calls": [1] * 1_000_000},
        {"calls": [{"node": "a", "step": 0, "usage": {str(n): "x" for n in range(300_000)}}]},
    )
    for fields in fault:
        line = json.dumps(a_record(**fields), separators=(",", ":"))
        tracemalloc.start()
        with pytest.raises(InputError, match=r"calls\.0"):
            loads(line)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * len(line)


def test_a_line_of_too_many_values_is_refused(monkeypatch):
    monkeypatch.setattr(schema, "_MOST_VALUES", 1000)
    monkeypatch.setattr(schema, "_LARGE", 1000)
    line = dumps(a_trajectory(metadata={"v": [[]] * 1001}))
    for read in (loads, schema.loads_outcome, schema.identity):
        for form in (line, line.encode(), line.replace("{", "{ ", 1)):
            with pytest.raises(InputError, match=r"\d+ values; 1000 are the most"):
                read(form)


class Hostile:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name):
        raise RuntimeError("no")

    __str__ = __repr__ = __iter__ = __getattribute__


class Row(BaseModel):
    n: int
    secret: SecretStr = SecretStr("x")


def circular():
    loop = []
    loop.append([loop, loop])
    return loop


def laughs():
    value = "ha"
    for _ in range(90):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        ({"a": (1, None, "x")}, {"a": (1, None, "x")}),
        (object(), "[object not recorded: it has no JSON form]"),
        (b"\xff", "[bytes not recorded: it has no JSON form]"),
        (iter([1]), "[list_iterator not recorded: it has no JSON form]"),
        (print, "[builtin_function_or_method not recorded: it has no JSON form]"),
        (Hostile(), "[Hostile not recorded: it has no JSON form]"),
        ({"a": [Hostile(), 1]}, {"a": ["[Hostile not recorded: it has no JSON form]", 1]}),
        (Row(n=3), {"n": 3, "secret": "**********"}),
        (Question(id="q", text="t", metadata={"v": {1}}).metadata, {"v": [1]}),
        ({(1, 2): 3}, {"(1, 2)": 3}),
        (circular(), [["[list not recorded: too deep or too large]"] * 2]),
        (1 << 50_000, hex(1 << 50_000)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_puts_a_note_where_json_has_no_form(value, recorded):
    assert schema.plain(value) == recorded
    dumps(a_trajectory(metadata={"v": schema.plain(value)}))


def test_plain_stops_before_memory_does(monkeypatch):
    monkeypatch.setattr(schema, "_MOST_VALUES", 10_000)
    assert len(dumps(a_trajectory(metadata={"v": schema.plain(laughs())}))) < 2_000_000


@given(st.recursive(values | st.binary(max_size=3) | st.builds(object), st.lists, max_leaves=5))
def test_whatever_is_plain_can_be_written(value):
    dumps(a_trajectory(metadata={"v": schema.plain(value)}))


def test_a_circular_value_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(InputError, match="'t1'"):
        dumps(a_trajectory(metadata={"v": loop}))


def test_unknown_fields_are_ignored():
    record = a_record(added_later={"x": 1})
    record["question"]["also_added"] = 1
    assert loads(json.dumps(record)) == a_trajectory()


def test_field_order_and_spaces_do_not_matter():
    record = dict(reversed(a_record().items()))
    assert loads("  " + json.dumps(record, indent=1)) == a_trajectory()


def test_missing_optional_fields_take_their_defaults():
    line = '{"schema":1,"id":"t1","question":{"id":"q1","text":"Who?"}}'
    assert loads(line) == a_trajectory()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not a line of JSON"),
        ('{"schema":1,"id":"t1","ques', "not a line of JSON"),
        pytest.param("[" * 100_000, "not a line of JSON", id="deep nesting"),
        (b"\xff\xfe\x00", "not a line of JSON"),
        ("[1]", "holds a list"),
        ('{"id":"t1"}', "schema is None"),
        ('{"schema":true}', "schema is True"),
        ('{"schema":0}', "schema is 0"),
        ('{"schema":1,"id":"t1"}', "'t1' is not a trajectory: question: Field required"),
        (json.dumps(a_record(branch="sideways")), "branch: Input should be 'free', 'direct' or 'tool'"),
        (json.dumps(a_record(calls=[{"node": 1, "step": "x"}])), r"calls.0.node: .* \(and 1 more\)"),
    ],
)
def test_what_is_no_trajectory_is_refused(line, message):
    with pytest.raises(InputError, match=message):
        loads(line)
    with pytest.raises(InputError):
        schema.identity('{"schema":1,"id":7}')


def test_a_newer_version_is_refused_with_the_remedy():
    with pytest.raises(SchemaVersionError, match=r"'t1' has schema 2; .* reads up to 1\. Upgrade langgraph-metis"):
        loads(json.dumps(a_record(schema=2)))


def test_an_older_version_is_migrated_step_by_step(monkeypatch):
    old = dumps(a_trajectory(answer="Ada"))

    def renamed(record):
        record["said"] = record.pop("answer")
        return record

    def renamed_back(record):
        record["answer"] = record.pop("said").upper()
        return record

    monkeypatch.setattr(schema, "SCHEMA_VERSION", 3)
    monkeypatch.setitem(schema.MIGRATIONS, 1, renamed)
    monkeypatch.setitem(schema.MIGRATIONS, 2, renamed_back)
    assert loads(old) == a_trajectory(answer="ADA")
    assert json.loads(dumps(a_trajectory()))["schema"] == 3


def test_every_older_version_has_its_migration():
    assert sorted(schema.MIGRATIONS) == list(range(1, schema.SCHEMA_VERSION))
