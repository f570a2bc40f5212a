"""A gate that fails, hangs, keeps count or knows only some tools means the same in both hosts."""

import logging
import threading
from types import SimpleNamespace
from typing import Any

from pydantic import Field

from metis_agent.gates import Gate
from metis_agent.types import GateDecision
from tests.fakes import ScriptedChatModel, call, calling, model


def test_a_gate_that_fails_leaves_it_to_the_model(make, go, ran, tools):
    class Broken(Gate):
        def estimate(self, request):
            raise RuntimeError("no weights")

    state = go(make(model(calling(call("look", query="x")), "ok"), tools, Broken()))
    assert ran == [("look", "x")]
    assert "no weights; the model decides" in state["decisions"][0].reason


def test_any_object_that_decides_is_told_of_turns(make, go, tools):
    class Theirs:
        told = ()

        def decide(self, request):
            return GateDecision(allowed=("look",))

        def after_turn(self, messages, decisions, outcomes):
            self.told = (messages[-1].text, len(decisions), [outcome.status for outcome in outcomes])

    gate = Theirs()
    go(make(model(calling(call("look", query="x")), "ok"), tools, gate))
    assert gate.told == ("ok", 2, ["ok"])


def test_a_hung_gate_is_left_alone_after_a_while(make, go, tools, caplog):
    release = threading.Event()

    class Hanging(Gate):
        def estimate(self, request):
            release.wait(60)
            return {}

    agent = make(model("ok"), tools, Hanging(), gate_timeout=0.02)
    before = threading.active_count()
    try:
        with caplog.at_level(logging.CRITICAL):
            reasons = [go(agent)["decisions"][0].reason for _ in range(12)]
        assert threading.active_count() - before < 9
    finally:
        release.set()
    assert "within 0.02 seconds" in reasons[0]
    assert "left alone" in reasons[-1]


def test_what_the_gate_does_not_know_is_the_models_to_decide(make, go, ran, tools):
    class Knowing(Gate):
        asked: list = []  # noqa: RUF012

        def knows(self, tool):
            return tool.name == "look"

        def decide(self, request):
            self.asked = [spec.name for spec in request.tools]
            return GateDecision(allowed=())

    gate = Knowing()
    state = go(make(model(calling(call("pay", amount=5)), "paid"), tools, gate))
    assert (gate.asked, ran) == (["look"], [("pay", 5)])
    assert state["decisions"][0].allowed == ("pay",)


def test_a_gate_that_fails_again_and_again_is_left_alone_and_then_tried_once(make, go, tools, monkeypatch):
    from metis_agent.rules import asking

    asked, now = [], [0.0]

    class Broken(Gate):
        def estimate(self, request):
            asked.append(now[0])
            if now[0] < 100:
                raise RuntimeError("no weights")
            return {}

    monkeypatch.setattr(asking, "time", SimpleNamespace(monotonic=lambda: now[0]))
    agent = make(model("ok"), tools, Broken())
    for moment in (*range(7), 20, 35, 50, 100, 101):
        now[0] = float(moment)
        reason = go(agent)["decisions"][0].reason
    assert asked == [0, 1, 2, 3, 4, 35, 100, 101]
    assert reason == ""


class BadRequestError(Exception):
    status_code = 400


class WithSetting(ScriptedChatModel):
    logprobs: bool | None = None
    said: list[Any] = Field(default_factory=list)
    takes_log_probs: bool = False

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.said.append(kwargs.get("logprobs"))
        if kwargs.get("logprobs") and not self.takes_log_probs:
            raise BadRequestError("Provider returned error")
        return super()._generate(messages, stop, run_manager, **kwargs)


def drafting():
    class Reads(Gate):
        wants_draft = True
        drafts = ()

        def decide(self, request):
            self.drafts = (*self.drafts, request.draft and request.draft.text)
            return GateDecision(allowed=())

    return Reads()


def test_a_model_that_refuses_log_probabilities_in_any_words_gives_a_draft_without_them(make, go, tools):
    chat, gate = WithSetting(script=["a draft"]), drafting()
    agent = make(chat, tools, gate)
    go(agent), go(agent)
    assert gate.drafts == ("a draft", "a draft")
    assert chat.said == [True, None, None]


def test_a_bad_request_of_another_kind_is_no_refusal_of_log_probabilities(make, go, tools):
    chat = WithSetting(script=[BadRequestError("too long")] * 2 + ["ok"], takes_log_probs=True)
    gate = drafting()
    agent = make(chat, tools, gate)
    assert "draft failed with BadRequestError: too long" in go(agent)["decisions"][0].reason
    go(agent)
    assert gate.drafts == (None, "ok")
    assert chat.said == [True, None, None, True]
