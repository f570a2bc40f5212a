"""OpenAI's two APIs, chat completions and Responses: their replies, and the requests that they refuse.

The rules are those of the API reference and of the errors that it answers with. `ClaudeChat` is chat completions as
a gateway offers them in front of Claude, which brings rules of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from tests.providers.server import Dialect, Refused, Reply, halves, words

__all__ = ["Chat", "ClaudeChat", "Responses"]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def _sse(document: dict[str, Any] | str, event: str = "") -> bytes:
    data = document if isinstance(document, str) else json.dumps(document)
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode()


class Chat(Dialect):
    """Chat completions."""

    path = "/openai/chat/completions"
    _PARTS: ClassVar[Any] = {
        "user": {"text", "image_url", "input_audio", "file"},
        "assistant": {"text", "refusal"},
        "tool": {"text"},
        "system": {"text"},
        "developer": {"text"},
    }
    _FIELDS: ClassVar[Any] = {
        "user": {"role", "content", "name"},
        "assistant": {"role", "content", "name", "refusal", "tool_calls", "function_call", "audio"},
        "tool": {"role", "content", "tool_call_id", "name"},
        "system": {"role", "content", "name"},
        "developer": {"role", "content", "name"},
    }

    def check(self, body: dict[str, Any]) -> None:
        if "tools" in body and not body["tools"]:
            raise Refused("[] is too short - 'tools'")
        for name in ("tool_choice", "parallel_tool_calls"):
            if name in body and not body.get("tools"):
                raise Refused(f"'{name}' is only allowed when 'tools' are specified.")
        if body.get("top_logprobs") is not None and not body.get("logprobs"):
            raise Refused("'top_logprobs' is only allowed when 'logprobs' is enabled.")
        if body["model"].startswith("gpt-5") and body.get("logprobs"):
            raise Refused("Unsupported parameter: 'logprobs' is not supported with this model.")
        waiting: list[str] = []
        for place, message in enumerate(body["messages"]):
            where, role = f"messages[{place}]", message["role"]
            if extra := set(message) - self._FIELDS[role]:
                raise Refused(f"Unknown parameter: '{where}.{min(extra)}'.")
            self._check_content(where, role, message.get("content"))
            if role == "tool":
                if message["tool_call_id"] not in waiting:
                    raise Refused(f"{where}: role 'tool' must be a response to a preceding message with 'tool_calls'.")
                waiting.remove(message["tool_call_id"])
                continue
            if waiting:
                raise Refused(f"'tool_calls' must be followed by tool messages for each 'tool_call_id': {waiting}")
            if role == "assistant":
                waiting = self._check_calls(where, message)
        if waiting:
            raise Refused(f"'tool_calls' must be followed by tool messages for each 'tool_call_id': {waiting}")

    def _check_content(self, where: str, role: str, content: Any) -> None:
        if content is None and role != "assistant":
            raise Refused(f"Invalid value for 'content': expected a string, got null ({where}).")
        if not isinstance(content, list):
            return
        if not content:
            raise Refused(f"Invalid '{where}.content': empty array.")
        for index, part in enumerate(content):
            if not isinstance(part, dict):
                raise Refused(f"Invalid type for '{where}.content[{index}]': expected an object, got a string.")
            if part.get("type") not in self._PARTS[role]:
                raise Refused(f"Invalid value: '{part.get('type')}' ({where}.content[{index}], role {role}).")

    def _check_calls(self, where: str, message: dict[str, Any]) -> list[str]:
        calls = message.get("tool_calls")
        if calls is not None and not calls:
            raise Refused(f"Invalid '{where}.tool_calls': empty array.")
        if not (calls or message.get("content") or message.get("refusal")):
            raise Refused(f"{where}: an assistant message must have content, a refusal or 'tool_calls'.")
        for call in calls or ():
            if not call["id"]:
                raise Refused(f"Invalid '{where}.tool_calls.id': empty string.")
            if not _NAME.fullmatch(call["function"]["name"] or ""):
                raise Refused(f"Invalid '{where}.tool_calls.function.name': {call['function']['name']!r}")
            if not isinstance(call["function"]["arguments"], str):
                raise Refused(f"Invalid type for '{where}.tool_calls.function.arguments': expected a string.")
        ids = [call["id"] for call in calls or ()]
        if len(set(ids)) < len(ids):
            raise Refused(f"Duplicate value for 'tool_call_id' in {where}: {ids}")
        return ids

    def document(self, reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text or None, "refusal": reply.refusal or None}
        if reply.calls:
            message["tool_calls"] = [
                {
                    "id": self.new_id("call_") if call.id is None else call.id,
                    "type": "function",
                    "function": {"name": call.tool, "arguments": call.raw},
                }
                for call in reply.calls
            ]
        finish = {"length": "length", "filter": "content_filter"}.get(reply.end)
        finish = finish or ("tool_calls" if reply.calls else "stop")
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        if body.get("logprobs"):
            tokens = [{"token": w, "logprob": -0.1, "bytes": None, "top_logprobs": []} for w in words(reply.text)]
            choice["logprobs"] = {"content": tokens, "refusal": None}
        return {
            "id": self.new_id("chatcmpl-"), "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [choice], "usage": _USAGE,
        }  # fmt: skip

    def events(self, document: dict[str, Any], body: dict[str, Any]) -> Iterator[bytes]:
        choice = document["choices"][0]
        message = choice["message"]
        base = {key: document[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}

        def chunk(delta: dict[str, Any], finish: str | None = None, **extra: Any) -> bytes:
            return _sse({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, **extra}]})

        yield chunk({"role": "assistant", "content": "", "refusal": None})
        tokens = (choice["logprobs"] or {}).get("content") or []
        for index, word in enumerate(words(message["content"] or "")):
            yield chunk({"content": word}, logprobs={"content": tokens[index : index + 1]} if tokens else None)
        for word in words(message["refusal"] or ""):
            yield chunk({"refusal": word})
        for index, call in enumerate(message.get("tool_calls") or ()):
            function = {"name": call["function"]["name"], "arguments": ""}
            yield chunk({"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": function}]})
            for half in halves(call["function"]["arguments"]):
                yield chunk({"tool_calls": [{"index": index, "function": {"arguments": half}}]})
        yield chunk({}, choice["finish_reason"])
        if (body.get("stream_options") or {}).get("include_usage"):
            yield _sse({**base, "choices": [], "usage": document["usage"]})
        yield _sse("[DONE]")


class ClaudeChat(Chat):
    """Chat completions of a gateway in front of Claude: stricter, as it has to translate."""

    path = "/claude/chat/completions"

    def check(self, body: dict[str, Any]) -> None:
        super().check(body)
        messages = body["messages"]
        if any(message["role"] == "tool" for message in messages) and not body.get("tools"):
            raise Refused("Anthropic doesn't support tool calling without `tools=` param specified.")
        for place, message in enumerate(messages):
            for call in message.get("tool_calls") or ():
                try:
                    arguments = json.loads(call["function"]["arguments"])
                except json.JSONDecodeError as error:
                    raise Refused(f"messages[{place}]: arguments are no JSON: {error}") from error
                if not isinstance(arguments, dict):
                    raise Refused(f"messages.{place}.content.0.tool_use.input: Input should be a valid dictionary")
            content = message.get("content")
            texts = [p.get("text", "x") for p in content] if isinstance(content, list) else [content or "x"]
            if (
                message["role"] == "assistant"
                and not message.get("tool_calls")
                and not all(text.strip() for text in texts)
            ):
                raise Refused(f"messages.{place}: text content blocks must contain non-whitespace text")


class Responses(Dialect):
    """The Responses API, with what the server has stored of earlier ones."""

    path = "/openai/responses"
    _INPUT: ClassVar[Any] = {"input_text", "input_image", "input_file"}
    _AFTER_REASONING: ClassVar[Any] = {
        "function_call", "reasoning", "web_search_call", "custom_tool_call", "code_interpreter_call", "compaction",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._thought: dict[str, str] = {}
        """Which reasoning item was given before an item."""
        self._stored: dict[str, dict[str, str]] = {}
        """The calls that a stored response waits for, by call id: their types."""

    def check(self, body: dict[str, Any]) -> None:
        for name in set(body) & {"logprobs", "max_tokens", "messages", "stop"}:
            raise Refused(f"Unknown parameter: '{name}'.")
        if "tool_choice" in body and not body.get("tools"):
            raise Refused("Tool choice must be specified with 'tools' parameter.")
        if body["model"].startswith("gpt-5") and body.get("top_logprobs") is not None:
            raise Refused("Unsupported parameter: 'top_logprobs' is not supported with this model.")
        calls: dict[str, str] = {}
        if previous := body.get("previous_response_id"):
            if previous not in self._stored:
                raise Refused(f"Previous response with id '{previous}' not found.")
            calls = dict(self._stored[previous])
        items = body["input"] if isinstance(body["input"], list) else []
        self._check_items(items, stored=body.get("store") is not False)
        answered: set[str] = set()
        for place, item in enumerate(items):
            kind = item.get("type", "message")
            if kind in ("function_call", "custom_tool_call"):
                if item["call_id"] in calls:
                    raise Refused(f"Duplicate call_id {item['call_id']!r} (input[{place}]).")
                calls[item["call_id"]] = kind
            elif kind in ("function_call_output", "custom_tool_call_output"):
                name, wanted = item["call_id"], kind.removesuffix("_output")
                if calls.get(name) != wanted or name in answered:
                    raise Refused(f"No tool call found for {wanted.replace('_', ' ')} output with call_id {name}.")
                answered.add(name)
        if left := [name for name in calls if name not in answered]:
            raise Refused(f"No tool output found for function call {left[0]}.")

    def _check_items(self, items: list[dict[str, Any]], *, stored: bool) -> None:
        seen: set[str] = set()
        for place, item in enumerate(items):
            kind, after = item.get("type", "message"), items[place + 1] if place + 1 < len(items) else {}
            if item.get("id"):
                if item["id"] in seen:
                    raise Refused(f"Duplicate item found with id {item['id']}.")
                seen.add(item["id"])
                thought = self._thought.get(item["id"])
                if stored and thought and thought not in seen:
                    raise Refused(f"Item '{item['id']}' of type '{kind}' was provided without '{thought}'.")
            if kind in ("function_call", "custom_tool_call") and not _NAME.fullmatch(item["name"] or ""):
                raise Refused(f"Invalid 'input[{place}].name': {item['name']!r}")
            if kind in ("function_call", "custom_tool_call") and not item["call_id"]:
                raise Refused(f"Invalid 'input[{place}].call_id': empty string.")
            if kind == "reasoning":
                follows = after.get("type", "message")
                if follows not in self._AFTER_REASONING and after.get("role") != "assistant":
                    raise Refused(f"Item '{item['id']}' of type 'reasoning' was provided without its following item.")
            if kind == "message":
                allowed = {"output_text", "refusal"} if item["role"] == "assistant" else self._INPUT
                self._check_parts(f"input[{place}].content", item["content"], allowed)
            if kind.endswith("_output"):
                self._check_parts(f"input[{place}].output", item["output"], self._INPUT)

    def _check_parts(self, where: str, parts: Any, allowed: set[str]) -> None:
        for index, part in enumerate(parts if isinstance(parts, list) else ()):
            if not isinstance(part, dict):
                raise Refused(f"Invalid type for '{where}[{index}]': expected an object, got a string.")
            if part.get("type") not in allowed:
                raise Refused(f"Invalid value: '{part.get('type')}' ({where}[{index}]).")

    def document(self, reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
        output: list[dict[str, Any]] = []
        if body.get("reasoning"):
            summary = [{"type": "summary_text", "text": "thinking"}]
            output.append({"type": "reasoning", "id": self.new_id("rs_"), "summary": summary})
            if "reasoning.encrypted_content" in (body.get("include") or ()):
                output[-1]["encrypted_content"] = self.new_id("enc")
        if reply.searched:
            action = {"type": "search", "query": reply.searched}
            output.append(
                {"type": "web_search_call", "id": self.new_id("ws_"), "status": "completed", "action": action}
            )
        part: dict[str, Any] = {"type": "output_text", "text": reply.text, "annotations": []}
        if reply.refusal:
            part = {"type": "refusal", "refusal": reply.refusal}
        if reply.text or reply.refusal or not (reply.calls or reply.searched or reply.end or output):
            output.append(
                {
                    "type": "message", "id": self.new_id("msg_"), "role": "assistant", "status": "completed",
                    "content": [part],
                }
            )  # fmt: skip
        for call in reply.calls:
            kind, given = ("custom_tool_call", "input") if call.free else ("function_call", "arguments")
            output.append(
                {
                    "type": kind, "id": self.new_id("ctc_" if call.free else "fc_"), "status": "completed",
                    "call_id": self.new_id("call_") if call.id is None else call.id, "name": call.tool, given: call.raw,
                }
            )  # fmt: skip
        for item in output[1:] if output and output[0]["type"] == "reasoning" else ():
            self._thought[item["id"]] = output[0]["id"]
        id_ = self.new_id("resp_")
        if body.get("store") is not False:
            self._stored[id_] = {item["call_id"]: item["type"] for item in output if "call_id" in item}
        cut = {"length": "max_output_tokens", "filter": "content_filter", "pause": "max_output_tokens"}.get(reply.end)
        return {
            "id": id_, "object": "response", "created_at": 1, "model": body["model"], "output": output,
            "status": "incomplete" if cut else "completed", "incomplete_details": {"reason": cut} if cut else None,
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None, "instructions": None,
            "metadata": {}, "temperature": 1.0, "top_p": 1.0, "text": {"format": {"type": "text"}},
            "usage": {
                "input_tokens": 10, "output_tokens": 5, "total_tokens": 15,
                "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
            },
        }  # fmt: skip

    def events(self, document: dict[str, Any], body: dict[str, Any]) -> Iterator[bytes]:
        number = 0

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return _sse({"type": f"response.{kind}", "sequence_number": number - 1, **fields}, f"response.{kind}")

        yield event("created", response={**document, "output": [], "status": "in_progress", "usage": None})
        for index, item in enumerate(document["output"]):
            at = {"output_index": index, "item_id": item["id"]}
            empty = {"content": [], "summary": [], "arguments": "", "input": ""}
            started = {key: empty.get(key, value) for key, value in item.items()}
            yield event("output_item.added", output_index=index, item=started)
            for part in item.get("content") or ():
                key = "refusal" if part["type"] == "refusal" else "text"
                kind = "refusal" if key == "refusal" else "output_text"
                yield event("content_part.added", **at, content_index=0, part={**part, key: ""})
                for word in words(part[key]):
                    yield event(f"{kind}.delta", **at, content_index=0, delta=word, logprobs=[])
                yield event(f"{kind}.done", **at, content_index=0, logprobs=[], **{key: part[key]})
                yield event("content_part.done", **at, content_index=0, part=part)
            for part in item.get("summary") or ():
                new = {**part, "text": ""}
                yield event("reasoning_summary_part.added", **at, summary_index=0, part=new)
                yield event("reasoning_summary_text.delta", **at, summary_index=0, delta=part["text"])
                yield event("reasoning_summary_part.done", **at, summary_index=0, part=part)
            for key, kind in (("arguments", "function_call_arguments"), ("input", "custom_tool_call_input")):
                if key in item:
                    for half in halves(item[key]):
                        yield event(f"{kind}.delta", **at, delta=half)
                    yield event(f"{kind}.done", **at, name=item["name"], **{key: item[key]})
            yield event("output_item.done", output_index=index, item=item)
        yield event("completed" if document["status"] == "completed" else "incomplete", response=document)
