"""`VLLMChatModel` against a real local HTTP server that speaks vLLM's fields, on a real tokenizer."""

from __future__ import annotations

import json
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
from metis_agent.gates.baselines import BranchGate
from metis_agent.hdpo.token_sequences import segments
from metis_agent.models.vllm import VLLMChatModel
from metis_agent.rollouts.runner import Rollout, roll_out
from metis_agent.types import TOKEN_RECORD, Question
from metis_agent.worlds.almanac.cold_start import build_tokenizer

TOKENIZER = build_tokenizer()
CALL = '<tool_call>{"name": "python", "arguments": {"code": "52+73"}}</tool_call>'

pytestmark = pytest.mark.enable_socket


@tool
def python(code: str) -> str:
    """Run code."""
    return "125"


class Server(ThreadingHTTPServer):
    """Answers like vLLM: a call to a question, then an answer; ids are those of the almanac's tokenizer."""

    requests: list[dict[str, Any]]
    fault: str = ""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(asked)
        status = {"down": 503, "long": 400}.get(self.server.fault, 200)
        body = json.dumps(self._reply(asked) if status == 200 else {"error": {"message": self.server.fault}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reply(self, asked: dict[str, Any]) -> dict[str, Any]:
        messages, forced = asked["messages"], asked.get("continue_final_message", False)
        if forced:
            messages = messages[:-1]
        chat = [{**message, "content": message.get("content") or ""} for message in messages]
        for message in chat:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        prompt = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        banned = "<tool_call>" in asked.get("bad_words", ())
        text = "<answer>125</answer>" if banned or chat[-1]["role"] == "tool" else CALL
        if forced:
            prompt, text = prompt + "<tool_call>", text.removeprefix("<tool_call>")
        prompt_ids = TOKENIZER(prompt, add_special_tokens=False).input_ids
        ids = TOKENIZER(text + "<|end|>", add_special_tokens=False).input_ids
        logged = [{"token": TOKENIZER.decode([i]), "logprob": -0.25, "bytes": None, "top_logprobs": []} for i in ids]
        if self.server.fault == "no ids":
            ids = None
        return {
            "id": f"chat-{len(self.server.requests)}", "object": "chat.completion", "created": 1,
            "model": asked["model"],
            "choices": [
                {
                    "index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop",
                    "logprobs": {"content": logged}, "token_ids": ids,
                }
            ],
            "usage": {"prompt_tokens": len(prompt_ids), "completion_tokens": len(logged), "total_tokens": 1},
            "prompt_token_ids": prompt_ids,
            "prompt_logprobs": [None, *[
                {str(i): {"logprob": -1.5, "rank": 1, "decoded_token": TOKENIZER.decode([i])}} for i in prompt_ids[1:]
            ]] if asked.get("prompt_logprobs") is not None else None,
        }  # fmt: skip


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
        base_url=f"http://127.0.0.1:{server.server_port}/v1", model="almanac", temperature=1.0, max_tokens=24,
        max_retries=0, **options,
    )  # fmt: skip


def test_a_reply_keeps_its_ids_and_log_probabilities_and_calls_are_parsed_from_its_text(server: Server) -> None:
    reply = chat_on(server, weights_version="step-3").bind_tools([python]).invoke([HumanMessage("52+73?")])
    record = reply.response_metadata[TOKEN_RECORD]
    assert TOKENIZER.decode(record["completion_ids"]) == CALL + "<|end|>"
    assert TOKENIZER.decode(record["prompt_ids"]) == "<|user|>52+73?<|end|><|assistant|>"
    assert record["log_probs"] == [-0.25] * len(record["completion_ids"])
    assert (record["forced"], record["weights_version"]) == (0, "step-3")
    (call,) = reply.tool_calls
    assert (call["name"], call["args"]) == ("python", {"code": "52+73"})
    (asked,) = server.requests
    assert (asked["tool_choice"], asked["logprobs"], asked["return_token_ids"]) == ("none", True, True)
    assert asked["tools"][0]["function"]["name"] == "python"


def test_a_forced_call_begins_with_the_opening_and_has_the_models_own_probability_of_it(server: Server) -> None:
    reply = chat_on(server).bind_tools([python], tool_choice="any").invoke([HumanMessage("52+73?")])
    record = reply.response_metadata[TOKEN_RECORD]
    assert TOKENIZER.decode(record["completion_ids"]) == CALL + "<|end|>"
    assert TOKENIZER.decode(record["prompt_ids"]) == "<|user|>52+73?<|end|><|assistant|>"
    assert (record["forced"], record["log_probs"][:2]) == (1, [-1.5, -0.25])
    assert reply.tool_calls[0]["args"] == {"code": "52+73"}


def test_without_calls_the_opening_is_banned_and_nothing_is_parsed(server: Server) -> None:
    reply = chat_on(server).bind_tools([python], tool_choice="none").invoke([HumanMessage("52+73?")])
    assert server.requests[0]["bad_words"] == ["<tool_call>"]
    assert (reply.text, reply.tool_calls) == ("125", [])
    with pytest.raises(UnknownToolError, match="'search'"):
        chat_on(server).bind_tools([python], tool_choice="search")


@pytest.mark.parametrize("branch", ["free", "direct", "tool"])
async def test_the_graph_rolls_out_on_it_and_the_tokens_can_be_trained_on(server: Server, branch: Any) -> None:
    agent = create_metis_agent(chat_on(server), [python], gate=BranchGate(branch), record_calls=True)
    question = Question(id="q", text="52+73?", answer="125", verifier="numeric")
    run = await roll_out(agent, Rollout(id="r", question=question, branch=branch, seed=7))
    assert (run.status, run.answer, run.tool_calls) == ("finished", "125", int(branch != "direct"))
    (segment,) = segments(run)  # the server renders what it was given, so the prompts extend each other
    own = [token for token, mine in zip(segment.completion_ids, segment.mask, strict=True) if mine]
    answer = "<answer>125</answer><|end|>"
    assert TOKENIZER.decode(own) == (answer if branch == "direct" else CALL + "<|end|>" + answer)
    seeds = [asked["seed"] for asked in server.requests]
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
