"""LangSmith: runs as JSONL, from the client and the CLI, or as Parquet from a bulk export; feedback beside them.

A line is what `Client.runs.query` or the older `Client.list_runs` yields (`run.model_dump_json()`), what
`langsmith trace export` writes (`run_id` for `id`), or a feedback (`Client.list_feedback`). A bulk export has the same
fields as columns, objects as JSON text. Trees are by `dotted_order` where it is there, else by the parents' ids.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from metis_agent.errors import InputError
from metis_agent.traces.messages import messages_of, reply_of, tool_definitions
from metis_agent.traces.registry import Importer, ModelSpan, ToolSpan, Trace
from metis_agent.traces.values import as_json, ids_above, text_of, time_of, usage_of

__all__ = ["LangSmith"]

_TEXTS = ("inputs", "outputs", "extra", "metadata", "feedback_stats", "tags")
_THREADS = ("session_id", "conversation_id", "thread_id")
_USERS = ("user_id", "user", "langgraph_auth_user_id")
_SAMPLING = ("temperature", "top_p", "max_tokens", "seed", "reasoning_effort")


class LangSmith(Importer):
    """Runs of LangSmith."""

    name = "langsmith"
    title = "LangSmith runs and feedback, JSONL or bulk-export Parquet"
    source = "https://docs.langchain.com/langsmith/run-data-format, https://docs.langchain.com/langsmith/data-export"
    versions = "langsmith 0.4 to 0.15, bulk export of 2026"

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """Runs have a type and belong to a trace; feedback has a run and a key."""
        return "run_type" in record or ("run_id" in record and "key" in record and "score" in record)

    def parts(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """A run, with the runs in it where it was read with its children; or a feedback."""
        if "run_type" not in record:
            if not self.recognises(record):
                raise InputError("neither a LangSmith run (no run_type) nor feedback (no run_id and key)")
            yield str(record.get("trace_id") or record["run_id"]), record
            return
        own = record.get("id") or record.get("run_id")
        order = str(record.get("dotted_order") or "")
        trace = record.get("trace_id") or order.partition(".")[0].partition("Z")[2] or own
        if not own or not trace:
            raise InputError("a LangSmith run without id")
        children = record.get("child_runs") or ()
        yield str(trace), {**record, "child_runs": None} if children else record
        for child in children:
            yield from self.parts({"trace_id": trace, "parent_run_id": own, **child})

    def traces(self, key: str, parts: Sequence[Mapping[str, Any]]) -> Iterable[Trace]:
        """One trace: its LLM runs, tool runs, root and feedback."""
        trace = Trace(id=key, source=self.name)
        runs: dict[str, dict[str, Any]] = {}
        for part in parts:
            run = {name: as_json(value) if name in _TEXTS else value for name, value in part.items()}
            if "run_type" not in run:
                trace.feedback.append(_feedback(run))
                continue
            id_ = str(run.get("id") or run["run_id"])
            if id_ in runs:
                trace.odd["span that came twice"] += 1
                if _whole(runs[id_]) >= _whole(run):
                    continue
            runs[id_] = {**run, "run_type": str(run["run_type"]).lower()}
        if not runs:
            raise InputError("feedback on a trace that is not in the export")
        for id_, run in runs.items():
            self._add(trace, id_, run, _parents(id_, run, runs))
        _root(trace, runs)
        return [trace]

    def _add(self, trace: Trace, id_: str, run: Mapping[str, Any], parents: tuple[str, ...]) -> None:
        inputs, outputs = _mapping(run.get("inputs")), _mapping(run.get("outputs"))
        extra = _mapping(run.get("extra"))
        metadata = {**_mapping(extra.get("metadata")), **_mapping(run.get("metadata"))}
        error = str(run.get("error") or "")
        start, end = time_of(run.get("start_time")), time_of(run.get("end_time"))
        trace.conversation = trace.conversation or str(run.get("thread_id") or _first(metadata, _THREADS))
        trace.user = trace.user or _first(metadata, _USERS)
        if run["run_type"] == "llm":
            parameters = _mapping(extra.get("invocation_params"))
            reply = reply_of(outputs, trace.odd)
            message = reply or {}
            usage = next((found for found in map(usage_of, _usages(run, outputs, metadata, message)) if found), {})
            model = (
                metadata.get("ls_model_name") or message.get("model") or parameters.get("model")
                or parameters.get("model_name") or inputs.get("model")
            )  # fmt: skip
            tools = parameters.get("tools") or inputs.get("tools") or _mapping(extra.get("options")).get("tools")
            trace.models.append(
                ModelSpan(
                    id=id_, input=messages_of(inputs, trace.odd), output=reply, parents=parents, error=error,
                    name=str(metadata.get("langgraph_node") or run.get("name") or ""), model=str(model or ""),
                    usage=usage, tools=tool_definitions(tools), start=start, end=end,
                    sampling={key: parameters[key] for key in _SAMPLING if parameters.get(key) is not None},
                )
            )  # fmt: skip
        elif run["run_type"] == "tool":
            output = outputs.get("output", outputs)
            results = [m for m in messages_of(output, trace.odd) if m["type"] == "tool"] if _is_message(output) else []
            given = inputs.get("input", inputs) if set(inputs) <= {"input"} else inputs
            failed = error or (text_of(results[0]["content"]) if results and results[0].get("status") else "")
            trace.tools.append(
                ToolSpan(
                    id=id_, name=str(run.get("name") or ""), parents=parents, arguments=_arguments(given), error=failed,
                    call_id=results[0]["tool_call_id"] if results else str(metadata.get("tool_call_id") or ""),
                    content=results[0]["content"] if results else text_of(output or ""), start=start, end=end,
                )
            )  # fmt: skip


def _root(trace: Trace, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """What the root says of the whole; a root that is missing is counted."""
    roots = [run for id_, run in runs.items() if not _parents(id_, run, runs)]
    trace.ended = bool(roots) and roots[0].get("end_time") is not None
    if not roots:
        trace.odd["trace without a root"] += 1
        return
    root = roots[0]
    trace.name = str(root.get("name") or "")
    trace.error = str(root.get("error") or "")
    trace.start, trace.end = time_of(root.get("start_time")), time_of(root.get("end_time"))
    trace.metadata = {"tags": root["tags"]} if root.get("tags") else {}
    said = _mapping(root.get("outputs"))
    if root["run_type"] != "llm":
        trace.messages = messages_of(said["messages"], trace.odd) if isinstance(said.get("messages"), list) else []
    given = {feedback["key"] for feedback in trace.feedback}
    for key, stats in _mapping(root.get("feedback_stats")).items():
        if key not in given and isinstance(stats, Mapping) and stats.get("avg") is not None:
            trace.feedback.append({"key": key, "score": stats["avg"], "n": stats.get("n")})


def _parents(id_: str, run: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The runs around it, outermost first."""
    order = str(run.get("dotted_order") or "")
    if "." in order:
        return tuple(piece.partition("Z")[2] for piece in order.split(".")[:-1])
    if run.get("parent_run_ids"):
        return tuple(map(str, run["parent_run_ids"]))
    return ids_above(id_, lambda each: str(_mapping(runs.get(each)).get("parent_run_id") or ""))


def _usages(
    run: Mapping[str, Any], outputs: Mapping[str, Any], metadata: Any, reply: Mapping[str, Any]
) -> Iterator[Any]:
    """Where a run's tokens may stand, the most exact first."""
    yield reply.get("usage_metadata")
    yield outputs.get("usage_metadata")
    yield metadata.get("usage_metadata")
    yield reply.get("usage")
    yield _mapping(outputs.get("llm_output")).get("token_usage")
    yield {
        "prompt_tokens": run.get("prompt_tokens"), "completion_tokens": run.get("completion_tokens"),
        "prompt_tokens_details": _details(run.get("prompt_token_details")),
        "completion_tokens_details": _details(run.get("completion_token_details")),
    }  # fmt: skip


def _details(value: Any) -> Mapping[str, Any]:
    return _mapping(_mapping(value).get("raw", value))


def _feedback(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: record.get(key) for key in ("score", "value", "comment", "correction")}
    return {"key": str(record["key"] or "feedback"), **{key: it for key, it in kept.items() if it is not None}}


def _whole(run: Mapping[str, Any]) -> tuple[bool, int]:
    """Of two records of a run the one that has ended is better: the first is from when it began."""
    return run.get("end_time") is not None, sum(value is not None for value in run.values())


def _is_message(value: Any) -> bool:
    value = as_json(value)
    if not isinstance(value, Mapping):
        return False
    return "tool_call_id" in {**value, **_mapping(value.get("kwargs") or value.get("data"))}


def _arguments(value: Any) -> Any:
    parsed = as_json(value)
    if isinstance(parsed, str) and parsed[:1] == "{":  # LangChain writes the arguments as Python does
        try:
            return ast.literal_eval(parsed)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return parsed
    return parsed


def _mapping(value: Any) -> Mapping[str, Any]:
    value = as_json(value)
    return value if isinstance(value, Mapping) else {}


def _first(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((str(values[key]) for key in keys if values.get(key)), "")
