"""`DecisionModelGate`: any decision model as a gate, trained or not, and the three ways to reach one.

Two levels. First a noul question, "can this be answered rightly without any tool?"; only where the answer is no
surely enough, and there are several tools, a choice among them by their descriptions. Decided anew at each step of
a turn, with the tools' results in sight. Where the decision model was not trained for this, choose the threshold on
questions of your own.

A request is `{"state": ..., "questions": {id: question}}`; a question of type "noul" asks for the probability of
yes, one of type "choice" for a probability for each label. The same shape is taken by LangChain's
`BaseDecisionModel`, by transformers' `pipeline("decision")`, and by `POST /v1/systemone` of `transformers serve`
and other servers. Answers come back as plain dicts, whoever gave them.
"""

from __future__ import annotations

import importlib
import json
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol

from langchain_core.runnables import Runnable, RunnableConfig

from metis_agent.deadline import arun_in_thread
from metis_agent.errors import ConfigurationError, GateError, MissingDependencyError
from metis_agent.gates.base import Gate, allows
from metis_agent.messages import is_first_step, text_of, turn_of
from metis_agent.types import GateDecision, GateRequest, ToolSpec

__all__ = [
    "ANSWERABLE",
    "WHICH_TOOL",
    "Answers",
    "Asker",
    "DecisionModelGate",
    "Questions",
    "SystemOneServer",
    "asker_of",
    "conversation",
    "langchain_decisions",
]


Questions = Mapping[str, Mapping[str, Any]]
Answers = Mapping[str, Mapping[str, Any]]

_UNSEEN = RunnableConfig(tags=["nostream"])
_SHOWN = 300


class Asker(Protocol):
    """A decision model, however it is reached."""

    def ask(self, state: Any, questions: Questions) -> Answers:
        """Answer the questions about the state."""

    async def aask(self, state: Any, questions: Questions) -> Answers:
        """The same without blocking the event loop."""


def langchain_decisions() -> Any:
    """LangChain's module of decision models.

    Raises:
        MissingDependencyError: the installed langchain-core has none.
    """
    try:
        return importlib.import_module("langchain_core.decisions")
    except ImportError as error:
        raise MissingDependencyError(
            "This langchain-core has no decision models; they came with version 1.8. "
            "Install it with `pip install 'langchain-core>=1.8'`."
        ) from error


def asker_of(model: object, *, timeout: float, model_name: str | None, headers: Mapping[str, str] | None) -> Asker:
    """The way to ask a model.

    Raises:
        ConfigurationError: it is none that can be asked.
    """
    if isinstance(model, str):
        return SystemOneServer(model, timeout=timeout, model=model_name, headers=headers)
    if isinstance(model, Runnable):
        return _Runnable(model)
    if callable(model):
        return _Pipeline(model)
    raise ConfigurationError(
        f"{model!r} is no decision model: pass a LangChain BaseDecisionModel, a transformers pipeline('decision'), "
        "or the URL of a server with /v1/systemone."
    )


class _Runnable:
    """LangChain's `BaseDecisionModel`, or any Runnable that takes the same request."""

    def __init__(self, model: Runnable[Any, Any]) -> None:
        self._model = model
        self._typed: Mapping[str, Callable[..., Any]] = {}
        try:
            decisions = langchain_decisions()
        except MissingDependencyError:
            return
        if isinstance(model, decisions.BaseDecisionModel):
            self._typed = {"noul": decisions.Noul, "choice": decisions.Choice}

    def ask(self, state: Any, questions: Questions) -> Answers:
        return _answers(self._model.invoke(self._request(state, questions), _UNSEEN))

    async def aask(self, state: Any, questions: Questions) -> Answers:
        return _answers(await self._model.ainvoke(self._request(state, questions), _UNSEEN))

    def _request(self, state: Any, questions: Questions) -> dict[str, Any]:
        typed = {
            id_: self._typed[question["type"]](**question) if self._typed else dict(question)
            for id_, question in questions.items()
        }
        return {"state": state, "questions": typed}


class _Pipeline:
    """transformers' `pipeline("decision")`, or any callable that takes the same request; one call at a time."""

    def __init__(self, pipeline: Callable[..., Any]) -> None:
        self._pipeline = pipeline
        # A pipeline is one model and one tokenizer, and fast tokenizers can't be used by two threads at once.
        self._lock = threading.Lock()

    def ask(self, state: Any, questions: Questions) -> Answers:
        request = {"state": state, "questions": {id_: dict(question) for id_, question in questions.items()}}
        with self._lock:
            return _answers(self._pipeline(request))

    async def aask(self, state: Any, questions: Questions) -> Answers:
        return await arun_in_thread(self.ask, state, questions)


class SystemOneServer:
    """A server that answers `POST /v1/systemone`.

    Args:
        url: the server, with or without the path.
        timeout: seconds that a request may take, at each of connecting, sending and waiting.
        model: the model's name, where the server holds several.
        headers: sent along, such as `{"Authorization": "Bearer ..."}`.

    Raises:
        ConfigurationError: the URL is none, or the timeout is not positive.
        MissingDependencyError: httpx is not installed.
    """

    def __init__(
        self, url: str, *, timeout: float = 10.0, model: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigurationError(f"The decision server's URL is {url!r}; it must start with http:// or https://.")
        if not 0 < timeout < float("inf"):
            raise ConfigurationError(f"The timeout is {timeout!r}; it must be a positive number of seconds.")
        try:
            import httpx
        except ImportError as error:
            raise MissingDependencyError(
                "Asking a decision server needs httpx. Install it with `pip install httpx`."
            ) from error
        base = url.rstrip("/")
        base = base if base.endswith("/systemone") else base + ("" if base.endswith("/v1") else "/v1") + "/systemone"
        self.url, self.timeout, self.model = base, timeout, model
        self._httpx = httpx
        # One client for all threads; async runs use it in a thread: an async client belongs to one event loop.
        self._client = httpx.Client(timeout=timeout, headers=dict(headers or {}))
        weakref.finalize(self, self._client.close)

    def ask(self, state: Any, questions: Questions) -> Answers:
        """Answer the questions about the state.

        Raises:
            GateError: the server can't be reached in time, refuses, or answers something else.
        """
        body = {"state": state, "questions": questions} | ({"model": self.model} if self.model else {})
        try:
            reply = self._client.post(self.url, json=body)
        except self._httpx.TimeoutException as error:
            raise GateError(f"the decision server {self.url!r} did not answer in {self.timeout:g} seconds") from error
        except self._httpx.HTTPError as error:
            raise GateError(f"the decision server {self.url!r} can't be reached: {error}; does it run?") from error
        if reply.status_code != 200:
            raise GateError(
                f"the decision server {self.url!r} answered with status {reply.status_code}: {reply.text[:_SHOWN]!r}"
            )
        try:
            return _answers(reply.json())
        except json.JSONDecodeError as error:
            raise GateError(f"the decision server {self.url!r} answered {reply.text[:_SHOWN]!r}, no JSON") from error

    async def aask(self, state: Any, questions: Questions) -> Answers:
        """The same without blocking the event loop."""
        return await arun_in_thread(self.ask, state, questions)


def _answers(reply: Any) -> Answers:
    """Answers by question, from a response object, its JSON, or the answers themselves."""
    answers = getattr(reply, "answers", None)
    if answers is None and isinstance(reply, Mapping):
        answers = reply.get("answers", reply)
    if not isinstance(answers, Mapping):
        raise GateError(f"the decision model answered {reply!r}; answers must be a mapping by question")
    plain = {id_: answer.model_dump() if hasattr(answer, "model_dump") else answer for id_, answer in answers.items()}
    for id_, answer in plain.items():
        if not isinstance(answer, Mapping):
            raise GateError(f"the decision model answered {answer!r} to {id_!r}; an answer must be an object")
    return plain


ANSWERABLE = "Can this be answered rightly without any tool?"
"""The noul question of the first level."""

WHICH_TOOL = "Which tool is needed to answer this rightly?"
"""The choice of the second level."""

_CRITERIA = {
    "true": "The right answer is known, or stands in what is given.",
    "false": "The right answer has to be looked up, computed or observed with a tool.",
}
_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}
_Asking = Generator[Questions, Answers, GateDecision]


def conversation(request: GateRequest) -> str | list[dict[str, str]]:
    """The state that a decision model is asked about: the question's text, or the messages where there are more."""
    if len(request.messages) == 1:
        return str(request.messages[0].text)
    return [
        {"role": _ROLES.get(message.type, message.type), "content": text_of(message)} for message in request.messages
    ]


class DecisionModelGate(Gate):
    """Asks a decision model.

    With p = 1 - P("can be answered without a tool"), each tool's probability is p times how likely it is the one
    that is needed, relative to the likeliest; so the likeliest has p, and is the one that is allowed where p is
    above the threshold. Where the second question was not asked, each has p.

    Args:
        model: a LangChain `BaseDecisionModel` (langchain-core 1.8), or another Runnable that takes its requests; a
            transformers `pipeline("decision")`, or another callable that takes its requests; or the URL of a server
            that answers `POST /v1/systemone`, such as `transformers serve`.
        threshold: as in `Gate`.
        required: where a tool is allowed at the first step of a turn, it has to be called.
        read_state: what the model is asked about; by default the text of the conversation (see `conversation`).
        timeout: seconds that a server may take.
        model_name: the model's name, for a server that holds several.
        headers: for a server, such as `{"Authorization": "Bearer ..."}`.
        name: as in `Gate`.

    Raises:
        ConfigurationError: the model is none of these, or the threshold is out of range.
        MissingDependencyError: a URL is given, and httpx is not installed.
    """

    def __init__(
        self,
        model: object,
        *,
        threshold: float = 0.5,
        required: bool = False,
        read_state: Callable[[GateRequest], Any] = conversation,
        timeout: float = 10.0,
        model_name: str | None = None,
        headers: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:
        super().__init__(threshold=threshold, required=required, name=name)
        self._asker = asker_of(model, timeout=timeout, model_name=model_name, headers=headers)
        self._read_state = read_state

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide; see `metis_agent.gates.base`.

        Raises:
            GateError: the model can't be asked, or its answer is none to the question.
        """
        state, asking = self._read_state(request), self._ask(request)
        questions = next(asking)
        while True:
            try:
                questions = asking.send(self._asker.ask(state, questions))
            except StopIteration as end:
                return _decision_of(end)

    async def adecide(self, request: GateRequest) -> GateDecision:
        """`decide` without blocking the event loop."""
        state, asking = self._read_state(request), self._ask(request)
        questions = next(asking)
        while True:
            answers = await self._asker.aask(state, questions)
            try:
                questions = asking.send(answers)
            except StopIteration as end:
                return _decision_of(end)

    def _ask(self, request: GateRequest) -> _Asking:
        """Yield what to ask, get the answers, and so on; at last return the decision."""
        started = time.perf_counter()
        answers = yield {"answerable": {"type": "noul", "instructions": ANSWERABLE, "criteria": dict(_CRITERIA)}}
        p = 1 - _number(answers, "answerable", "noul")
        chosen = [tool.name for tool in request.tools]
        estimates = dict.fromkeys(chosen, p)
        if len(request.tools) > 1 and allows(p, self.threshold):
            answers = yield {"tool": _choice(request.tools)}
            chance = {name: _number(answers, "tool", "probabilities", name) for name in chosen}
            likeliest = max(chance, key=lambda name: chance[name])
            if not chance[likeliest]:
                raise GateError(f"the decision model gives every tool probability 0: {answers['tool']!r}")
            estimates, chosen = {name: p * chance[name] / chance[likeliest] for name in chance}, [likeliest]
        allowed = tuple(chosen) if allows(p, self.threshold) else ()
        return GateDecision(
            allowed=allowed,
            required=bool(self.required and allowed and is_first_step(turn_of(request.messages))),
            probabilities=estimates,
            threshold=self.threshold,
            gate=self.name,
            version=self.version,
            seconds=time.perf_counter() - started,
        )


def _choice(tools: tuple[ToolSpec, ...]) -> dict[str, Any]:
    criteria = {tool.name: tool.description or None for tool in tools}
    return {"type": "choice", "instructions": WHICH_TOOL, "criteria": criteria}


def _number(answers: Answers, *path: str) -> float:
    """A probability of the answers."""
    value: Any = answers
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise GateError(f"the decision model answered {answers!r}; {'.'.join(path)} must be a number in [0, 1]")
    return float(value)


def _decision_of(end: StopIteration) -> GateDecision:
    decision: GateDecision = end.value
    return decision
