"""What may happen to a conversation behind a gate: a script for the model, what decides, and what has to come of it.

Each scenario is written in no provider's terms, and holds at every provider, in both hosts, however it is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool, StructuredTool, ToolException, tool

from metis_agent import Budget
from metis_agent.gates import Gate, ModelGate, NeverGate
from metis_agent.types import GateDecision, GateRequest
from tests.middleware.helpers import Verdict
from tests.providers.server import Call, Reply
from tests.providers.shapes import Shape

__all__ = ["ALL", "PICTURE", "RAN", "SCENARIOS", "Scenario", "Steps", "Verdict"]

ALL = ("look", "pay", "find", "photo", "fail", "typed")


class Steps(Gate):
    """Allows, step by step, the tools of its script; the last step's for ever after."""

    def __init__(self, *steps: Sequence[str], required: bool = False, draft: bool = False) -> None:
        super().__init__(required=required)
        self.wants_draft = draft
        self._steps = steps
        self._next = 0

    def begin(self) -> None:
        """The script anew."""
        self._next = 0

    def decide(self, request: GateRequest) -> GateDecision:
        names = self._steps[min(self._next, len(self._steps) - 1)]
        self._next += 1
        allowed = tuple(spec.name for spec in request.tools if spec.name in names)
        return GateDecision(allowed=allowed, required=bool(allowed) and self.required, gate="steps")


RAN: list[str] = []
"""The tools that have run, in the scenario that is played now."""


def _made(name: str, answer: Callable[[Any], Any], argument: str = "query", kind: str = "string") -> BaseTool:
    """A tool whose schema is plain JSON: to bind pydantic models for every agent takes longer than all the rest."""

    def run(**arguments: Any) -> Any:
        if argument not in arguments:
            raise ToolException(f"{argument} is missing")
        RAN.append(name)
        return answer(arguments[argument])

    schema = {"type": "object", "properties": {argument: {"type": kind}}, "required": [argument], "title": name}
    return StructuredTool(
        name=name, description=f"{name.capitalize()} it.", args_schema=schema, func=run, handle_tool_error=True
    )


def _fail(query: str) -> Any:
    raise ToolException("no such thing")


@tool
def typed(query: str) -> str:
    """Take a text, and nothing else."""
    RAN.append("typed")
    return query


PICTURE = {
    "type": "image", "mime_type": "image/png",
    "base64": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==",
}  # fmt: skip


_TOOLS: Mapping[str, BaseTool] = {
    tool.name: tool
    for tool in (
        _made("look", lambda query: f"found {query}"),
        _made("pay", lambda amount: f"paid {amount}", "amount", "integer"),
        # As MCP tools answer.
        _made("find", lambda query: [{"type": "text", "text": f"found {query}"}]),
        _made("photo", lambda query: [{"type": "text", "text": "a picture"}, PICTURE]),
        _made("fail", _fail),
        typed,
    )
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One conversation."""

    script: tuple[Reply, ...]
    gate: Callable[[], Gate] = ModelGate
    budget: Budget | None = None
    says: str = "done"
    """What the answer holds."""
    ran: tuple[str, ...] | None = ()
    """The tools that have run; `None`: it differs between providers."""
    requests: int | None = None
    """How often the model is asked; `None`: it differs between providers."""
    earlier: tuple[AnyMessage, ...] = ()
    """The conversation before."""
    question: str | list[Any] = "a question"
    shapes: Callable[[Shape], bool] = lambda shape: True
    hosts: tuple[str, ...] = ("graph", "middleware")
    uses: tuple[str, ...] = ("look", "pay")
    """The tools of the agent."""
    more: Callable[[Shape], Sequence[Any]] = lambda shape: ()
    """Further tools."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords for `create_agent`."""
    statuses: tuple[str, ...] | None = None
    """Of the turn's outcomes, sorted."""

    def tools(self, shape: Shape) -> list[Any]:
        """All tools of the agent."""
        return [*(_TOOLS[name] for name in self.uses), *self.more(shape)]


def look(query: str = "x", id: str | None = None) -> Call:
    return Call("look", {"query": query}, id)


def pay(amount: int = 1, id: str | None = None) -> Call:
    return Call("pay", {"amount": amount}, id)


def calls(*calls: Call, text: str = "", end: str = "") -> Reply:
    return Reply(text, calls=calls, end=end)


DONE = Reply("it is done")
SILENT = Reply()
ONCE = (calls(look()), DONE)


def _searches(shape: Shape) -> bool:
    return shape.search is not None


def _search_tool(shape: Shape) -> Sequence[Any]:
    return [dict(shape.search or {})]


def _free_tool(shape: Shape) -> Sequence[Any]:
    from langchain_openai import custom_tool

    @custom_tool
    def code(text: str) -> str:
        """Run code."""
        return "27"

    return [code]


def _lost(*answered: str) -> tuple[AnyMessage, ...]:
    """A conversation that broke off between a call and its result."""
    both = [{"name": "look", "args": {"query": name}, "id": name, "type": "tool_call"} for name in ("a1", "a2")]
    results = [ToolMessage("found", name="look", tool_call_id=name) for name in answered]
    return (HumanMessage("before", id="h0"), AIMessage("", tool_calls=both, id="a0"), *results)


def _used(id: str | None = "a1") -> tuple[AnyMessage, ...]:
    """A conversation in which a tool has run."""
    asked = [{"name": "look", "args": {"query": "x"}, "id": id, "type": "tool_call"}]
    return (
        HumanMessage("before", id="h0"),
        AIMessage("", tool_calls=asked, id="a0"),
        ToolMessage("found x", name="look", tool_call_id=id or ""),
        AIMessage("it was found", id="a9"),
    )


def _unsigned(shape: Shape) -> bool:
    """Histories made up here have no thoughts, and no signatures."""
    return not shape.thinks


SCENARIOS: Mapping[str, Scenario] = {
    # What a gate does.
    "answered directly": Scenario(script=(DONE,), gate=NeverGate, requests=1),
    "a call": Scenario(script=ONCE, ran=("look",), requests=2, statuses=("ok",)),
    "a call after some words": Scenario(script=(calls(look(), text="I will look it up."), DONE), ran=("look",)),
    "blocked": Scenario(
        script=(calls(pay()), DONE), gate=lambda: Steps(["look"]), requests=2, statuses=("blocked",)
    ),
    "partly blocked": Scenario(
        script=(calls(look(), pay()), DONE), gate=lambda: Steps(["look"]), ran=("look",), statuses=("blocked", "ok")
    ),
    "a call is required": Scenario(
        script=ONCE, gate=lambda: Steps(["look"], (), required=True), ran=("look",), shapes=_unsigned
    ),
    "a required call written as text": Scenario(
        script=(Reply('```json\n{"name": "look", "arguments": {"query": "x"}}\n```'), DONE), requests=2,
        gate=lambda: Steps(["look"], (), required=True), ran=("look",), shapes=_unsigned, statuses=("ok",),
    ),
    "then direct": Scenario(script=ONCE, gate=lambda: Steps(["look"], ()), ran=("look",), requests=2),
    "then direct, and it calls again": Scenario(
        script=(calls(look()), calls(pay()), DONE), gate=lambda: Steps(["look"], ()), ran=("look",), requests=3
    ),
    "direct, and it calls": Scenario(
        script=(calls(look()), DONE), gate=NeverGate, requests=2, statuses=("blocked",)
    ),
    "direct, and it answers and calls": Scenario(
        script=(calls(look(), text="it is done"),), gate=NeverGate, requests=1
    ),
    "direct, and it only ever calls": Scenario(script=(calls(look()),), gate=NeverGate, says="gave no answer"),
    "direct in a thread that used tools": Scenario(
        script=(DONE,), gate=NeverGate, requests=1, earlier=_used(), shapes=_unsigned
    ),
    "the draft is the answer": Scenario(script=(DONE,), gate=lambda: Steps((), draft=True), requests=1),
    "a draft, then a call": Scenario(
        script=(Reply("a draft"), *ONCE), gate=lambda: Steps(ALL, draft=True), ran=("look",), requests=3
    ),
    "a draft that calls": Scenario(script=(calls(look()), DONE), gate=lambda: Steps((), draft=True), says="done"),
    "a draft that answers and calls": Scenario(
        script=(calls(look(), text="it is done"),), gate=lambda: Steps((), draft=True), requests=1
    ),
    # What the rules do.
    "budget spent": Scenario(script=ONCE, budget=Budget(calls=1), ran=("look",), requests=2),
    "no budget at all": Scenario(script=(DONE,), budget=Budget(calls=0), requests=1),
    "budget spent within a message": Scenario(
        script=(calls(look(), pay()), DONE), budget=Budget(calls=1), ran=("look",), statuses=("blocked", "ok")
    ),
    "budget spent, and it calls on": Scenario(
        script=(calls(look()), calls(pay()), DONE), budget=Budget(calls=1), ran=("look",), requests=3
    ),
    "budget spent, and it only ever calls": Scenario(
        script=(calls(look()), calls(pay())), budget=Budget(calls=1), ran=("look",), says="gave no answer"
    ),
    "a repeated call": Scenario(
        script=(calls(look()), calls(look()), DONE), ran=("look",), statuses=("ok", "repeated")
    ),
    "a repeated call of content blocks": Scenario(
        script=(*[calls(Call("find", {"query": "x"}))] * 2, DONE), uses=("find",), ran=("find",),
        statuses=("ok", "repeated"),
    ),
    "a repeated picture": Scenario(
        script=(*[calls(Call("photo", {"query": "x"}))] * 2, DONE), uses=("photo",), ran=("photo",),
        statuses=("ok", "repeated"), shapes=lambda shape: not shape.text_results,
    ),
    "twins": Scenario(script=(calls(look(), look()), DONE), ran=("look",), statuses=("ok", "repeated")),
    "twins of content blocks": Scenario(
        script=(calls(*[Call("find", {"query": "x"})] * 2), DONE), uses=("find",), ran=("find",),
        statuses=("ok", "repeated"),
    ),
    "twins, one of them over and a third blocked": Scenario(
        script=(calls(look(), look(), pay()), DONE), gate=lambda: Steps(["look"]), ran=("look",),
        statuses=("blocked", "ok", "repeated"),
    ),
    "a loop": Scenario(script=(*[calls(look())] * 4, DONE), ran=("look",), says="done"),
    "a loop for ever": Scenario(script=(calls(look()),), ran=("look",), says="gave no answer"),
    "a tool that fails": Scenario(
        script=(calls(Call("fail", {"query": "x"})), DONE), uses=("fail",), ran=("fail",), statuses=("error",)
    ),
    "lost calls": Scenario(script=(DONE,), earlier=_lost(), shapes=_unsigned),
    "one of two calls lost": Scenario(script=(DONE,), earlier=_lost("a1"), shapes=_unsigned),
    "lost calls, then direct": Scenario(script=(DONE,), gate=NeverGate, earlier=_lost("a2"), shapes=_unsigned),
    "calls without an id": Scenario(script=(DONE,), earlier=_used(None), shapes=_unsigned),
    # What models do.
    "unknown tool": Scenario(script=(calls(Call("fly", {"to": "x"})), DONE), statuses=("blocked",)),
    "unknown tool beside a known one": Scenario(
        script=(calls(Call("fly", {}), look()), DONE), ran=("look",), statuses=("blocked", "ok")
    ),
    "a name that no provider takes": Scenario(script=(calls(Call("look it up!", {})), DONE), statuses=("blocked",)),
    "bad JSON": Scenario(script=(calls(Call("look", '{"query": x}')), DONE)),
    "bad JSON beside a good call": Scenario(script=(calls(look(), Call("pay", '{"amount": x}')), DONE), ran=None),
    "a mistyped argument": Scenario(
        script=(calls(Call("typed", {"qeury": "x"})), DONE), uses=("typed",), statuses=("error",)
    ),
    # Gemini has no ids, its client makes them up.
    "an empty id": Scenario(script=(calls(look(id="")), DONE), ran=None),
    "two empty ids": Scenario(script=(calls(look(id=""), pay(id="")), DONE), ran=None),
    "one id twice in a message": Scenario(script=(calls(look(id="c1"), pay(id="c1")), DONE), ran=None),
    "one id again and again": Scenario(
        script=(calls(look("a", "look0")), calls(look("b", "look0")), DONE), ran=("look", "look")
    ),
    "an id of an earlier turn": Scenario(
        script=(calls(pay(id="look0")), DONE), earlier=_used("look0"), ran=("pay",), shapes=_unsigned
    ),
    "silence, then an answer": Scenario(script=(SILENT, DONE), requests=2),
    "silence": Scenario(script=(SILENT,), says="gave no answer", requests=2),
    "silence after a call": Scenario(script=(calls(look()), SILENT), ran=("look",), says="found x", requests=3),
    # The client for chat completions loses a refusal that is streamed.
    "a refusal": Scenario(script=(Reply(refusal="I can't help with that."),), says=""),
    "a refusal after a call": Scenario(
        script=(calls(look()), Reply(refusal="I can't help with that.")), ran=("look",), says=""
    ),
    "a safety stop": Scenario(script=(Reply(end="filter"),), says="", requests=1),
    "cut short in a call": Scenario(script=(calls(Call("look", '{"query": "/da'), end="length"), DONE), ran=()),
    "cut short after a call": Scenario(script=(calls(look(), end="length"), DONE), ran=()),
    "cut short after a call that can't be read": Scenario(
        script=(calls(Call("look", '{"query": x}'), Call("pay", '{"amount": 12'), end="length"), DONE)
    ),
    "cut short in the answer": Scenario(script=(Reply("it is done and", end="length"),), requests=1),
    "cut short before the answer": Scenario(script=(Reply(end="length"), DONE), requests=2),
    "a picture asked about": Scenario(
        script=ONCE, ran=("look",), question=[{"type": "text", "text": "what is this?"}, PICTURE]
    ),
    # What only some providers have.
    "a search at the provider": Scenario(
        script=(Reply("it is done", searched="x"),), more=_search_tool, shapes=_searches, requests=1, statuses=("ok",)
    ),
    "a search at the provider that is not allowed": Scenario(
        script=ONCE, gate=lambda: Steps(["look"]), more=_search_tool, shapes=_searches, ran=("look",)
    ),
    "a search and a call": Scenario(
        script=(Reply(searched="x", calls=(look(),)), DONE), more=_search_tool, shapes=_searches, ran=("look",),
        statuses=("ok", "ok"),
    ),
    "a search and a blocked call": Scenario(
        script=(Reply("Let me see.", searched="x", calls=(pay(),)), DONE), more=_search_tool, shapes=_searches,
        gate=lambda: Steps(["look", "web_search", "google_search"]), statuses=("blocked", "ok"),
    ),
    "nothing but a search": Scenario(
        script=(Reply("it is done", searched="x"),), uses=(), more=_search_tool, shapes=_searches, statuses=("ok",)
    ),
    "the same call, a search between": Scenario(
        script=(calls(look()), Reply(searched="x", calls=(look(),)), DONE), more=_search_tool, shapes=_searches,
        ran=("look", "look"),
    ),
    "a search that spends the budget": Scenario(
        script=(Reply(searched="x", calls=(look(),)), DONE), more=_search_tool, shapes=_searches,
        budget=Budget(calls=1), statuses=("blocked", "ok"),
    ),
    "a search without an answer": Scenario(
        script=(Reply(searched="x", end="pause"), DONE), more=_search_tool, shapes=_searches, statuses=("ok",)
    ),
    "free-form tools": Scenario(
        script=(calls(Call("code", "print(27)", free=True), Call("code", "print(27)", free=True)), DONE),
        more=_free_tool, shapes=lambda shape: shape.free_tools, budget=Budget(calls=1), statuses=("ok", "repeated"),
    ),
    "a free-form call blocked": Scenario(
        script=(calls(Call("code", "x", free=True), look()), DONE), more=_free_tool, ran=("look",),
        shapes=lambda shape: shape.free_tools, gate=lambda: Steps(["look"]), statuses=("blocked", "ok"),
    ),
    "a free-form call stripped": Scenario(
        script=(calls(Call("code", "x", free=True)), DONE), more=_free_tool, gate=NeverGate,
        shapes=lambda shape: shape.free_tools, statuses=("blocked",), requests=2,
    ),
}  # fmt: skip
