"""What may run of what the model asked for.

Narrowing the tools that a model is offered is advice: it may call any of them all the same, or one that does
not exist. So every call of every reply passes here; what does not pass gets its message and never runs.
The same goes for loops: a call that was made before is answered, not run.
Sources: neuro-san-studio#1239 (narrowing without enforcement is a vulnerability), langchain#34159 (no orphans),
langgraph#4231, langgraph#6731, deepagents#3583 (models that repeat one call until the recursion limit), deer-flow#2511
(legitimate repeats must stay possible, tool by tool).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from langchain_core.messages import AIMessage, AnyMessage, InvalidToolCall, ToolCall, ToolMessage
from langchain_core.utils.json import parse_partial_json

from metis_agent.messages import new_call_id, text_of
from metis_agent.rules.asking import Plan, SentCall
from metis_agent.rules.budget import ToolTerms
from metis_agent.rules.rules import Offer, Rules
from metis_agent.rules.shapes import open_calls, rewritten, without_calls
from metis_agent.rules.state import Notes
from metis_agent.types import GateDecision, Spending, ToolOutcome

__all__ = [
    "NONE_COULD_RUN",
    "CallKey",
    "call_key",
    "duplicate_of",
    "earlier_result",
    "echo_of",
    "fruitless_round",
    "no_such_tool",
    "plan_calls",
    "progress_of",
    "stripped",
]


_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")
CallKey = tuple[str, str]
"""Tool name and canonical arguments."""

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=repr).encode
_REPEATED = "This exact call was already made in this turn and was not run again. Its result was:\n"
_STALE_ROUNDS = 3
NONE_COULD_RUN = "no tool call of the last two messages could be run"
_NEVER = "it is never to be called"
_UNTOLD = ToolTerms()
_DUPLICATE = "An identical call in the same message, {id}, runs in place of this one; its result counts for both."


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call as far as it can be read."""

    id: str
    tool: str
    arguments: dict[str, Any]
    fault: str | None = None


def call_key(tool: str, arguments: Mapping[str, Any]) -> CallKey:
    """Two calls are the same where tool and arguments agree, whatever the order of the keys."""
    return tool, _canonical(arguments)


def earlier_result(key: CallKey, latest: Sequence[ToolOutcome]) -> ToolOutcome | None:
    """The result of the same call, where nothing else has run since: what else has run may have changed it.

    Args:
        key: of the call.
        latest: outcomes of what the turn has executed last, side by side.
    """
    if len(latest) != 1 or latest[0].tool != key[0] or call_key(latest[0].tool, latest[0].arguments) != key:
        return None
    return latest[0]


def progress_of(notes: Notes, ran: Sequence[ToolOutcome], messages: Sequence[AnyMessage]) -> dict[str, Any]:
    """What the notes say of progress after a round of calls: a loop is told by results that do not change."""
    ids = {outcome.call_id for outcome in ran}
    results = {m.tool_call_id: m for m in messages if m.type == "tool" and m.tool_call_id in ids}
    digests = [_digest_of(outcome, results.get(outcome.call_id)) for outcome in ran]
    known = notes["digests"]
    stale = notes["stale"] + 1 if not notes["polls"] and all(digest in known for digest in digests) else 0
    changes = {"latest": sorted(ids), "digests": [*known, *digests], "stale": stale}
    if stale >= _STALE_ROUNDS:
        changes["loop"] = "the same tool calls brought the same results again and again"
    return changes


def fruitless_round(notes: Notes, plan: Plan) -> dict[str, Any]:
    """What the notes say after a reply of which no call ran; one whose calls were all refused ends the turn."""
    fruitless, loop = notes["fruitless"] + 1, notes["loop"]
    if not plan.slipped and all(outcome.status == "blocked" for outcome in plan.outcomes):
        loop = "all tool calls of the last message were blocked"
    elif fruitless >= 2:
        loop = NONE_COULD_RUN if plan.slipped else "the same tool calls were only repeated"
    return {"fruitless": fruitless, "loop": loop}


def _digest_of(outcome: ToolOutcome, result: ToolMessage | None) -> str:
    """Two calls with the same digest were the same and brought the same."""
    content = outcome.content if result is None or isinstance(result.content, str) else repr(result.content)
    whole = f"{call_key(outcome.tool, outcome.arguments)}{outcome.status}{content}"
    return hashlib.blake2b(whole.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def echo_of(result: ToolMessage, call_id: str) -> ToolMessage:
    """An earlier result as the answer to a repeated call, saying that it is one."""
    content: Any = result.content
    if isinstance(content, str):
        content = _REPEATED + content
    elif not result.text and (free := text_of(result)):
        content = _REPEATED + free
    else:
        content = [{"type": "text", "text": _REPEATED}, *content]
    return ToolMessage(content=content, name=result.name, tool_call_id=call_id, status=result.status)


def duplicate_of(call: ToolCall, call_id: str) -> ToolMessage:
    """The answer to an identical call beside one that runs."""
    return ToolMessage(_DUPLICATE.format(id=call["id"]), name=call["name"], tool_call_id=call_id)


def plan_calls(
    rules: Rules,
    offer: Offer,
    message: AIMessage,
    decision: GateDecision,
    *,
    spent: Spending,
    outcomes: Sequence[ToolOutcome],
    latest: Sequence[ToolOutcome],
    messages: Sequence[AnyMessage],
    answered: Collection[str] = (),
    cut: bool = False,
    as_given: bool = False,
) -> Plan:
    """Settle each call of a reply: run it, block it, or answer it with an earlier result.

    Args:
        rules: the agent's.
        offer: its tools.
        message: the model's reply.
        decision: what the gate allowed for it.
        spent: what the turn had spent before it.
        outcomes: the turn's earlier outcomes.
        latest: those of them that were executed last, side by side.
        messages: the conversation before the reply.
        answered: ids of calls that have their message already.
        cut: the token limit has cut the reply short.
        as_given: a call without an id is none of the rules' business.
    """
    message, calls = _read_calls(message, offer, _ids_in(messages, outcomes), answered, cut, as_given)
    plan = Plan(message=message)
    running: dict[CallKey, SentCall] = {}
    for call in calls:
        added, terms = offer.open and call.tool not in offer.terms, offer.terms.get(call.tool, _UNTOLD)
        slip = call.fault or (None if added or call.tool in offer.terms else no_such_tool(offer))
        reason = slip or (None if added else _refusal(rules, offer, call.tool, decision, spent))
        if added and call.tool in rules.never:
            reason = reason or _NEVER
        key = call_key(call.tool, call.arguments)
        if reason is None and not terms.repeatable and call.id:
            # What stands between two of them may change what the second one would bring.
            if (same := running.get(key)) is not None and key == next(reversed(running)):
                _settle(plan, call, "repeated", duplicate_of(same, call.id))
                continue
            # A call of no tool that was seen on offer may run nowhere, so it is nothing that another runs after.
            beside = any(name in offer.terms for name, _ in running)
            if not beside and (earlier := earlier_result(key, latest)):
                _settle(plan, call, "repeated", echo_of(_message_of(earlier, messages), call.id))
                continue
        if not (rules.counts_calls_only and spent.calls < rules.budget.calls):
            reason = reason or rules.budget.refuses(call.tool, terms.cost, spent)
        if reason:
            plan.slipped |= slip is not None
            text = rules.block(call.tool, reason)
            _settle(plan, call, "blocked", ToolMessage(text, name=call.tool, tool_call_id=call.id, status="error"))
        else:
            sent = SentCall(name=call.tool, args=call.arguments, id=call.id, type="tool_call")
            if rules.budget.seconds is not None:
                sent["seconds_left"] = rules.budget.seconds - spent.seconds
            running.pop(key, None)
            running[key] = sent
            plan.run.append([sent])
            plan.tools.append(call.tool)
            spent = _after_one_more(call.tool, terms.cost, spent)
    return plan


def stripped(
    rules: Rules, message: AIMessage | None, answered: Collection[str]
) -> tuple[AIMessage | None, list[ToolOutcome]]:
    """A last answer without the calls that wait for a result, and their outcomes: blocked."""
    outcomes = []
    for call in () if message is None else open_calls(message, answered):
        call = call if isinstance(call, Mapping) else {}
        tool, arguments = call.get("name") or "unnamed", call.get("args")
        content = rules.block(tool, "no tool can be called in the last answer of a turn")
        outcomes.append(
            ToolOutcome(
                call_id=call.get("id") or "", tool=tool, arguments=arguments if isinstance(arguments, dict) else {},
                status="blocked", content=content,
            )
        )  # fmt: skip
    return (message if message is None or not outcomes else without_calls(message, answered)), outcomes


def _refusal(rules: Rules, offer: Offer, tool: str, decision: GateDecision, spent: Spending) -> str | None:
    """Why the tool is not on offer."""
    if tool in offer.remote:
        return "it runs at the model's provider, and can't be called from here"
    if tool in decision.allowed:
        return None
    if tool in rules.never:
        return _NEVER
    over_budget = rules.budget.refuses(tool, offer.terms[tool].cost, spent)
    return over_budget or "the gate did not allow it at this step"


def no_such_tool(offer: Offer) -> str:
    """What is wrong with a call of another tool."""
    return f"there is no tool of that name, only {', '.join(offer.names) or 'none at all'}"


def _settle(plan: Plan, call: _Call, status: Literal["blocked", "repeated"], reply: ToolMessage) -> None:
    plan.replies.append(reply)
    plan.outcomes.append(
        ToolOutcome(call_id=call.id, tool=call.tool, arguments=call.arguments, status=status, content=text_of(reply))
    )


def _message_of(outcome: ToolOutcome, messages: Sequence[AnyMessage]) -> ToolMessage:
    """The message that carried an outcome; made again where somebody has trimmed it from the conversation."""
    for message in reversed(messages):
        # Its text tells it from the result of another turn: some models number their calls anew in every turn.
        if isinstance(message, ToolMessage) and message.tool_call_id == outcome.call_id:
            if text_of(message) == outcome.content:
                return message
            break
    status: Literal["success", "error"] = "success" if outcome.status == "ok" else "error"
    return ToolMessage(outcome.content, name=outcome.tool, tool_call_id=outcome.call_id, status=status)


def _after_one_more(tool: str, cost: float, spent: Spending) -> Spending:
    per_tool = {**spent.calls_per_tool, tool: spent.calls_per_tool.get(tool, 0) + 1}
    return Spending(calls=spent.calls + 1, calls_per_tool=per_tool, seconds=spent.seconds, cost=spent.cost + cost)


def _ids_in(messages: Sequence[AnyMessage], outcomes: Sequence[ToolOutcome]) -> set[str]:
    """The ids of all calls so far."""
    ids = {outcome.call_id for outcome in outcomes}
    for message in messages:
        if isinstance(message, AIMessage):
            ids.update([call["id"] or "" for call in open_calls(message)])
    return ids


def _read_calls(
    message: AIMessage, offer: Offer, taken: Collection[str], answered: Collection[str], cut: bool, as_given: bool
) -> tuple[AIMessage, list[_Call]]:
    """All open calls of a reply, the unreadable ones too, and the reply with one id of its own for each of them.

    Some models number their calls anew in every reply, and some servers give no ids, so an id of an earlier reply, or
    none, is only replaced; within one reply, a second call with the same id is a fault.
    """
    ids: set[str] = set(answered)
    calls: list[_Call] = []
    now: list[Any] = []
    last = -1
    for place, raw in enumerate(open_calls(message)):
        if isinstance(raw, Mapping) and raw.get("id") in answered:
            now.append(raw)
        elif place < len(message.tool_calls):
            last = len(calls)
            calls.append(call := _read(raw, offer, taken, ids, as_given))
            now.append(ToolCall(name=call.tool, args=call.arguments, id=call.id, type="tool_call"))
        else:
            fault = f"its arguments can't be read: {raw.get('error') or raw.get('args')!r}"
            calls.append(call := replace(_read({**raw, "args": {}}, offer, taken, ids), fault=fault))
            now.append(
                InvalidToolCall(
                    name=call.tool, args=raw.get("args") or "", id=call.id, error=raw.get("error"),
                    type="invalid_tool_call",
                )
            )  # fmt: skip
    whole = not cut or any(_is_cut(call["args"]) for call in message.invalid_tool_calls)
    if not whole and last >= 0 and not calls[last].fault:
        # LangChain closes what is open in streamed JSON, and some providers do the same: the last call that can be
        # read is the one that was cut, whatever can't be read before it.
        calls[last] = replace(calls[last], fault="the token limit has cut the reply short within it")
    return rewritten(message, now), calls


def _is_cut(arguments: str | None) -> bool:
    """True for JSON that could be read if it went on, and not as it is."""
    try:
        json.loads(arguments or "", strict=False)
    except (ValueError, RecursionError):
        try:
            return isinstance(parse_partial_json(arguments or ""), dict)
        except (ValueError, RecursionError):
            pass
    return False


def _read(raw: Any, offer: Offer, taken: Collection[str], ids: set[str], as_given: bool = False) -> _Call:
    raw = raw if isinstance(raw, Mapping) else {}
    name, arguments, id_ = raw.get("name"), raw.get("args"), raw.get("id")
    fault = None
    if not isinstance(arguments, dict):
        fault, arguments = f"its arguments are {arguments!r}, not an object with named values", {}
    if not isinstance(name, str) or not name.strip():
        fault, name = "it names no tool", "unnamed"
    if as_given and not id_ and fault is None and name in offer.terms and "" not in taken and "" not in ids:
        ids.add("")
        return _Call(id=cast(str, id_), tool=name, arguments=arguments)
    if not isinstance(id_, str) or not id_:
        # Some servers give none: it needs one of its own, which its result then names.
        id_ = None
    elif id_ in ids:
        fault, id_ = fault or f"its id {id_!r} belongs to another call of the same message", None
    if name not in offer.terms and not _NAME.fullmatch(name):
        # No provider would take it back.
        fault, name = fault or f"there is no tool of the name {name!r}", _NOT_IN_NAMES.sub("_", name)[:64]
    if id_ is None or id_ in taken:
        id_ = new_call_id()
    ids.add(raw["id"] if isinstance(raw.get("id"), str) else id_)
    return _Call(id=id_, tool=name, arguments=arguments, fault=fault)
