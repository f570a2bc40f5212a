"""Messages to prompt ids, token-exact over several turns.

Where the conversation holds a reply with a token record, the next prompt is that record's prompt and
completion ids with the tokens of what came after: never decoded and encoded again, because encoding the same
text can give other tokens than the model sampled, and a trainer must see what was sampled. Where the template
rewrites history (Qwen3 strips earlier thinking), or the history was edited, the whole is rendered anew.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from metis_agent.models.chat_tokenizer import ChatTokenizer, Recent
from metis_agent.models.vision import ImageReader, SeenImage
from metis_agent.models.wire import Reply, names_of, parse_reply, to_chat_dicts
from metis_agent.types import TOKEN_RECORD

__all__ = ["Prompt", "PromptBuilder"]

_CACHED = 4096
_REMEMBERED = 32_000_000
"""Bytes of rendered text, about."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt's ids; `continues` where they extend an earlier call's prompt and completion exactly."""

    ids: tuple[int, ...]
    continues: bool
    template_hash: str
    images: tuple[SeenImage, ...] = ()
    """Those that the ids hold places for, in order."""


class PromptBuilder:
    """Builds prompts. Safe to use from many threads.

    Args:
        tokenizer: Renders and encodes.
        reader: Reads the images of a model that sees; without one, images are refused.
    """

    def __init__(self, tokenizer: ChatTokenizer, reader: ImageReader | None = None) -> None:
        self._tokenizer = tokenizer
        self._reader = reader
        self._rendered: Recent[str] = Recent(_REMEMBERED, lambda _, text: len(text))
        self._built: Recent[None] = Recent(_CACHED)
        """The prompts built so far, by their digests: a record that holds one needs no further proof."""

    def build(self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]]) -> Prompt:
        """The prompt for the next reply.

        Args:
            messages: The conversation so far.
            tools: OpenAI-style schemas of the tools that the template describes.

        Raises:
            InputError: The template refuses the conversation, a message can't be rendered, or an image can't be read.
        """
        offered = json.dumps(tools, ensure_ascii=False)
        if self._reader is not None:
            messages = [self._reader.readable(message) for message in messages]
        seen = [self._reader.of(message) for message in messages] if self._reader else None
        conversation = _Conversation(
            messages=messages, chat=self._chat(messages, seen), tools=tools, offered=offered,
            images=tuple(image for images in seen or () for image in images),
        )  # fmt: skip
        template_hash = self._tokenizer.template_hash(offered)
        ids, continues = self._ids(conversation, len(messages), template_hash)
        return Prompt(ids=ids, continues=continues, template_hash=template_hash, images=conversation.images)

    def _chat(
        self, messages: Sequence[BaseMessage], seen: Sequence[Sequence[SeenImage]] | None
    ) -> list[dict[str, Any]]:
        named = None if seen is None else [[image.digest for image in images] for images in seen]
        chat = to_chat_dicts(messages, images=named)
        if not self._tokenizer.reads_call_ids:
            for message in chat:
                message.pop("tool_call_id", None)
        if self._reader is None:
            return chat
        for message in chat:
            if isinstance(message["content"], str):
                message["content"] = self._reader.plain(message["content"])
                continue
            for block in message["content"]:
                if block["type"] == "text":
                    block["text"] = self._reader.plain(block["text"])
        return chat

    def _ids(self, conversation: _Conversation, end: int, template_hash: str) -> tuple[tuple[int, ...], bool]:
        """Prompt ids for the first `end` messages, and whether they continue a record."""
        everything = self._render(conversation, end, reply=True)
        exact = self._continued(conversation, end, template_hash, everything)
        ids = self._encode(conversation, everything) if exact is None else exact
        self._built.get(_digest(everything, ids), lambda: None)
        return ids, exact is not None

    def _continued(
        self, conversation: _Conversation, end: int, template_hash: str, everything: str
    ) -> tuple[int, ...] | None:
        """The ids of the last reply's record and of what follows it; `None` where that is not exact."""
        for index in range(end - 1, -1, -1):
            message = conversation.messages[index]
            if isinstance(message, AIMessage):
                record = message.response_metadata.get(TOKEN_RECORD)
                if not record or record["template_hash"] != template_hash or not self._tokenizer.splits_at_ends:
                    return None
                return self._extend(conversation, index, message, everything)
        return None

    def _extend(
        self, conversation: _Conversation, index: int, message: AIMessage, everything: str
    ) -> tuple[int, ...] | None:
        record = message.response_metadata[TOKEN_RECORD]
        prompt_ids, completion_ids = tuple(record["prompt_ids"]), tuple(record["completion_ids"])
        earlier = self._render(conversation, index, reply=True)
        if self._reader is not None:
            # The ids only say that there were pictures of this size.
            shown = conversation.images[: earlier.count(self._reader.placeholder)]
            if [image.digest for image in shown] != record.get("images", []):
                return None
        known = _digest(earlier, prompt_ids) in self._built
        if not known and self._ids(conversation, index, record["template_hash"])[0] != prompt_ids:
            return None  # what came before the reply is no longer what the model saw
        text = self._tokenizer.decode(completion_ids)
        sampling = record["sampling"]
        reply = parse_reply(
            text, calls=sampling["tool_choice"] != "none", stop=sampling["stop"], offered=names_of(conversation.tools)
        )
        if not _says(message, reply) or self._tokenizer.end_of_turn(text, 0) is not None:
            return None
        found = self._tokenizer.end_of_turn(everything, len(earlier)) if everything.startswith(earlier) else None
        if found is None:
            return None
        start, token = found
        # A template that never writes reasoning is no matter; one that takes it back is.
        if (
            reply.reasoning
            and reply.reasoning not in everything[len(earlier) : start]
            and reply.reasoning in self._render(conversation, index + 1, reply=False)[len(earlier) :]
        ):
            return None
        if completion_ids and completion_ids[-1] == token:
            start += len(self._tokenizer.eos_texts[token])
        return prompt_ids + completion_ids + self._encode(conversation, everything, start)

    def _encode(self, conversation: _Conversation, text: str, start: int = 0) -> tuple[int, ...]:
        """The ids of a rendered text from `start` on, with as many tokens for each image as it takes."""
        rest = text[start:]
        if self._reader is None:
            return self._tokenizer.encode(rest)
        first, count = text.count(self._reader.placeholder, 0, start), rest.count(self._reader.placeholder)
        return self._tokenizer.encode(self._reader.expand(rest, conversation.images[first : first + count]))

    def _render(self, conversation: _Conversation, end: int, *, reply: bool) -> str:
        """The template's text for the first `end` messages, with the opening of a reply where asked for."""
        chat = conversation.chat[:end]
        key = _digest(json.dumps([chat, conversation.offered, reply], ensure_ascii=False, default=repr))
        return self._rendered.get(key, lambda: self._tokenizer.render(chat, conversation.tools, reply=reply))


@dataclass(frozen=True, kw_only=True)
class _Conversation:
    messages: Sequence[BaseMessage]
    chat: list[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    offered: str
    images: tuple[SeenImage, ...]


def _digest(text: str, ids: Sequence[int] = ()) -> bytes:
    """Stands for a text and its ids, which may be as long as a conversation."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass"))
    digest.update(array("q", ids).tobytes())
    return digest.digest()


def _says(message: AIMessage, reply: Reply) -> bool:
    """Whether nobody edited the message (stripped a blocked call, say) since its tokens were made."""
    return message.text == reply.content and [(call["name"], call["args"]) for call in message.tool_calls] == [
        (call["name"], call["args"]) for call in reply.tool_calls
    ]
