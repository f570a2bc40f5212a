"""Anthropic's messages API and Bedrock's Converse: their replies, and the requests that they refuse.

The rules are those of the API references and of the errors that they answer with.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, ClassVar

from tests.providers.server import Dialect, Refused, Reply, halves, words

__all__ = ["Converse", "Messages"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Messages(Dialect):
    """Anthropic's messages."""

    path = "/anthropic/v1/messages"
    _BLOCKS: ClassVar[Any] = {
        "user": {"text", "image", "document", "tool_result", "search_result"},
        "assistant": {
            "text", "thinking", "redacted_thinking", "tool_use", "server_tool_use", "web_search_tool_result",
        },
    }  # fmt: skip
    _FIELDS: ClassVar[Any] = {
        "text": {"text", "citations"}, "thinking": {"thinking", "signature"}, "redacted_thinking": {"data"},
        "tool_use": {"id", "name", "input", "caller"}, "server_tool_use": {"id", "name", "input", "caller"},
        "web_search_tool_result": {"tool_use_id", "content", "caller"},
        "tool_result": {"tool_use_id", "content", "is_error"}, "image": {"source"},
        "document": {"source", "title", "context", "citations"},
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._signed: dict[str, str] = {}
        """Thoughts by their signatures."""
        self._paused: list[Any] = []

    def check(self, body: dict[str, Any]) -> None:
        messages, tools = body["messages"], body.get("tools") or []
        if "tools" in body and not tools:
            raise Refused("tools: List should have at least 1 item after validation, not 0")
        choice = (body.get("tool_choice") or {}).get("type")
        if choice and not tools:
            raise Refused("tool_choice may only be specified while providing tools.")
        thinks = (body.get("thinking") or {}).get("type") in ("enabled", "adaptive")
        if thinks and choice in ("any", "tool"):
            raise Refused("Thinking may not be enabled when tool_choice forces tool use.")
        names = [tool["name"] for tool in tools]
        if len(set(names)) < len(names):
            raise Refused("tools: Tool names must be unique.")
        if choice == "tool" and body["tool_choice"]["name"] not in names:
            raise Refused(f"Tool '{body['tool_choice']['name']}' not found in provided tools.")
        for block in body.get("system") if isinstance(body.get("system"), list) else ():
            if not block["text"].strip():
                raise Refused("system: text content blocks must contain non-whitespace text")
        # A reply that was paused in a search is sent back as it is, and goes on.
        paused = any(block in self._paused for block in messages[-1]["content"])
        if messages[0]["role"] != "user" or (messages[-1]["role"] != "user" and not paused):
            raise Refused("messages: the conversation must begin and end with a user message.")
        waiting: list[str] = []
        used: set[str] = set()
        for place, message in enumerate(messages):
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            where = f"messages.{place}"
            self._check_blocks(where, message["role"], blocks)
            self._check_results(where, blocks, waiting)
            uses = [block["id"] for block in blocks if block["type"] == "tool_use"]
            waiting = uses if message["role"] == "assistant" else waiting and []
            if used & set(uses) or len(set(uses)) < len(uses):
                raise Refused(f"{where}: `tool_use` ids must be unique")
            used |= set(uses)
        if used and not tools:
            raise Refused("Requests which include `tool_use` or `tool_result` blocks must define tools")
        if thinks:
            self._check_thoughts(messages)

    def _check_blocks(self, where: str, role: str, blocks: list[Any]) -> None:
        if not blocks:
            raise Refused(f"{where}: all messages must have non-empty content")
        for index, block in enumerate(blocks):
            here = f"{where}.content.{index}"
            if not isinstance(block, dict):
                raise Refused(f"{here}: Input should be a valid dictionary")
            kind = block["type"]
            if kind not in self._BLOCKS[role]:
                raise Refused(f"{here}: Input tag '{kind}' does not match any of the expected tags (role {role})")
            if extra := set(block) - self._FIELDS[kind] - {"type", "cache_control"}:
                raise Refused(f"{here}.{kind}.{min(extra)}: Extra inputs are not permitted")
            if kind == "text" and not block["text"].strip():
                raise Refused(f"{here}: text content blocks must contain non-whitespace text")
            if kind in ("tool_use", "server_tool_use"):
                if not isinstance(block["input"], dict):
                    raise Refused(f"{here}.{kind}.input: Input should be a valid dictionary")
                if not _ID.fullmatch(block["id"]) or not _ID.fullmatch(block["name"]):
                    raise Refused(f"{here}.{kind}.id: String should match pattern '^[a-zA-Z0-9_-]+$'")
            if kind == "tool_result" and isinstance(block.get("content"), list):
                for part in block["content"]:
                    if not isinstance(part, dict) or part["type"] not in ("text", "image", "document", "search_result"):
                        raise Refused(f"{here}.tool_result.content: Input should be a valid content block: {part!r}")
                    if part["type"] == "text" and not part["text"]:
                        raise Refused(f"{here}.tool_result.content: text content blocks must be non-empty")
            if kind == "thinking" and self._signed.get(block.get("signature", "")) != block["thinking"]:
                raise Refused(f"{here}: Invalid `signature` in `thinking` block")
        if role == "assistant" and blocks[-1]["type"] in ("thinking", "redacted_thinking"):
            raise Refused(f"{where}: The final block in an assistant message cannot be `thinking`.")
        got = {block.get("tool_use_id") for block in blocks}
        if lost := [b["id"] for b in blocks if b["type"] == "server_tool_use" and b["id"] not in got]:
            raise Refused(f"{where}: `web_search` tool use {lost} was found without a `web_search_tool_result` block")

    def _check_results(self, where: str, blocks: list[Any], waiting: list[str]) -> None:
        results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        if missing := [name for name in waiting if name not in results]:
            raise Refused(f"{where}: `tool_use` ids without `tool_result` blocks immediately after: {missing}")
        if stray := [name for name in results if name not in waiting]:
            raise Refused(f"{where}: unexpected `tool_use_id` found in `tool_result` blocks: {stray}")
        if len(set(results)) < len(results):
            raise Refused(f"{where}: each `tool_use` must have a single result")
        if any(block["type"] != "tool_result" for block in blocks[: len(results)]):
            raise Refused(f"{where}: `tool_result` blocks must come first in the content")

    def _check_thoughts(self, messages: list[Any]) -> None:
        """In an open loop of tool calls, each message that calls must still begin with its thoughts."""
        for message in reversed(messages):
            blocks = message["content"] if isinstance(message["content"], list) else []
            kinds = [block["type"] for block in blocks]
            if message["role"] == "user" and "tool_result" not in kinds:
                return
            if "tool_use" in kinds and kinds[0] not in ("thinking", "redacted_thinking"):
                raise Refused(f"messages: Expected `thinking` or `redacted_thinking`, but found `{kinds[0]}`.")

    def document(self, reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if (body.get("thinking") or {}).get("type") in ("enabled", "adaptive"):
            signature, thought = self.new_id("sig"), "hmm"
            self._signed[signature] = thought
            content.append({"type": "thinking", "thinking": thought, "signature": signature})
        if reply.searched:
            id_ = self.new_id("srvtoolu_")
            content.append(
                {"type": "server_tool_use", "id": id_, "name": "web_search", "input": {"query": reply.searched}}
            )
            found = {"type": "web_search_result", "url": "https://example.org", "title": "t", "page_age": None}
            found["encrypted_content"] = self.new_id("enc")
            content.append({"type": "web_search_tool_result", "tool_use_id": id_, "content": [found]})
        if text := reply.text or reply.refusal:
            content.append({"type": "text", "text": text})
        for call in reply.calls:
            id_ = self.new_id("toolu_") if call.id is None else call.id
            # As a string only on its way to a stream, which is where a client sees what can't be read.
            given = call.raw if body.get("stream") else call.parsed
            content.append({"type": "tool_use", "id": id_, "name": call.tool, "input": given})
        stop = {"length": "max_tokens", "filter": "refusal", "pause": "pause_turn"}.get(reply.end)
        stop = "refusal" if reply.refusal else stop
        self._paused += content if reply.end == "pause" else []
        return {
            "id": self.new_id("msg_"), "type": "message", "role": "assistant", "model": body["model"],
            "content": content, "stop_reason": stop or ("tool_use" if reply.calls else "end_turn"),
            "stop_sequence": None, "usage": {"input_tokens": 10, "output_tokens": 5},
        }  # fmt: skip

    def events(self, document: dict[str, Any], body: dict[str, Any]) -> Iterator[bytes]:
        def event(kind: str, **fields: Any) -> bytes:
            return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()

        yield event("message_start", message={**document, "content": [], "stop_reason": None})
        for index, block in enumerate(document["content"]):
            started, deltas = dict(block), []
            if block["type"] == "text":
                started["text"] = ""
                deltas = [{"type": "text_delta", "text": word} for word in words(block["text"])]
            elif block["type"] == "thinking":
                started |= {"thinking": "", "signature": ""}
                deltas = [
                    {"type": "thinking_delta", "thinking": block["thinking"]},
                    {"type": "signature_delta", "signature": block["signature"]},
                ]
            elif "input" in block:
                started["input"] = {}
                given = block["input"] if isinstance(block["input"], str) else json.dumps(block["input"])
                deltas = [{"type": "input_json_delta", "partial_json": half} for half in halves(given)]
            yield event("content_block_start", index=index, content_block=started)
            for delta in deltas:
                yield event("content_block_delta", index=index, delta=delta)
            yield event("content_block_stop", index=index)
        ending = {"stop_reason": document["stop_reason"], "stop_sequence": None}
        yield event("message_delta", delta=ending, usage={"output_tokens": 5})
        yield event("message_stop")


class Converse(Dialect):
    """Bedrock's Converse."""

    path = "/converse"
    _ENDS: ClassVar[Any] = {"length": "max_tokens", "filter": "guardrail_intervened"}

    def is_streamed(self, path: str, body: dict[str, Any]) -> bool:
        return path.endswith("converse-stream")

    def error(self, reason: str) -> dict[str, Any]:
        return {"message": reason}

    def check(self, body: dict[str, Any]) -> None:
        messages = body["messages"]
        roles = [message["role"] for message in messages]
        if roles[:1] != ["user"] or roles[-1] != "user" or any(a == b for a, b in itertools.pairwise(roles)):
            raise Refused(f"A conversation must alternate between user and assistant roles, from user to user: {roles}")
        tools = (body.get("toolConfig") or {}).get("tools")
        if "toolConfig" in body and not tools:
            raise Refused("The toolConfig.tools field must have at least 1 item.")
        waiting: list[str] = []
        seen = False
        for place, message in enumerate(messages):
            where, content = f"messages.{place}.content", message["content"]
            if not content:
                raise Refused(f"The content field in the Message object at messages.{place} is empty.")
            for index, block in enumerate(content):
                self._check_block(f"{where}.{index}", message["role"], block)
            uses = [block["toolUse"]["toolUseId"] for block in content if "toolUse" in block]
            results = [block["toolResult"]["toolUseId"] for block in content if "toolResult" in block]
            if sorted(waiting) != sorted(results):
                raise Refused(f"Expected toolResult blocks at {where} for the following Ids: {waiting}, not {results}")
            if len(set(uses)) < len(uses):
                raise Refused(f"The toolUse blocks at {where} contain duplicate Ids: {uses}")
            waiting = uses
            seen = seen or bool(uses or results)
        if seen and not tools:
            raise Refused("The toolConfig field must be defined when using toolUse and toolResult content blocks.")
        if self._thinks(body):
            choice = (body.get("toolConfig") or {}).get("toolChoice") or {}
            if set(choice) & {"any", "tool"}:
                raise Refused("Thinking may not be enabled when tool_choice forces tool use.")
            self._check_thoughts(messages)

    def _check_block(self, where: str, role: str, block: dict[str, Any]) -> None:
        if "text" in block and not block["text"].strip():
            raise Refused(f"The text field in the ContentBlock object at {where} is blank.")
        if role == "assistant" and set(block) & {"toolResult", "image", "document"}:
            raise Refused(f"{where}: {min(block)} is no block of an assistant.")
        if role == "user" and set(block) & {"toolUse", "reasoningContent"}:
            raise Refused(f"{where}: {min(block)} is no block of a user.")
        if "toolUse" in block:
            use = block["toolUse"]
            if not isinstance(use["input"], dict):
                raise Refused(f"The format of the value at {where}.toolUse.input is invalid. Provide a json object.")
            if not _ID.fullmatch(use["toolUseId"]) or not _ID.fullmatch(use["name"]):
                raise Refused(f"{where}.toolUse: toolUseId and name must satisfy [a-zA-Z0-9_-]+")
        for part in block["toolResult"]["content"] if "toolResult" in block else ():
            if "text" in part and not part["text"]:
                raise Refused(f"The text field at {where}.toolResult.content is blank.")
        if "reasoningContent" in block and not block["reasoningContent"]["reasoningText"].get("signature"):
            raise Refused(f"{where}.reasoningContent: signature: Field required")

    def _check_thoughts(self, messages: list[Any]) -> None:
        for message in reversed(messages):
            if message["role"] == "user" and not any("toolResult" in block for block in message["content"]):
                return
            if any("toolUse" in b for b in message["content"]) and "reasoningContent" not in message["content"][0]:
                raise Refused("messages: Expected `thinking` or `redacted_thinking`, but found `tool_use`.")

    @staticmethod
    def _thinks(body: dict[str, Any]) -> bool:
        return "thinking" in (body.get("additionalModelRequestFields") or {})

    def document(self, reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if self._thinks(body):
            thought = {"text": "hmm", "signature": self.new_id("sig")}
            content.append({"reasoningContent": {"reasoningText": thought}})
        if text := reply.text or reply.refusal:
            content.append({"text": text})
        for call in reply.calls:
            id_ = self.new_id("tooluse_") if call.id is None else call.id
            content.append({"toolUse": {"toolUseId": id_, "name": call.tool, "input": call.parsed, "_raw": call.raw}})
        stop = self._ENDS.get(reply.end, "tool_use" if reply.calls else "end_turn")
        return {
            "output": {"message": {"role": "assistant", "content": content}},
            "stopReason": "content_filtered" if reply.refusal else stop,
            "usage": {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15}, "metrics": {"latencyMs": 1},
        }  # fmt: skip

    def events(self, document: dict[str, Any], body: dict[str, Any]) -> Iterator[bytes]:
        yield _frame("messageStart", {"role": "assistant"})
        for index, block in enumerate(document["output"]["message"]["content"]):
            deltas: list[dict[str, Any]] = []
            if "toolUse" in block:
                use = {key: block["toolUse"][key] for key in ("toolUseId", "name")}
                yield _frame("contentBlockStart", {"start": {"toolUse": use}, "contentBlockIndex": index})
                deltas = [{"toolUse": {"input": half}} for half in halves(block["toolUse"]["_raw"])]
            elif "text" in block:
                deltas = [{"text": word} for word in words(block["text"])]
            else:
                thought = block["reasoningContent"]["reasoningText"]
                deltas = [{"reasoningContent": {key: thought[key]}} for key in ("text", "signature")]
            for delta in deltas:
                yield _frame("contentBlockDelta", {"delta": delta, "contentBlockIndex": index})
            yield _frame("contentBlockStop", {"contentBlockIndex": index})
        yield _frame("messageStop", {"stopReason": document["stopReason"]})
        yield _frame("metadata", {"usage": document["usage"], "metrics": document["metrics"]})


def _frame(kind: str, payload: dict[str, Any]) -> bytes:
    """A message of Amazon's event stream: lengths, headers and payload, each with its checksum."""
    headers = b"".join(
        bytes([len(name)]) + name.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
        for name, value in {
            ":event-type": kind, ":content-type": "application/json", ":message-type": "event",
        }.items()
    )  # fmt: skip
    data = json.dumps(payload).encode()
    prelude = struct.pack(">II", 16 + len(headers) + len(data), len(headers))
    prelude += struct.pack(">I", zlib.crc32(prelude))
    message = prelude + headers + data
    return message + struct.pack(">I", zlib.crc32(message))
