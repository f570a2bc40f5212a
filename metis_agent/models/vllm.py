"""`VLLMChatModel`: a chat model on a vLLM server that keeps what a trainer needs, token ids and log-probabilities.

Beside `local`, for models that are too large for this process or are served anyway. `ChatOpenAI` drops vLLM's
`prompt_token_ids` and `token_ids`; here they become the same token record that `LocalChatModel` leaves. Calls are
parsed from the text, so the server needs no tool parser. vLLM renders each prompt anew from messages: where that does
not repeat the sampled tokens exactly, a trajectory splits into several token sequences, and all of them are trained on.

A forced call is prompted for by ids, the prompt of the free reply and then the opening: templates decorate a turn of
the assistant's that is to be continued. Where a call is banned, or made by the server, the server's log-probabilities
may be those after its constraint: the reply is scored once more, which gives the policy's own.

Serve with `vllm serve MODEL`, `--logprobs-mode processed_logprobs` where the temperature is neither 0 nor 1, or with
`trl vllm-serve`, which a trainer can update. Fields as in vLLM 0.30: `return_token_ids`, `prompt_logprobs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatResult
from pydantic import PrivateAttr

from metis_agent.errors import InfrastructureError, InputError
from metis_agent.models.metis_format import CALL_ENDING
from metis_agent.models.served import Ask, ServedChatModel, Steps
from metis_agent.models.wire import TOOL_CALL_OPENING, example_call
from metis_agent.types import TOKEN_RECORD

__all__ = ["VLLMChatModel"]

_ALTERNATIVES = 20
"""So many of a token's alternatives a server tells, unless it was started to tell fewer."""
_OF_A_CHAT = ("messages", "tools", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs", "stream", "n")
_CONTINUED = "continued_turn"
_Told = Generator[Ask, Any, Any]
_Opening = tuple[list[int], str]
"""Ids and text."""


class VLLMChatModel(ServedChatModel):
    """A chat model on the OpenAI-compatible endpoint of a vLLM server.

    As `ServedChatModel`, and a call can be forced or banned: `tool_choice` as `LocalChatModel.bind_tools` has it;
    beside images a name forces only a call's opening. Where the model makes no call of the opening, the server's own
    `tool_choice` is tried; all tokens of such a reply count as forced. Replies are not streamed: a stream can lose
    token ids.
    """

    weights_version: str = "0"
    """Recorded with every reply; a trainer sets it."""

    _own_tool_choice: str | None = PrivateAttr(default="none")  # tools are rendered, and calls left to us to parse
    _tries: float = PrivateAttr(default=0)  # calls are begun by ids
    _openings: dict[str, _Opening] = PrivateAttr(default_factory=dict)

    @property
    def _llm_type(self) -> str:
        return "metis-vllm"

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        choice, continued = kwargs.get("tool_choice"), kwargs.pop(_CONTINUED, None)
        if self.wire == "metis":
            stop = [*(stop or ()), CALL_ENDING]
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        body: dict[str, Any] = {**(payload.get("extra_body") or {}), "return_token_ids": True}
        if self.wire == "metis":
            body["include_stop_str_in_output"] = True
        if choice == "none":
            body["bad_words"] = [TOOL_CALL_OPENING]
        if continued is not None:
            payload["messages"] = [*payload["messages"], *continued]
            open_end = "tool_calls" not in continued[-1]
            body |= {"add_generation_prompt": False, "continue_final_message": open_end, "prompt_logprobs": 0}
        payload["extra_body"] = body
        payload["logprobs"] = True
        return payload

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        """Keep what the base class drops: the ids, and with them the log-probabilities."""
        found: dict[str, Any] = response if isinstance(response, dict) else response.model_dump(warnings=False)
        result: ChatResult = super()._create_chat_result(response, generation_info)
        for generation, choice in zip(result.generations, found["choices"], strict=True):
            generation.message.response_metadata[TOKEN_RECORD] = _ids(found, choice, str(self.openai_api_base))
        return result

    def _first(self, messages: list[BaseMessage], stop: list[str] | None, options: Mapping[str, Any]) -> Steps:
        choice = options.get("tool_choice") or "auto"
        if choice not in ("auto", "none"):
            return (yield from self._forced(self._get_request_payload(messages, stop=stop, **options), options))
        result: ChatResult = yield Ask(options=options)
        record = _record(result)
        if choice == "none" and not _has_images(messages):
            own, banned = yield from self._scored(record)
            temperature = options.get("temperature", self.temperature)
            _lift_ban(record, own, banned, 1.0 if temperature in (None, 0) else float(temperature))
        return result

    def _required(self, messages: list[BaseMessage], options: Mapping[str, Any]) -> Steps:
        result: ChatResult = yield Ask(options=options)
        record = _record(result)
        if not _has_images(messages):
            record["log_probs"], _ = yield from self._scored(record)
        record["forced"] = len(record["completion_ids"])
        return result

    def _forced(self, payload: Mapping[str, Any], options: Mapping[str, Any]) -> Steps:
        """The reply that begins with a call's opening, to the prompt of the free reply."""
        free: ChatResult = yield Ask(options={**options, "tool_choice": "auto", "max_tokens": 1})
        prompt = _record(free)["prompt_ids"]
        if _has_images(payload["messages"]):
            text = TOOL_CALL_OPENING
            result: ChatResult = yield Ask(options={**options, _CONTINUED: [{"role": "assistant", "content": text}]})
        else:
            # A name left open would let the model name a tool that it was not offered.
            choice = options["tool_choice"]
            named = [tool for tool in options["tools"] if choice in ("any", tool["function"]["name"])]
            opening, text = yield from self._opening(named[0] if len(named) == 1 else None)
            asked = {key: value for key, value in payload.items() if key not in _OF_A_CHAT}
            asked |= {"prompt": [*prompt, *opening], "logprobs": 0}
            asked["extra_body"] = {**asked["extra_body"], "prompt_logprobs": 0}
            result = self._create_chat_result(_as_chat((yield Ask(options=asked, completions=True))))
        _move_opening(result, prompt, text, str(self.openai_api_base))
        return result

    def _opening(self, schema: Mapping[str, Any] | None) -> Generator[Ask, Any, _Opening]:
        """The opening of a call, through the tool's name as the template writes calls where its tokens allow that."""
        key = "" if schema is None else str(schema["function"])
        if key in self._openings:
            return self._openings[key]
        found: _Opening | None = None
        if schema is not None:
            try:
                shown = []
                for value in ("0", "a"):
                    call = _on_the_wire(example_call(schema, value))
                    result: ChatResult = yield Ask(options={_CONTINUED: call, "max_tokens": 1}, messages=[])
                    shown.append(_tokens(_record(result)))
                first, second = shown
                found = _through_the_name(first, second, schema["function"]["name"])
            except InputError:  # a template that refuses a conversation without a question
                pass
        if found is None:
            body = {"return_token_ids": True, "add_special_tokens": False}
            asked = {"model": self.model_name, "prompt": TOOL_CALL_OPENING, "max_tokens": 1, "extra_body": body}
            bare: Mapping[str, Any] = yield Ask(options=asked, completions=True)
            found = list(bare["choices"][0]["prompt_token_ids"]), TOOL_CALL_OPENING
        self._openings[key] = found
        return found

    def _scored(self, record: Mapping[str, Any]) -> Generator[Ask, Any, tuple[list[float], list[float]]]:
        """Log-probabilities of the completion's tokens, and of a call's opening in their places, at temperature 1."""
        prompt, completion = record["prompt_ids"], record["completion_ids"]
        asked = {
            "model": self.model_name, "prompt": [*prompt, *completion], "max_tokens": 1, "temperature": 0.0,
            "extra_body": {"prompt_logprobs": _ALTERNATIVES},
        }  # fmt: skip
        found: Mapping[str, Any] = yield Ask(options=asked, completions=True)
        entries = found["choices"][0]["prompt_logprobs"][len(prompt) :]
        own = [float(entry[str(token)]["logprob"]) for token, entry in zip(completion, entries, strict=True)]
        opening = [
            max(
                (float(it["logprob"]) for it in entry.values() if it["decoded_token"] == TOOL_CALL_OPENING),
                default=None,
            )
            for entry in entries
        ]
        return own, [-math.inf if log_prob is None else log_prob for log_prob in opening]

    def _message(self, message: AIMessage, choice: str, offered: frozenset[str]) -> AIMessage:
        record: dict[str, Any] = message.response_metadata[TOKEN_RECORD]
        record.pop("prompt_log_probs", None)
        record |= {
            "sampling": {"temperature": self.temperature, "max_new_tokens": self.max_tokens, "tool_choice": choice},
            "weights_version": self.weights_version,
            "template_hash": "",
            "continues": False,
        }
        return self._read(message, str(message.text), calls=choice != "none", offered=offered)


def _on_the_wire(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the arguments of its calls as text, and with their ids."""
    for place, call in enumerate(chat[-1]["tool_calls"]):
        call |= {"id": f"call_{place}"}
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return chat


def _ids(found: Mapping[str, Any], choice: Mapping[str, Any], server: str) -> dict[str, Any]:
    prompt_ids, completion_ids = found.get("prompt_token_ids"), choice.get("token_ids")
    sampled = (choice.get("logprobs") or {}).get("content")
    if prompt_ids is None or completion_ids is None or sampled is None or len(sampled) != len(completion_ids):
        raise InfrastructureError(
            f"the server at {server!r} sent {len(completion_ids or ())} token ids and {len(sampled or ())} "
            "log-probabilities; it must send both for every token. Use vLLM 0.10 or newer, which knows "
            "return_token_ids."
        )
    return {
        "prompt_ids": list(prompt_ids),
        "completion_ids": list(completion_ids),
        "log_probs": [float(token["logprob"]) for token in sampled],
        "forced": 0,
        "prompt_log_probs": found.get("prompt_logprobs"),
    }


def _record(result: ChatResult) -> dict[str, Any]:
    record: dict[str, Any] = result.generations[0].message.response_metadata[TOKEN_RECORD]
    return record


def _tokens(record: Mapping[str, Any]) -> list[tuple[int, str, float]]:
    """Id, text and log-probability of the prompt's tokens; of the first the text and log-probability are not known."""
    rest = zip(record["prompt_ids"][1:], record["prompt_log_probs"][1:], strict=True)
    entries = [(token, entry[str(token)]) for token, entry in rest]
    told = [(token, str(entry["decoded_token"]), float(entry["logprob"])) for token, entry in entries]
    return [(record["prompt_ids"][0], "", math.nan), *told]


def _through_the_name(
    first: Sequence[tuple[int, str, float]], second: Sequence[tuple[int, str, float]], name: str
) -> _Opening | None:
    """What two calls with other arguments share, from the opening through the closing quote of the name."""
    starts = [place for place, (_, text, _) in enumerate(first) if text == TOOL_CALL_OPENING]
    ids: list[int] = []
    text = ""
    for (one, piece, _), (other, _, _) in (
        zip(first[starts[-1] :], second[starts[-1] :], strict=False) if starts else ()
    ):
        if one != other:
            return None
        ids.append(one)
        text += piece
        if f'"{name}"' in text:
            return ids, text
    return None


def _move_opening(result: ChatResult, prompt: list[int], opening: str, server: str) -> None:
    """Move the forced opening from the end of the prompt to the head of the completion."""
    record, message = _record(result), result.generations[0].message
    forced = _tokens(record)[len(prompt) :]
    if record["prompt_ids"][: len(prompt)] != prompt or "".join(text for _, text, _ in forced) != opening:
        raise InfrastructureError(
            f"the server at {server!r} was to continue the prompt with {opening!r} and nothing else, and its template "
            "wrote other tokens: beside images a call can be forced only where it leaves such a turn as it is."
        )
    message.content = opening + str(message.text)
    record |= {
        "prompt_ids": prompt,
        "completion_ids": [token for token, _, _ in forced] + record["completion_ids"],
        "log_probs": [log_prob for _, _, log_prob in forced] + record["log_probs"],
        "forced": len(forced),
    }


def _lift_ban(record: dict[str, Any], own: Sequence[float], banned: Sequence[float], temperature: float) -> None:
    """Log-probabilities before the ban and after it, whichever of the two the server gave.

    With l(x) the log-probability at temperature 1 and T the temperature, after the ban that of x is
    g = l(x)/T - log(Z - e^(l(ban)/T)); so log Z = log(e^(l(x)/T - g) + e^(l(ban)/T)), and before it l(x)/T - log Z.
    """
    given = record["log_probs"]
    if temperature == 1.0:
        after = [
            log_prob - math.log1p(-min(math.exp(ban), 1 - 1e-9)) for log_prob, ban in zip(own, banned, strict=True)
        ]
        told = [g > log_prob + 0.01 for g, log_prob in zip(given, own, strict=True)]
        record["allowed_log_probs"] = [g if it else min(0.0, a) for g, it, a in zip(given, told, after, strict=True)]
        record["log_probs"] = list(own)
        return
    scaled = [(log_prob / temperature, ban / temperature) for log_prob, ban in zip(own, banned, strict=True)]
    record["allowed_log_probs"] = list(given)
    record["log_probs"] = [x - _log_add(x - g, ban) for (x, ban), g in zip(scaled, given, strict=True)]


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))


def _as_chat(found: Mapping[str, Any]) -> dict[str, Any]:
    """A completion as a chat's reply has it."""
    (choice,) = found["choices"]
    told = choice.get("logprobs") or {}
    content = [
        {"token": token, "logprob": log_prob}
        for token, log_prob in zip(told.get("tokens") or (), told.get("token_logprobs") or (), strict=True)
    ]
    return {
        "id": found.get("id"), "model": found.get("model"), "usage": found.get("usage"),
        "prompt_token_ids": choice.get("prompt_token_ids"), "prompt_logprobs": choice.get("prompt_logprobs"),
        "choices": [
            {
                "index": 0, "message": {"role": "assistant", "content": choice["text"]},
                "finish_reason": choice.get("finish_reason"), "logprobs": {"content": content},
                "token_ids": choice.get("token_ids"),
            }
        ],
    }  # fmt: skip


def _has_images(messages: Sequence[Any]) -> bool:
    """Whether any message shows something beside text."""
    contents = [message["content"] if isinstance(message, Mapping) else message.content for message in messages]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return any(isinstance(block, Mapping) and "image" in str(block.get("type")) for block in blocks)
