"""A trained gate in service: one turn, one forward pass; and whether a question is like those that it was trained on.

Is a question like those that a gate was trained on? Where it isn't, the gate knows nothing of it.

Where it stands: training counts which n-grams it has seen and calibrates a score on questions that it held out, and on
other people's (`metis_agent.hdpo.gate_trainer`); `PolicyGate` leaves a question above the threshold to the model. The
text alone is read, whatever the policy reads: with w and s the shares of the question's word and skeleton n-grams that
no training question had, and l how far its length is from theirs, in standard deviations, the score is

    sigmoid(b0 + b1 w + b2 s + b3 min(l, 6)),    b1, b2, b3 >= 0

`PolicyGate`: a gate that was trained on recorded outcomes, loaded from its artefact folder.

Where it stands: `metis train gate` writes the folder, this serves it, whatever kind of policy reads the question
(`metis_agent.gates.scorers`). Kind `features` is plain Python, well under a millisecond a decision, no torch and no
numpy; the others import transformers when they are loaded. A decision is about the question of the turn, whether
tools are worth it; after the first call the model goes on freely.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from langchain_core.messages import BaseMessage

from metis_agent.deadline import arun_in_thread
from metis_agent.errors import CheckpointError, ConfigurationError, GateError
from metis_agent.gates.artefact import Artefact, fetch_gate, load_artefact, reading_of
from metis_agent.gates.base import Gate
from metis_agent.gates.features import draft_log_prob_features, draft_text_features
from metis_agent.gates.reading import READING, conversation_before, hashed_ngrams
from metis_agent.gates.scorers import Asked, load_scorer
from metis_agent.messages import is_first_step, turn_of
from metis_agent.types import Draft, GateDecision, GateRequest, ToolOutcome, ToolSpec

__all__ = [
    "PLACES",
    "SEEN",
    "UNFAMILIAR",
    "Familiarity",
    "PolicyGate",
    "decision_probabilities",
    "load_familiarity",
    "read_images",
    "read_request",
    "strangeness",
]

UNFAMILIAR = "unlike the gate's training"
"""How the reason of a decision begins that was left to the model."""
SEEN = "seen_ngrams"
"""Name of the tensor: one bit for each place of the hashed space, in words of 64."""
PLACES = 2**20
FURTHEST = 6.0
"""Standard deviations of length beyond which a question is not stranger still."""


@dataclass(frozen=True, kw_only=True)
class Familiarity:
    """What a gate has seen, and from when on a question is unlike it."""

    seen: Sequence[int]
    """[PLACES / 64]"""
    weights: tuple[float, float, float, float]
    """b0 to b3."""
    length: tuple[float, float]
    """Mean and standard deviation of log(1 + characters)."""
    threshold: float
    reading: int = READING
    """How its training read text."""

    def score(self, question: str) -> float:
        """How unlike training a question is, in [0, 1]."""
        words, skeleton = map(self._unseen, hashed_ngrams(question, PLACES, self.reading))
        return strangeness(self.weights, words, skeleton, length_surprise(question, self.length))

    def _unseen(self, counts: Mapping[int, int]) -> float:
        new = sum(not self.seen[place >> 6] >> (place & 63) & 1 for place in counts)
        return new / len(counts) if counts else 1.0


def strangeness(weights: Sequence[float], words: float, skeleton: float, length: float) -> float:
    """The score of a question from what is new in it."""
    z = weights[0] + weights[1] * words + weights[2] * skeleton + weights[3] * length
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, z))))


def length_surprise(question: str, length: tuple[float, float]) -> float:
    """Standard deviations between the question's length and the usual one, at most `FURTHEST`."""
    return min(FURTHEST, abs(math.log1p(len(question)) - length[0]) / length[1])


def load_familiarity(artefact: Artefact) -> Familiarity | None:
    """That of a gate; `None` where it was trained without, by an earlier version or on too few questions.

    Raises:
        CheckpointError: a part of it is missing or no finite number.
    """
    told: Any = artefact.description.get("familiarity")
    if told is None:
        return None
    try:
        found = Familiarity(
            seen=artefact.tensors[SEEN].values,
            weights=tuple(float(weight) for weight in told["weights"]),  # type: ignore[arg-type]
            length=(float(told["length"]["mean"]), float(told["length"]["deviation"])),
            threshold=float(told["threshold"]),
            reading=reading_of(artefact),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{str(artefact.folder)!r} lacks a part: {error!r}; export it again.") from error
    numbers = (*found.weights, *found.length, found.threshold)
    whole = len(found.seen) == PLACES // 64 and artefact.tensors[SEEN].values.typecode == "Q" and len(numbers) == 7
    if not (whole and all(map(math.isfinite, numbers)) and found.length[1] > 0):
        raise CheckpointError(
            f"{str(artefact.folder)!r} has a familiarity that fits no gate: {told!r}; export it again."
        )
    return found


ReadRequest = Callable[[GateRequest], tuple[str, str]]
ReadDraft = Callable[[Draft], Mapping[str, float]]


def decision_probabilities(decision: Mapping[str, object], logits: Sequence[float]) -> tuple[list[float], list[float]]:
    """(accuracy of each branch, probability of each tool) from the heads; the same as `hdpo`'s `Contrast`."""
    temperatures, saving, means = (_floats(decision[name]) for name in ("head_temperature", "saving", "mean_accuracy"))
    trust, beta, tau = (float(str(decision[name])) for name in ("trust", "beta", "temperature"))
    accuracy = [_sigmoid(z / t) for z, t in zip(logits, temperatures, strict=True)]
    tools = [
        _sigmoid((trust * p + (1 - trust) * mean - accuracy[0] - beta * c) / tau)
        for p, mean, c in zip(accuracy[1:], means[1:], saving[1:], strict=True)
    ]
    return accuracy, tools


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
        self._reading = reading_of(self.artefact)
        self._reads_images = bool(description["policy"].get("images"))
        if unfamiliar not in ("model", "gate"):
            raise ConfigurationError(f"unfamiliar={unfamiliar!r}: who decides is the 'model' or the 'gate'.")
        self._familiarity = load_familiarity(self.artefact) if unfamiliar == "model" else None
        self._counting = threading.Lock()
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
        history: str = "",
        images: Sequence[Any] = (),
        tools: Sequence[ToolSpec] = (),
    ) -> tuple[dict[str, float], dict[str, float]]:
        """(estimated accuracy of each branch, probability of each tool), both by name.

        Args:
            question: The text of the question.
            context: What came with it, for a gate that was trained with contexts.
            draft: Numbers from a direct draft, for a gate that was trained with them.
            history: The conversation before it, as `conversation_before` writes it, for a gate that was trained with
                conversations.
            images: PIL images, or base64 strings of their files, for a gate whose model reads images.
            tools: To ask about, where the gate knows tools by their descriptions; by default those trained for.

        Raises:
            GateError: a number of the draft is missing that never was in training, an image can't be read, or the
                weights give no finite numbers.
        """
        asked = Asked(
            question=question, context=context, history=history, draft=draft, images=tuple(images), tools=tuple(tools)
        )
        logits = self._scorer.logits(asked)
        if not math.isfinite(sum(logits)):
            raise GateError(f"the gate's logits are {list(logits)!r}, no finite numbers: its weights are broken")
        names = tuple([tool.name for tool in tools]) or self.artefact.tools
        accuracy, worth = decision_probabilities(self._decision(names), logits)
        return dict(zip(("direct", *names), accuracy, strict=True)), dict(zip(names, worth, strict=True))

    def estimate(self, request: GateRequest) -> dict[str, float]:
        """Probability of each tool; see `metis_agent.gates.base`.

        Raises:
            ConfigurationError: the request has a tool that the gate was not trained for.
            GateError: see `score`.
        """
        unknown = self._unknown(request)
        question, context = self._read_request(request)
        draft = self._draft_numbers(question, request.draft)
        images = read_images(request) if self._reads_images else ()
        tools, history = request.tools if unknown else (), self._history(request)
        return self.score(question, context, draft, history=history, images=images, tools=tools)[1]

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide; of several tools over the threshold the most probable one is allowed.

        The decision is about the question alone: once something has been called, the model goes on freely.
        """
        if not is_first_step(turn_of(request.messages)):
            return replace(self._all(request), reason="tools were worth it; the model goes on")
        self._unknown(request)
        if (unlike := self._unlike(request)) is not None:
            return replace(self._all(request), reason=f"{UNFAMILIAR}: {unlike}; the model decides")
        decision = super().decide(request)
        probabilities = decision.probabilities or {}
        best = max(decision.allowed, key=lambda name: probabilities[name], default=None)
        return replace(decision, allowed=() if best is None else (best,))

    def after_turn(
        self, messages: Sequence[BaseMessage], decisions: Sequence[GateDecision], outcomes: Sequence[ToolOutcome]
    ) -> None:
        """Count the turn."""
        with self._counting:
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
        messages = request.messages
        return conversation_before(messages[: len(messages) - len(turn_of(messages))])

    def _unlike(self, request: GateRequest) -> str | None:
        """How unlike training the question is; `None` where it is like it, or nobody knows."""
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


_read = read_request


def _whole_text(request: GateRequest) -> tuple[str, str]:
    turn = turn_of(request.messages)
    return (str(turn[0].text), "") if turn else ("", "")


def _floats(values: object) -> list[float]:
    return [float(value) for value in values] if isinstance(values, list) else []


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -500 else 0.0


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
