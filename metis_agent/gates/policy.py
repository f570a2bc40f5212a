"""`PolicyGate`: a gate that was trained on recorded outcomes, loaded from its artefact folder.

Where it stands: `metis train gate` writes the folder, this serves it, whatever kind of policy reads the question
(`metis_agent.gates.scorers`). Kind `features` is plain Python, well under a millisecond a decision, no torch and no
numpy; the others import transformers when they are loaded. A gate that was trained on single questions decides whether
tools are worth it, and after the first call the model goes on freely; one that was trained on decision points decides
before every round of calls, with what the tools have brought so far, whether to go on or to answer.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from langchain_core.messages import BaseMessage, ToolMessage

from metis_agent.deadline import arun_in_thread
from metis_agent.errors import ConfigurationError, GateError
from metis_agent.gates.artefact import fetch_gate, load_artefact
from metis_agent.gates.base import Gate, allows
from metis_agent.gates.features import draft_log_prob_features, draft_text_features, readings
from metis_agent.gates.reading import conversation_before, load_familiarity, observed, reading_of
from metis_agent.gates.scorers import Asked, decision_probabilities, load_scorer
from metis_agent.messages import is_first_step, provider_name, text_of, turn_of
from metis_agent.types import Draft, GateDecision, GateRequest, ToolOutcome, ToolSpec

__all__ = [
    "STRANGE",
    "UNFAMILIAR",
    "PolicyGate",
    "read_images",
    "read_request",
]

UNFAMILIAR = "unlike the gate's training"
"""How the reason of a decision begins that was left to the model."""

STRANGE = "how unlike the gate's training"
"""Name of that score among the gate's readings."""

ReadRequest = Callable[[GateRequest], tuple[str, str]]
ReadDraft = Callable[[Draft], Mapping[str, float]]


def read_request(request: GateRequest) -> tuple[str, str]:
    """(question, context) of the turn: its last paragraph or text block, and what stands before it.

    So a table or a passage goes first and the question last, with a blank line between.
    """
    turn = turn_of(request.messages)
    text = str(turn[0].text).strip() if turn else ""
    content = turn[0].content if turn else ""
    if isinstance(content, list):
        blocks = [block if isinstance(block, str) else str(block.get("text", "")) for block in content]
        if len(blocks := [block.strip() for block in blocks if block.strip()]) > 1:
            return blocks[-1], "\n".join(blocks[:-1])
    context, _, question = text.rpartition("\n\n")
    return question.strip(), context.strip()


class PolicyGate(Gate):
    """A trained gate; safe to share between threads and event loops.

    Args:
        folder: What `metis train gate --out` wrote.
        threshold: By default the artefact's own, as `metis calibrate` chose it.
        required: Where a tool is allowed at the first step of a turn, one has to be called: that is the branch
            whose outcomes were recorded, and what the artefact's figures hold for.
        read_request: (question, context) from a request; the context is used by a gate trained with one. A gate
            trained without reads the whole text of the question by default.
        read_draft: Numbers from a draft, by the names of the training columns, added to those that its text and
            log-probabilities give.
        unfamiliar: Who decides on a question unlike the gate's training, as `metis_agent.gates.policy` scores it:
            by default the "model", all tools allowed; or the "gate" all the same. `unfamiliar_turns` counts them.
            So it is where another model answers than those that the gate learnt from, from its first reply on.
        new_tools: Let a gate of kind `decision_lm` decide on tools that it was not trained for, by their
            descriptions. Its figures and the promise of its threshold don't cover them.
        device: Where a gate of kind `encoder` or `decision_lm` runs, such as "cpu" or "cuda:1"; by default the
            accelerator, where there is one.

    Raises:
        CheckpointError: the folder is no artefact, or was changed.
        SchemaVersionError: a newer Metis wrote it.
        ConfigurationError: the threshold is out of its range, or `new_tools` with a kind that can't meet one.
        MissingDependencyError: its kind needs an extra that is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threshold: float | None = None,
        required: bool = True,
        read_request: ReadRequest | None = None,
        read_draft: ReadDraft | None = None,
        unfamiliar: Literal["model", "gate"] = "model",
        new_tools: bool = False,
        device: str | None = None,
        name: str = "",
    ) -> None:
        self.artefact = load_artefact(folder)
        description = self.artefact.description
        super().__init__(
            threshold=description["threshold"]["value"] if threshold is None else threshold,
            required=required,
            name=name,
            version=description["version"],
        )
        self._scorer = load_scorer(self.artefact, device)
        if new_tools and not self._scorer.open_tools:
            raise ConfigurationError(
                f"new_tools=True, and the gate in {str(folder)!r} is of kind {description['kind']!r}, which has one "
                "head for each tool. Only 'decision_lm' knows tools by their descriptions."
            )
        self._new_tools = new_tools
        self.wants_draft = bool(self._scorer.draft_columns)
        """True where the gate was trained on a direct draft, so that requests should bring one."""
        self._read_request = read_request or (_read if description["policy"].get("context") else _whole_text)
        self._read_draft = read_draft
        self._reads_history = bool(description["policy"].get("history"))
        self.every_step = bool(description["policy"].get("steps"))
        """True where it decides before every round of calls, and not on the first alone."""
        self._reading = reading_of(self.artefact)
        self._reads_images = bool(description["policy"].get("images"))
        if unfamiliar not in ("model", "gate"):
            raise ConfigurationError(f"unfamiliar={unfamiliar!r}: who decides is the 'model' or the 'gate'.")
        self._unfamiliar = unfamiliar
        self._strange = load_familiarity(self.artefact)
        self._familiarity = self._strange if unfamiliar == "model" else None
        self._counting = threading.Lock()
        self.models = frozenset(map(str, description.get("models", ())))
        """Names, with their versions, of the models whose runs it learnt from; empty where the records have none."""
        self._in_service = ""
        self.turns = self.unfamiliar_turns = 0
        """Turns that were answered, and those of them that began with a question left to the model."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, token: str | None = None, **options: Any
    ) -> PolicyGate:
        """A gate from a folder or from a Hugging Face hub.

        Args:
            name: A folder, or `owner/name` as `metis push` published it.
            revision: A commit, tag or branch of the hub's; only a commit stays what it is.
            token: By default that of `hf auth login`, or the variable HF_TOKEN.
            **options: As `PolicyGate` takes them.

        Raises:
            CheckpointError: there is no such gate, it can't be fetched, or its files are not what was exported.
            ConfigurationError: `name` is neither a folder nor a name, or an option is wrong.
            MissingDependencyError: huggingface_hub, or what the gate's kind needs, is not installed.
        """
        return cls(fetch_gate(name, revision=revision, token=token), **options)

    def check_tools(self, tools: Sequence[ToolSpec]) -> None:
        """Refuse an agent with a tool that the gate knows nothing of, or without one that it does.

        Raises:
            ConfigurationError: the tools are not those that the gate was trained for.
        """
        names = {tool.name for tool in tools}
        if names != set(self.artefact.tools) and not self._new_tools:
            raise ConfigurationError(
                f"The agent has the tools {sorted(names)!r}, and the gate in {str(self.artefact.folder)!r} was trained "
                f"for {sorted(self.artefact.tools)!r}: the sets must be the same. {self._remedy()}"
            )

    def knows(self, tool: ToolSpec) -> bool:
        """True for the tools that the gate was trained for, and for all where it goes by descriptions."""
        return self._new_tools or tool.name in self.artefact.tools

    def score(
        self,
        question: str,
        context: str = "",
        draft: Mapping[str, float] | None = None,
        *,
        draft_text: str = "",
        history: str = "",
        step: int = 0,
        images: Sequence[Any] = (),
        tools: Sequence[ToolSpec] = (),
    ) -> tuple[dict[str, float], dict[str, float]]:
        """(estimated accuracy of each branch, probability of each tool), both by name.

        Args:
            question: The text of the question.
            context: What came with it, for a gate that was trained with contexts.
            draft: Numbers from a direct draft, for a gate that was trained with them.
            draft_text: The draft itself, for a gate that was trained on its words.
            history: The conversation before it, as `conversation_before` writes it, for a gate that was trained with
                conversations; behind it what the tools have brought, as `observed` writes it.
            step: Calls so far, for a gate that decides at every step.
            images: PIL images, or base64 strings of their files, for a gate whose model reads images.
            tools: To ask about, where the gate knows tools by their descriptions; by default those trained for.

        Raises:
            GateError: a number of the draft is missing that never was in training, an image can't be read, or the
                weights give no finite numbers.
        """
        asked = Asked(
            question=question,
            context=context,
            history=history,
            draft=draft,
            draft_text=draft_text,
            images=tuple(images),
            tools=tuple(tools),
        )
        logits = self._scorer.logits(asked)
        if not math.isfinite(sum(logits)):
            raise GateError(f"the gate's logits are {list(logits)!r}, no finite numbers: its weights are broken")
        names = tuple([tool.name for tool in tools]) or self.artefact.tools
        accuracy, worth = decision_probabilities(self._decision(names), logits, step)
        return dict(zip(("direct", *names), accuracy, strict=True)), dict(zip(names, worth, strict=True))

    def readings(self, question: str, context: str = "", history: str = "") -> dict[str, float]:
        """What can be told of a question before any answer, by name: numbers of its texts, and how strange it is.

        `metis calibrate` keeps them with the gate, and `metis drift` compares. The parameters are those of `score`.
        """
        found = readings(
            question,
            context if self.artefact.description["policy"].get("context") else None,
            history if self._reads_history else None,
            steps=self.every_step,
            reading=self._reading,
        )
        return found if self._strange is None else {**found, STRANGE: self._strange.score(question)}

    def estimate(self, request: GateRequest) -> dict[str, float]:
        """Probability of each tool; see `metis_agent.gates.base`.

        Raises:
            ConfigurationError: the request has a tool that the gate was not trained for.
            GateError: see `score`.
        """
        return self._estimates(request)[1]

    def _estimates(self, request: GateRequest) -> tuple[dict[str, float], dict[str, float]]:
        unknown = self._unknown(request)
        question, context = self._read_request(request)
        draft = self._draft_numbers(question, request.draft)
        images = read_images(request) if self._reads_images else ()
        tools, history = request.tools if unknown else (), self._history(request)
        step = _calls(request) if self.every_step else 0
        said = request.draft.text if request.draft else ""
        return self.score(
            question, context, draft, draft_text=said, history=history, step=step, images=images, tools=tools
        )

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide; of several tools over the threshold the most probable one is allowed.

        The decision is about the question alone: once something has been called, the model goes on freely. A gate
        that was trained on decision points decides anew each time; where it goes on, all that was offered stays on
        offer and nothing is required, since so were the runs that it learnt from.
        """
        if self.every_step:
            return self._at_this_step(request)
        if not is_first_step(turn_of(request.messages)):
            return replace(self._all(request), reason="tools were worth it; the model goes on")
        self._unknown(request)
        if (unlike := self._unlike(request)) is not None:
            return replace(self._all(request), reason=f"{UNFAMILIAR}: {unlike}; the model decides")
        decision = super().decide(request)
        probabilities = decision.probabilities or {}
        best = max(decision.allowed, key=lambda name: probabilities[name], default=None)
        return replace(decision, allowed=() if best is None else (best,))

    def _at_this_step(self, request: GateRequest) -> GateDecision:
        started = time.perf_counter()
        if (unlike := self._unlike(request)) is not None:
            return replace(self._all(request), reason=f"{UNFAMILIAR}: {unlike}; the model decides")
        accuracy, probabilities = self._estimates(request)
        worth = {tool.name: probabilities.get(tool.name, 0.0) for tool in request.tools}
        allowed = tuple(name for name, p in worth.items() if allows(p, self.threshold))
        on = max((accuracy[name] for name in worth), default=0.0)
        return GateDecision(
            allowed=allowed,
            probabilities=worth,
            threshold=self.threshold,
            gate=self.name,
            version=self.version,
            reason=f"{'going on' if allowed else 'enough'}: right with {accuracy['direct']:.2f} by answering now, "
            f"with {on:.2f} by going on, after {_calls(request)} calls",
            seconds=time.perf_counter() - started,
        )

    def after_turn(
        self, messages: Sequence[BaseMessage], decisions: Sequence[GateDecision], outcomes: Sequence[ToolOutcome]
    ) -> None:
        """Count the turn, and see which model answered."""
        with self._counting:
            self._in_service = _last_model(messages) or self._in_service
            self.turns += 1
            self.unfamiliar_turns += bool(decisions and decisions[0].reason.startswith(UNFAMILIAR))

    async def adecide(self, request: GateRequest) -> GateDecision:
        """`decide`, in a thread unless it is too quick to be worth one."""
        if self._scorer.instant:
            return self.decide(request)
        return await arun_in_thread(self.decide, request)

    def _all(self, request: GateRequest) -> GateDecision:
        return GateDecision(allowed=tuple([tool.name for tool in request.tools]), gate=self.name, version=self.version)

    def _unknown(self, request: GateRequest) -> set[str]:
        """Tools of the request that the gate was not trained for."""
        unknown = {tool.name for tool in request.tools} - set(self.artefact.tools)
        if unknown and not self._new_tools:
            raise ConfigurationError(
                f"The request has the tools {sorted(unknown)!r}, and the gate in {str(self.artefact.folder)!r} was "
                f"trained for {sorted(self.artefact.tools)!r}. {self._remedy()}"
            )
        return unknown

    def _history(self, request: GateRequest) -> str:
        if not self._reads_history:
            return ""
        turn = turn_of(request.messages)
        before = conversation_before(request.messages[: len(request.messages) - len(turn)])
        if not self.every_step:
            return before
        results = [message for message in turn if isinstance(message, ToolMessage)]
        brought = observed((it.name or "", text_of(it), it.status == "error") for it in results)
        return "\n".join(part for part in (before, brought) if part)

    def _unlike(self, request: GateRequest) -> str | None:
        """How unlike training the model or the question is; `None` where it is like it, or nobody knows."""
        by_name = self._unfamiliar == "model" and self.models
        model = (_last_model(request.messages) or self._in_service) if by_name else ""
        if model and model not in self.models:
            return f"the model is {model!r}, and the gate learnt from runs of {sorted(self.models)!r}"
        if self._familiarity is None:
            return None
        score = self._familiarity.score(self._read_request(request)[0])
        limit = self._familiarity.threshold
        return f"score {score:.3f}, above {limit:.3f}" if score > limit else None

    def _overrides(self, method: str) -> bool:
        # `adecide` here calls `decide`, not the other way round.
        return method != "adecide" and super()._overrides(method)

    def _decision(self, names: tuple[str, ...]) -> Mapping[str, object]:
        """How logits of these tools become probabilities; a new one counts as the trained ones do on average."""
        trained: Mapping[str, Any] = self.artefact.description["decision"]
        if names == self.artefact.tools:
            return trained
        place = {name: index + 1 for index, name in enumerate(self.artefact.tools)}
        decision = dict(trained)
        for key in ("saving", "mean_accuracy", "head_temperature"):
            values = trained[key]
            mean = sum(values[1:]) / len(values[1:])
            decision[key] = [values[0], *(values[place[name]] if name in place else mean for name in names)]
        return decision

    def _remedy(self) -> str:
        advice = "Train a gate for these tools."
        if self._scorer.open_tools:
            advice += " Or let it go by their descriptions, with new_tools=True: its figures don't cover that."
        return advice

    def _draft_numbers(self, question: str, draft: Draft | None) -> dict[str, float] | None:
        if draft is None:
            return None
        extra = self._read_draft(draft) if self._read_draft else {}
        said = draft_text_features(question, draft.text, self._reading)
        return {**said, **draft_log_prob_features(draft.log_probs), **extra}


def _last_model(messages: Sequence[BaseMessage]) -> str:
    replies = (message.response_metadata for message in reversed(messages) if message.type == "ai")
    return next((name for reply in replies if (name := provider_name(reply))), "")


def _calls(request: GateRequest) -> int:
    """Calls in this turn so far."""
    return sum(message.type == "tool" for message in turn_of(request.messages))


_read = read_request


def _whole_text(request: GateRequest) -> tuple[str, str]:
    turn = turn_of(request.messages)
    return (str(turn[0].text), "") if turn else ("", "")


_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,(?P<base64>[A-Za-z0-9+/=\s]+)")


def read_images(request: GateRequest) -> tuple[str, ...]:
    """Images of the turn's question, in order, each the base64 of its file.

    Raises:
        GateError: one is given by a URL, or by an id at a provider.
    """
    turn = turn_of(request.messages)
    content = turn[0].content if turn else ""
    if isinstance(content, str):
        return ()
    return tuple(_base64(block) for block in content if isinstance(block, dict) and _is_image(block))


def _is_image(block: dict[str, Any]) -> bool:
    return block.get("type") in ("image", "image_url")


def _base64(block: dict[str, Any]) -> str:
    """LangChain's own block, OpenAI's `image_url` and Anthropic's `source`."""
    source = block.get("source")
    found = block.get("base64") or (source.get("data") if isinstance(source, dict) else block.get("data"))
    if found:
        return str(found)
    url = block.get("image_url", block.get("url", ""))
    if isinstance(url, dict):
        url = url.get("url", "")
    if match := _DATA_URL.fullmatch(str(url)):
        return match["base64"]
    raise GateError(
        f"The gate can't see the image {str(url or block)[:80]!r}: it fetches nothing. Put the image's bytes into the "
        "message, as base64."
    )
