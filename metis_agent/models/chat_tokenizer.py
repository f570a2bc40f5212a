"""A tokenizer with its chat template: render, encode, decode, and the first tokens of a forced call."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from jinja2 import TemplateError

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.models.wire import TOOL_CALL_OPENING, example_call

__all__ = ["ChatTokenizer", "Recent", "named_opening", "shows_tools"]


ValueT = TypeVar("ValueT")


class Recent(Generic[ValueT]):
    """The most recently used results, by key. Safe in threads; a race only computes one twice.

    Args:
        size: What all results may weigh together; the newest is kept whatever it weighs.
        weigh: The weight of a key and its result; by default each pair weighs 1.
    """

    def __init__(self, size: int, weigh: Callable[[Any, ValueT], int] = lambda key, value: 1) -> None:
        self._size, self._weigh = size, weigh
        self._weight = 0
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, ValueT] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, compute: Callable[[], ValueT]) -> ValueT:
        """The value for a key, computed where it is not remembered."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = compute()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._weight += self._weigh(key, value)
            while self._weight > self._size and len(self._values) > 1:
                self._weight -= self._weigh(*self._values.popitem(last=False))
        return value


_REMEMBERED = 32_000_000
"""Bytes, about, that each memory may hold: by number alone a few hundred long conversations would fill a machine."""
_ID = 40
"""Bytes of a token's id in a tuple."""


class ChatTokenizer:
    """Wraps a transformers tokenizer.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        eos_ids: The tokens that end a turn.
        template_arguments: More variables for the template, such as `{"enable_thinking": False}`.
        images: Settings of the image processor, where the model reads images: they decide what a prompt means too.

    Raises:
        ConfigurationError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_ids: frozenset[int],
        template_arguments: Mapping[str, Any] | None = None,
        images: str = "",
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigurationError(
                f"The tokenizer {type(tokenizer).__name__} has no chat template; a chat model renders its "
                "prompts with one. Use the instruct variant of the model, or set tokenizer.chat_template."
            )
        self._tokenizer = tokenizer
        self._arguments = dict(template_arguments or {})
        self.eos_texts = {token: str(tokenizer.decode([token])) for token in eos_ids}
        # Splits after each end-of-turn token.
        self._turns = re.compile("|".join(f"(?<={re.escape(mark)})" for mark in self.eos_texts.values()))
        self._identity = _identity(tokenizer, self._arguments) + images
        self._lock = threading.Lock()  # fast tokenizers can't be borrowed by two threads at once
        self._encoded: Recent[tuple[int, ...]] = Recent(_REMEMBERED, lambda text, ids: len(text) + _ID * len(ids))
        self._hashes: Recent[str] = Recent(_REMEMBERED, lambda offered, _: len(offered))
        self._decoded: Recent[str] = Recent(_REMEMBERED, lambda ids, text: len(text) + _ID * len(ids))
        self.reads_call_ids = "tool_call_id" in str(tokenizer.chat_template)
        """Whether the template writes a result's call id; where it doesn't, equal conversations render once."""
        self.splits_at_ends = self._check_split()
        """Whether turns encode one by one as they do together; then what came before need not be encoded."""

    def template_hash(self, offered: str) -> str:
        """Identifies tokenizer, template, its arguments and the offered tools (as JSON)."""
        return self._hashes.get(offered, lambda: _digest(self._identity, offered))

    def render(self, chat: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, reply: bool) -> str:
        """The template's text, with the opening of a reply where asked for.

        Raises:
            InputError: The template refuses the conversation.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat,
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=reply,
                    **self._arguments,
                )
            )
        except (TemplateError, ValueError) as error:
            roles = [message["role"] for message in chat]
            raise InputError(
                f"The chat template refuses a conversation with the roles {roles!r}: {error}. A conversation "
                "holds at least one message, in an order that the template knows."
            ) from error

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text, nothing added; turns that came before are not encoded again."""
        turns = self._turns.split(text) if self.splits_at_ends else [text]
        return tuple(token for turn in turns if turn for token in self._encode(turn))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without its end-of-turn token."""
        if ids and ids[-1] in self.eos_texts:
            ids = ids[:-1]
        return self._decoded.get(tuple(ids), lambda: self._decode_anew(ids))

    def end_of_turn(self, text: str, start: int) -> tuple[int, int] | None:
        """Where the next end-of-turn token begins in a text, and which it is."""
        found = [(text.find(mark, start), token) for token, mark in self.eos_texts.items()]
        return min((entry for entry in found if entry[0] >= 0), default=None)

    def _encode(self, text: str) -> tuple[int, ...]:
        return self._encoded.get(text, lambda: self._encode_anew(text))

    def _encode_anew(self, text: str) -> tuple[int, ...]:
        with self._lock:
            return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode_anew(self, ids: Sequence[int]) -> str:
        with self._lock:
            return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _check_split(self) -> bool:
        """Whether turns can be encoded one by one: not where a tokenizer puts a space before every text."""
        for mark in self.eos_texts.values():
            turns = [f"a{mark}", f"\nb{mark}", " c"]
            if self._encode_anew("".join(turns)) != tuple(token for turn in turns for token in self._encode_anew(turn)):
                return False
        return bool(self.eos_texts)


def _identity(tokenizer: Any, arguments: Mapping[str, Any]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab()
    if backend is not None:
        # Padding and truncation are the state of the last call, not of the tokenizer.
        vocabulary = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    return _digest(
        json.dumps(vocabulary, sort_keys=True),
        str(tokenizer.chat_template),
        json.dumps(arguments, sort_keys=True, default=repr),
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def shows_tools(tokenizer: Any) -> bool:
    """Whether the chat template has a place for tools."""
    tool = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {}}}
    asked: dict[str, Any] = {"conversation": [{"role": "user", "content": "Hi."}], "tokenize": False}
    return bool(tokenizer.apply_chat_template(**asked, tools=[tool]) != tokenizer.apply_chat_template(**asked))


def named_opening(tokenizer: ChatTokenizer, schema: Mapping[str, Any]) -> tuple[int, ...]:
    """The opening of a call through the closing quote of the tool's name, as the template writes calls.

    Two calls with different arguments are rendered; what their ids share is certain. Where the token that
    ends the name is not among it (a tokenizer joins the name to its arguments), or the template writes calls
    in another way, it is the bare opening tag.

    Args:
        tokenizer: Renders and encodes.
        schema: The tool's OpenAI-style schema.
    """
    bare = tokenizer.encode(TOOL_CALL_OPENING)
    quoted = json.dumps(schema["function"]["name"], ensure_ascii=False)
    first, second = (tokenizer.encode(_rendered_call(tokenizer, schema, value)) for value in ("0", "a"))
    for length in range(len(bare) + 1, min(len(first), len(second)) + 1):
        if first[:length] != second[:length]:
            return bare
        if quoted in tokenizer.decode(first[:length]):
            return first[:length]
    return bare


def _rendered_call(tokenizer: ChatTokenizer, schema: Mapping[str, Any], value: str) -> str:
    """The text of one call from its opening on; empty where the template has no such tag."""
    try:
        text = tokenizer.render(example_call(schema, value), [], reply=False)
    except InputError:
        return ""
    start = text.rfind(TOOL_CALL_OPENING)
    return text[start:] if start >= 0 else ""
