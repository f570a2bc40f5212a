"""Decision models as gates: any callable, over HTTP, and by transformers' own pipeline."""

import asyncio
import json
import math
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool

from metis_agent.agent import create_metis_agent
from metis_agent.errors import ConfigurationError, GateError
from metis_agent.gates import DecisionModelGate
from metis_agent.gates.decision import ANSWERABLE, WHICH_TOOL
from metis_agent.types import GateRequest, ToolSpec
from tests.fakes import model

TOOLS = (ToolSpec(name="look", description="Look things up."), ToolSpec(name="add", description="Add."))
REQUEST = GateRequest(messages=[HumanMessage("Who won?")], tools=TOOLS)
ONE_TOOL = GateRequest(messages=[HumanMessage("Who won?")], tools=TOOLS[:1])
local = [pytest.mark.enable_socket, pytest.mark.allow_hosts(["127.0.0.1"])]


def needing(p, **tools):
    """A decision model that says a tool is needed with probability p."""

    def answer(request):
        answers = {}
        for id_, question in request["questions"].items():
            if question["type"] == "noul":
                answers[id_] = {"type": "noul", "noul": 1 - p}
            else:
                best = max(tools, key=tools.get)
                answers[id_] = {"type": "choice", "choice": best, "confidence": 0.5, "probabilities": tools}
        return {"answers": answers, "model": "test"}

    return answer


class Asked:
    """A callable decision model that keeps its requests."""

    def __init__(self, p, **tools):
        self.requests, self._answer = [], needing(p, **tools)

    def __call__(self, request):
        self.requests.append(request)
        return self._answer(request)["answers"]


async def both(gate, request=REQUEST):
    return [gate.decide(request), await gate.adecide(request)]


# The decision


async def test_the_first_level_decides_whether_and_the_second_which():
    asked = Asked(0.8, look=0.6, add=0.3)
    for decision in await both(DecisionModelGate(asked, threshold=0.5, required=True)):
        assert (decision.allowed, decision.required, decision.threshold) == (("look",), True, 0.5)
        # add: 0.8 * 0.3/0.6
        assert decision.probabilities == pytest.approx({"look": 0.8, "add": 0.4})
    first, second = asked.requests[:2]
    assert first["state"] == second["state"] == "Who won?"
    assert first["questions"]["answerable"]["instructions"] == ANSWERABLE
    assert second["questions"]["tool"] == {
        "type": "choice", "instructions": WHICH_TOOL, "criteria": {"look": "Look things up.", "add": "Add."},
    }  # fmt: skip


async def test_the_second_question_is_asked_only_where_it_matters():
    asked = Asked(0.4, look=0.6, add=0.3)
    for decision in await both(DecisionModelGate(asked)):
        assert decision.direct
        assert decision.probabilities == pytest.approx({"look": 0.4, "add": 0.4})
    assert len(asked.requests) == 2  # one a decision
    for decision in await both(DecisionModelGate(asked, threshold=0.3), ONE_TOOL):
        assert decision.allowed == ("look",)
    assert len(asked.requests) == 4


def test_what_the_model_is_asked_about():
    asked = Asked(0.1)
    later = [
        HumanMessage("Who won?"), AIMessage("", tool_calls=[{"name": "look", "args": {}, "id": "1"}]),
        ToolMessage("Ada", tool_call_id="1"),
    ]  # fmt: skip
    gate = DecisionModelGate(asked, required=True)
    decision = gate.decide(GateRequest(messages=later, tools=TOOLS))
    assert not decision.required
    assert asked.requests[0]["state"] == [
        {"role": "user", "content": "Who won?"}, {"role": "assistant", "content": ""},
        {"role": "tool", "content": "Ada"},
    ]  # fmt: skip
    own = DecisionModelGate(asked, read_state=lambda request: {"asked": request.messages[0].text})
    own.decide(REQUEST)
    assert asked.requests[-1]["state"] == {"asked": "Who won?"}


@pytest.mark.parametrize(
    "reply",
    [
        None, 5, {"answers": 5}, {}, {"answerable": 0.5}, {"answerable": {"type": "noul"}},
        {"answerable": {"noul": "yes"}}, {"answerable": {"noul": 1.5}}, {"answerable": {"noul": math.nan}},
        {"answerable": {"noul": True}},
        {"answerable": {"noul": 0.1}},  # then no choice
        {"answerable": {"noul": 0.1}, "tool": {"probabilities": {"look": 0.5}}},
        {"answerable": {"noul": 0.1}, "tool": {"probabilities": {"look": 0.0, "add": 0.0}}},
    ],
)  # fmt: skip
async def test_an_answer_that_is_none_is_an_error(reply):
    gate = DecisionModelGate(lambda request: reply)
    with pytest.raises(GateError, match="the decision model"):
        gate.decide(REQUEST)
    with pytest.raises(GateError, match="the decision model"):
        await gate.adecide(REQUEST)


async def test_any_runnable_that_takes_the_requests_will_do():
    for decision in await both(DecisionModelGate(RunnableLambda(needing(0.9, look=0.1, add=0.9)))):
        assert decision.allowed == ("add",)


async def test_a_callable_is_called_by_one_thread_at_a_time():
    inside = []

    def slow(request):
        inside.append(1)
        time.sleep(0.002)
        assert len(inside) == 1
        inside.pop()
        return needing(0.1)(request)

    gate = DecisionModelGate(slow)
    decisions = await asyncio.gather(*(gate.adecide(REQUEST) for _ in range(20)))
    assert all(decision.direct for decision in decisions)


@pytest.mark.parametrize("candidate", [5, None, "localhost:8000", "decide"])
def test_what_is_no_decision_model_is_refused(candidate):
    with pytest.raises(ConfigurationError):
        DecisionModelGate(candidate)
    with pytest.raises(ConfigurationError, match="timeout"):
        DecisionModelGate("http://127.0.0.1", timeout=0)


# A server


@contextmanager
def server(handle):
    """A real server on this machine; `handle` makes (status, body) of a path and a request."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body, dict(self.headers)))
            status, reply = handle(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments):
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request, address):
            pass  # a client that gave up waiting

    running = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", seen
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def ok(answer):
    return lambda body: (200, json.dumps(answer(body)).encode())


class TestServer:
    pytestmark = local

    async def test_it_is_asked_over_http(self):
        with server(ok(needing(0.7, look=0.2, add=0.8))) as (url, seen):
            gate = DecisionModelGate(url, model_name="tiny", headers={"Authorization": "Bearer me"})
            for decision in await both(gate):
                assert decision.allowed == ("add",)
                assert decision.probabilities == pytest.approx({"look": 0.175, "add": 0.7})
            assert [path for path, _, _ in seen] == ["/v1/systemone"] * 4
            body = seen[0][1]
            assert (body["model"], body["state"]) == ("tiny", "Who won?")
            assert body["questions"]["answerable"]["type"] == "noul"
            assert seen[0][2]["Authorization"] == "Bearer me"
            for other in (url + "/v1/", url + "/v1/systemone"):
                DecisionModelGate(other).decide(ONE_TOOL)
                assert (seen[-1][0], "model" in seen[-1][1]) == ("/v1/systemone", False)

    async def test_many_at_once(self):
        with server(ok(needing(0.2))) as (url, seen):
            gate = DecisionModelGate(url)
            decisions = await asyncio.gather(*(gate.adecide(REQUEST) for _ in range(30)))
            assert all(decision.direct for decision in decisions)
            assert len(seen) == 30

    @pytest.mark.parametrize(
        ("handle", "word"),
        [
            (lambda body: (422, b'{"detail": "questions"}'), "status 422.*questions"),
            (lambda body: (500, b"oops"), "status 500"),
            (lambda body: (200, b"<html>"), "no JSON"),
            (lambda body: (200, b"[1]"), "must be a mapping"),
        ],
    )
    async def test_what_it_says_wrong_is_said(self, handle, word):
        with server(handle) as (url, _):
            gate = DecisionModelGate(url)
            with pytest.raises(GateError, match=word):
                gate.decide(REQUEST)
            with pytest.raises(GateError, match=word):
                await gate.adecide(REQUEST)

    async def test_a_server_that_hangs_or_is_not_there(self):
        release = threading.Event()

        def hang(body):
            release.wait(20)
            return 200, b"{}"

        with server(hang) as (url, _):
            try:
                with pytest.raises(GateError, match=r"did not answer in 0\.2 seconds"):
                    DecisionModelGate(url, timeout=0.2).decide(REQUEST)
            finally:
                release.set()
        with pytest.raises(GateError, match="can't be reached"):
            DecisionModelGate(url).decide(REQUEST)

    def test_in_an_agent_a_server_that_is_down_leaves_the_decision_to_the_model(self):
        @tool
        def look(query: str) -> str:
            """Look."""
            return query

        with server(ok(needing(0.1))) as (url, _):
            gate = DecisionModelGate(url)
            agent = create_metis_agent(model("fine"), [look], gate=gate)
            question = {"messages": [HumanMessage("q")]}
            assert agent.invoke(question)["decisions"][0].direct
        for state in (agent.invoke(question), asyncio.run(agent.ainvoke(question))):
            assert state["messages"][-1].content == "fine"
            assert state["decisions"][0].allowed == ("look",)
            assert "can't be reached" in state["decisions"][0].reason


# transformers


@pytest.fixture(scope="module")
def pipeline():
    """transformers' own decision pipeline on a tiny random model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.22")
    from transformers.pipelines import DecisionPipeline

    from tests.models.conftest import build_policy, build_tokenizer

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["Yes", "No"])
    made = DecisionPipeline(model=build_policy(tokenizer), tokenizer=tokenizer, device="cpu")
    # The pipeline adds two tokens of its own, which are never read: they need no embedding.
    yield made
    torch.set_num_threads(before)


async def test_the_pipeline_of_transformers(pipeline):
    by_hand = pipeline(
        {
            "state": "Who won?",
            "questions": {
                "n": {"type": "noul", "instructions": ANSWERABLE},
                "c": {
                    "type": "choice", "instructions": WHICH_TOOL,
                    "criteria": {"look": "Look things up.", "add": "Add."},
                },
            },
        }
    )  # fmt: skip
    asked = []

    def plain(request):
        # Without the criteria, to compare with the question asked by hand.
        for question in request["questions"].values():
            if question["type"] == "noul":
                del question["criteria"]
        asked.append(request)
        return pipeline(request)

    p, chance = 1 - by_hand["n"]["noul"], by_hand["c"]["probabilities"]
    best = max(chance, key=chance.get)
    for decision in await both(DecisionModelGate(plain, threshold=0.0)):
        assert decision.allowed == (best,)
        expected = {name: p * value / chance[best] for name, value in chance.items()}
        assert decision.probabilities == pytest.approx(expected, abs=1e-6)
    # And as users have it; a random model still gives probabilities, other ones for another question.
    decisions = await both(DecisionModelGate(pipeline, threshold=0.0))
    assert decisions[0].probabilities == pytest.approx(decisions[1].probabilities)
    other = DecisionModelGate(pipeline, threshold=0.0).decide(GateRequest(messages=[HumanMessage("1+1")], tools=TOOLS))
    assert other.probabilities != pytest.approx(decisions[0].probabilities, abs=1e-6)


async def test_the_pipeline_in_many_threads(pipeline):
    gate = DecisionModelGate(pipeline)
    decisions = await asyncio.gather(*(gate.adecide(ONE_TOOL) for _ in range(8)))
    assert len({decision.probabilities["look"] for decision in decisions}) == 1
