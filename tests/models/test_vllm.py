"""`VLLMChatModel` against a real local HTTP server that speaks vLLM's fields, on a real tokenizer."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("langchain_openai")

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool

from metis_agent.agent import create_metis_agent
from metis_agent.errors import InfrastructureError, InputError, UnknownToolError
from metis_agent.gates.reference import BranchGate
from metis_agent.hdpo.token_sequences import segments
from metis_agent.models.vllm import VLLMChatModel
from metis_agent.rollouts.runner import Rollout, roll_out
from metis_agent.types import TOKEN_RECORD, Question
from metis_agent.worlds.almanac.cold_start import build_tokenizer

TOKENIZER = build_tokenizer()
CALL = '<tool_call>{"name": "python", "arguments": {"code": "52+73"}}</tool_call>'
DIRECT = "<answer>125</answer>"
END = "<|end|>"
MADE = '[{"name": "python", "parameters": {"code": "52+73"}}]'
"""As vLLM writes a call that it was told to require."""
PLAIN = "<|user|>52+73?<|end|><|assistant|>"
ASSISTANT, CALLS = (int(TOKENIZER.convert_tokens_to_ids(mark)) for mark in ("<|assistant|>", "<tool_call>"))

pytestmark = pytest.mark.enable_socket


@tool
def python(code: str) -> str:
    """Run code."""
    return "125"


@tool
def search(query: str) -> str:
    """Search."""
    return "nothing"


class Server(ThreadingHTTPServer):
    """Answers like vLLM: a call to a question, then an answer; ids are those of the almanac's tokenizer."""

    requests: list[dict[str, Any]]
    fault: str = ""
    raw_logprobs: bool = False
    """As vLLM's `--logprobs-mode`: whether log-probabilities are told before temperature and bans."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"  # connections are kept, as real servers keep them

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(asked)
        status = {"down": 503, "long": 400}.get(self.server.fault, 200)
        if "no tool choice" in self.server.fault and asked.get("tool_choice", "none") != "none":
            status = 400
        reply = self._chat if self.path.endswith("/chat/completions") else self._completion
        body = json.dumps(reply(asked) if status == 200 else {"error": {"message": self.server.fault}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _chat(self, asked: dict[str, Any]) -> dict[str, Any]:
        chat = [{**message, "content": message.get("content") or ""} for message in asked["messages"]]
        for turn in chat:
            if isinstance(turn["content"], list):
                turn["content"] = "".join(block.get("text", "") for block in turn["content"])
            for call in turn.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        # As vLLM renders: what a template writes around the assistant's turns is around one that is continued too.
        prompt = TOKENIZER.apply_chat_template(
            chat, tools=asked.get("tools"), tokenize=False,
            add_generation_prompt=asked.get("add_generation_prompt", True),
            continue_final_message=asked.get("continue_final_message", False),
        )  # fmt: skip
        banned = "<tool_call>" in asked.get("bad_words", ())
        text = DIRECT if banned or not asked.get("tools") or chat[-1]["role"] == "tool" else CALL
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if asked.get("tool_choice", "none") != "none":
            text, function = MADE, {"name": "python", "arguments": '{"code": "52+73"}'}
            message = {
                "role": "assistant", "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": function}],
            }  # fmt: skip
        prompt_ids, ids = TOKENIZER(prompt, add_special_tokens=False).input_ids, ids_of(text + END, asked)
        log_probs = self._log_probs(ids, asked, banned=banned)
        logged = [
            {"token": TOKENIZER.decode([token]), "logprob": log_prob, "bytes": None, "top_logprobs": []}
            for token, log_prob in zip(ids, log_probs, strict=True)
        ]
        return {
            **self._head(asked, prompt_ids, ids), "prompt_token_ids": prompt_ids,
            "prompt_logprobs": self._prompt_logprobs(prompt_ids, asked), "choices": [
                {
                    "index": 0, "message": message, "finish_reason": "stop",
                    "logprobs": {"content": logged}, "token_ids": None if self.server.fault == "no ids" else ids,
                }
            ],
        }  # fmt: skip

    def _completion(self, asked: dict[str, Any]) -> dict[str, Any]:
        prompt = asked["prompt"]
        prompt_ids = TOKENIZER(prompt, add_special_tokens=False).input_ids if isinstance(prompt, str) else prompt
        begun = str(TOKENIZER.decode(prompt_ids)).rpartition("<|assistant|>")[2]
        text = CALL.removeprefix(begun) if CALL.startswith(begun) and "untrained" not in self.server.fault else " the"
        ids = ids_of(text + END, asked)
        tokens = [TOKENIZER.decode([token]) for token in ids]
        return {
            **self._head(asked, prompt_ids, ids), "object": "text_completion", "choices": [
                {
                    "index": 0, "text": text, "finish_reason": "stop", "token_ids": ids, "prompt_token_ids": prompt_ids,
                    "logprobs": {
                        "tokens": tokens, "token_logprobs": self._log_probs(ids, asked, banned=False),
                        "text_offset": [0] * len(ids), "top_logprobs": [None] * len(ids),
                    },
                    "prompt_logprobs": self._prompt_logprobs(prompt_ids, asked),
                }
            ],
        }  # fmt: skip

    def _head(self, asked: dict[str, Any], prompt_ids: list[int], ids: list[int]) -> dict[str, Any]:
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(ids), "total_tokens": 1}
        named = {"id": f"chat-{len(self.server.requests)}", "model": asked["model"]}
        return {**named, "object": "chat.completion", "created": 1, "usage": usage}

    def _log_probs(self, ids: list[int], asked: dict[str, Any], *, banned: bool) -> list[float]:
        temperature = 1.0 if self.server.raw_logprobs else asked.get("temperature") or 1.0
        lifted = not banned or self.server.raw_logprobs
        return [policy(place, temperature, banned=not lifted)["own"] for place in range(len(ids))]

    def _prompt_logprobs(self, prompt_ids: list[int], asked: dict[str, Any]) -> list[Any] | None:
        if asked.get("prompt_logprobs") is None:
            return None
        start = len(prompt_ids) - prompt_ids[::-1].index(ASSISTANT) if ASSISTANT in prompt_ids else len(prompt_ids)
        entries: list[Any] = []
        for place, token in enumerate(prompt_ids):
            told = policy(place - start, 1.0, banned=False)
            entry = {CALLS: told["call"]} if asked["prompt_logprobs"] else {}
            entry[token] = told["own"] if token != CALLS else told["call"]
            entries.append(
                {
                    str(it): {"logprob": log_prob, "rank": 1, "decoded_token": TOKENIZER.decode([it])}
                    for it, log_prob in entry.items()
                }
            )
        return [None, *entries[1:]]


def policy(place: int, temperature: float, *, banned: bool) -> dict[str, float]:
    """Log-probabilities at a place of the reply: of the token that stands there, and of a call's opening.

    The first token is most likely the opening: logits 3, against 0.5 and 0 for the rest; later it is unlikely.
    """
    own, call = (0.5, 3.0) if place == 0 else (2.0, -4.0)
    among = [own, 0.0] if banned else [own, 0.0, call]
    z = math.log(sum(math.exp(logit / temperature) for logit in among))
    return {"own": own / temperature - z, "call": call / temperature - z}


def ids_of(text: str, asked: dict[str, Any]) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids[: asked.get("max_tokens")]  # type: ignore[no-any-return]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.requests = []
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def chat_on(server: Server, **options: Any) -> VLLMChatModel:
    return VLLMChatModel(
        base_url=f"http://127.0.0.1:{server.server_port}/v1", model="almanac", temperature=1.0, max_tokens=64,
        max_retries=0, **options,
    )  # fmt: skip


def test_a_reply_keeps_its_ids_and_log_probabilities_and_calls_are_parsed_from_its_text(server: Server) -> None:
    reply = chat_on(server, weights_version="step-3").bind_tools([python]).invoke([HumanMessage("52+73?")])
    record = reply.response_metadata[TOKEN_RECORD]
    assert TOKENIZER.decode(record["completion_ids"]) == CALL + END
    assert TOKENIZER.decode(record["prompt_ids"]) == PLAIN
    own = [policy(place, 1.0, banned=False)["own"] for place in range(len(record["completion_ids"]))]
    assert record["log_probs"] == pytest.approx(own)
    assert "allowed_log_probs" not in record
    assert (record["forced"], record["weights_version"]) == (0, "step-3")
    (call,) = reply.tool_calls
    assert (call["name"], call["args"]) == ("python", {"code": "52+73"})
    (asked,) = server.requests
    assert (asked["tool_choice"], asked["logprobs"], asked["return_token_ids"]) == ("none", True, True)
    assert asked["tools"][0]["function"]["name"] == "python"


@pytest.mark.parametrize(("tools", "forced"), [([python], 2), ([python, search], 1)])
def test_a_forced_call_does_not_change_the_prompt_and_has_the_models_own_probability_of_its_opening(
    server: Server, tools: list[Any], forced: int
) -> None:
    bound = chat_on(server).bind_tools(tools, tool_choice="any")
    replies = [bound.invoke([HumanMessage("52+73?")]) for _ in range(2)]
    for reply in replies:
        record = reply.response_metadata[TOKEN_RECORD]
        assert TOKENIZER.decode(record["prompt_ids"]) == PLAIN
        assert TOKENIZER.decode(record["completion_ids"]) == CALL + END
        # Of one tool through its name, which this tokenizer has in one token with what is around it.
        assert record["forced"] == forced
        opening = [policy(0, 1.0, banned=False)["call"], policy(1, 1.0, banned=False)["own"]]
        assert record["log_probs"][:forced] == pytest.approx(opening[:forced])
        assert len(record["log_probs"]) == len(record["completion_ids"])
        assert (reply.text, reply.tool_calls[0]["args"]) == ("", {"code": "52+73"})
    assert len(server.requests) == 2 * 2 + (2 if forced == 2 else 1)  # what an opening looks like is asked once


def test_beside_images_a_call_is_not_forced_where_the_template_would_change_the_prompt(server: Server) -> None:
    image = {"type": "image", "base64": "iVBORw0KGgo=", "mime_type": "image/png"}
    bound = chat_on(server).bind_tools([python], tool_choice="any")
    with pytest.raises(InfrastructureError, match="its template wrote other tokens"):
        bound.invoke([HumanMessage([{"type": "text", "text": "52+73?"}, image])])


def test_where_the_model_makes_no_call_of_the_opening_the_server_makes_one(server: Server) -> None:
    server.fault = "untrained"
    reply = chat_on(server).bind_tools([python], tool_choice="any").invoke([HumanMessage("52+73?")])
    (call,) = reply.tool_calls
    assert (call["name"], call["args"]) == ("python", {"code": "52+73"})
    record = reply.response_metadata[TOKEN_RECORD]
    assert TOKENIZER.decode(record["prompt_ids"]) == PLAIN
    assert TOKENIZER.decode(record["completion_ids"]) == MADE + END
    assert record["forced"] == len(record["completion_ids"]) == len(record["log_probs"])
    assert server.requests[-2]["tool_choice"] == "required"


def test_a_server_that_requires_no_calls_is_asked_once_and_replies_say_what_is_missing(server: Server) -> None:
    server.fault = "untrained, no tool choice"
    chat = chat_on(server).bind_tools([python], tool_choice="any")
    replies = [chat.invoke([HumanMessage("52+73?")]) for _ in range(2)]
    assert [reply.tool_calls for reply in replies] == [[], []]
    assert [reply.response_metadata["unmet_tool_choice"] for reply in replies] == ["any", "any"]
    assert [asked.get("tool_choice") for asked in server.requests].count("required") == 1


def test_without_calls_the_opening_is_banned_and_nothing_is_parsed(server: Server) -> None:
    reply = chat_on(server).bind_tools([python], tool_choice="none").invoke([HumanMessage("52+73?")])
    assert server.requests[0]["bad_words"] == ["<tool_call>"]
    assert (reply.text, reply.tool_calls) == ("125", [])
    with pytest.raises(UnknownToolError, match="'search'"):
        chat_on(server).bind_tools([python], tool_choice="search")


@pytest.mark.parametrize(("raw", "temperature"), [(True, 1.0), (False, 1.0), (False, 0.0), (False, 2.0)])
def test_log_probabilities_are_those_before_the_ban_and_those_after_it_are_kept_beside(
    server: Server, raw: bool, temperature: float
) -> None:
    server.raw_logprobs = raw
    chat = chat_on(server).model_copy(update={"temperature": temperature})
    record = (
        chat.bind_tools([python], tool_choice="none").invoke([HumanMessage("52+73?")]).response_metadata[TOKEN_RECORD]
    )
    places, t = range(len(record["completion_ids"])), temperature or 1.0
    assert record["log_probs"] == pytest.approx([policy(place, t, banned=False)["own"] for place in places])
    assert record["allowed_log_probs"] == pytest.approx([policy(place, t, banned=True)["own"] for place in places])


def test_direct_means_no_tools_in_the_prompt_unless_the_policy_was_trained_so(server: Server) -> None:
    for kept in (False, True):
        chat = chat_on(server, offers_tools_when_direct=kept)
        create_metis_agent(chat, [python], gate=BranchGate("direct")).invoke({"messages": [("user", "52+73?")]})
    plain, kept_in = server.requests[0], server.requests[1]
    assert ("tools" in plain, "bad_words" in plain) == (False, False)
    assert (kept_in["tools"][0]["function"]["name"], kept_in["bad_words"]) == ("python", ["<tool_call>"])


def test_a_model_is_asked_in_one_event_loop_after_another(server: Server) -> None:
    chat = chat_on(server)
    assert [asyncio.run(chat.ainvoke("52+73?")).text for _ in range(3)] == ["125"] * 3


@pytest.mark.parametrize("branch", ["free", "direct", "tool"])
async def test_the_graph_rolls_out_on_it_and_the_tokens_can_be_trained_on(server: Server, branch: Any) -> None:
    agent = create_metis_agent(chat_on(server), [python], gate=BranchGate(branch), record_calls=True)
    question = Question(id="q", text="52+73?", answer="125", verifier="numeric")
    run = await roll_out(agent, Rollout(id="r", question=question, branch=branch, seed=7))
    assert (run.status, run.answer, run.tool_calls) == ("finished", "125", int(branch != "direct"))
    (segment,) = segments(run)  # the server renders what it was given, so the prompts extend each other
    own = [token for token, mine in zip(segment.completion_ids, segment.mask, strict=True) if mine]
    assert TOKENIZER.decode(own) == (DIRECT + END if branch == "direct" else CALL + END + DIRECT + END)
    seeds = [asked["seed"] for asked in server.requests if asked.get("max_tokens") != 1]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("down", InfrastructureError, "failed: .*503"),
        ("long", InputError, "refused the request"),
        ("no ids", InfrastructureError, "0 token ids"),
    ],
)
async def test_what_the_server_does_wrong_is_not_the_models_fault(
    server: Server, fault: str, error: type[Exception], message: str
) -> None:
    server.fault = fault
    with pytest.raises(error, match=message):
        chat_on(server).invoke("hi")
    with pytest.raises(error, match=message):
        await chat_on(server).ainvoke("hi")
