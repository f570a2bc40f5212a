"""The `decision_lm` policy: a chat model that decides, by the logits of option labels at the end of the prompt.

Training (`metis_agent.hdpo.policies.decision_lm`) and serving share it. The questions are those of the decision-model
standard, a request `{"state": ..., "questions": {name: question}, "assets": {placeholder: image}}` as LangChain's
`BaseDecisionModel`, transformers' `pipeline("decision")` and `POST /v1/systemone` take it, and the prompts are the
pipeline's own, so a gate's folder gives the same probabilities there and behind `transformers serve`.

Can this be answered rightly without any tool? And with each tool, in one of two forms. A tool is known by its name and
description alone.

- "noul": a yes-or-no question a tool. What is said of a tool depends neither on the others nor on their order.
- "choice": can it be answered with the best of the tools, and which of the letters A, B, ... is that? Three questions
  however many tools there are, but letters are harder to learn, and the order of the tools counts a little.

A noul's head is u = logit of Yes - logit of No, so sigmoid(u / temperature) is the pipeline's answer. In the form
"choice" the head of tool a is u + z_a - max z, with u of "tools" and z_a the logit of the tool's letter: the pipeline's
answers are then sigmoid(head / temperature) of the best tool, and softmax(z / temperature).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from metis_agent.errors import CheckpointError, ConfigurationError, GateError, InputError
from metis_agent.gates.artefact import Artefact
from metis_agent.gates.scorers import Asked
from metis_agent.gates.scorers.pretrained import Batcher, import_transformers, load_part, pick_device
from metis_agent.types import ToolSpec

__all__ = [
    "LETTERS",
    "DecisionLMScorer",
    "DecisionModel",
    "Form",
    "Prompt",
    "Rendered",
    "choose_labels",
    "decision_files",
    "decision_request",
    "questions_about",
    "state_of",
]


Form = Literal["noul", "choice"]

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""Labels of a choice; so many tools, and no more, can be asked about."""


def questions_about(tools: Sequence[ToolSpec], form: Form) -> dict[str, dict[str, Any]]:
    """The questions, by name: "direct" first.

    - "direct", a noul: its probability is the estimated accuracy of answering directly.
    - Form "noul": "tool NAME", a noul for each tool: that of the tool.
    - Form "choice": "tools", a noul: that of the tool which "tool" prefers; "tool", a choice (of several tools): each
      tool's share of the odds of being right.

    Raises:
        GateError: more tools than letters, for a choice.
    """
    questions: dict[str, dict[str, Any]] = {
        "direct": {"type": "noul", "instructions": "Can this be answered rightly without any tool?"}
    }
    if form == "noul":
        for tool in tools:
            asked = f"Can this be answered rightly with this tool?\n{_known(tool)}"
            questions[f"tool {tool.name}"] = {"type": "noul", "instructions": asked}
        return questions
    if len(tools) > len(LETTERS):
        raise GateError(
            f"There are {len(tools)} tools: this gate tells at most {len(LETTERS)} apart by a letter. Give fewer."
        )
    known = "\n".join(f"- {_known(tool)}" for tool in tools)
    asked = f"Can this be answered rightly with the best of the tools?\n{known}"
    questions["tools"] = {"type": "noul", "instructions": asked}
    if len(tools) > 1:
        criteria = {tool.name: tool.description or None for tool in tools}
        questions["tool"] = {"type": "choice", "instructions": "Which tool is best for this?", "criteria": criteria}
    return questions


def state_of(question: str, context: str = "", images: int = 0) -> str:
    """Placeholders of the images, the context, a blank line, the question."""
    shown = "".join(f"{_placeholder(index)}\n" for index in range(images))
    return shown + (f"{context}\n\n{question}" if context else question)


def decision_request(
    question: str, context: str = "", *, tools: Sequence[ToolSpec], form: Form, images: Sequence[Any] = ()
) -> dict[str, Any]:
    """The whole request; images are PIL images, or base64 strings of their files.

    Raises:
        GateError: more tools than letters, for a choice.
    """
    request: dict[str, Any] = {
        "state": state_of(question, context, len(images)),
        "questions": questions_about(tools, form),
    }
    if images:
        request["assets"] = {
            _placeholder(index): {"type": "image", "format": "png", "data_base64": image}
            if isinstance(image, str)
            else image
            for index, image in enumerate(images)
        }
    return request


def _placeholder(index: int) -> str:
    return f"<image_{index + 1}>"


def _known(tool: ToolSpec) -> str:
    return f"{tool.name}: {tool.description}" if tool.description else tool.name


CHUNK = 32
"""Prompts without images that go through the model together."""
_BINARY = (("Yes", "No"), (" Yes", " No"), ("yes", "no"), ("true", "false"), ("1", "0"))


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question of one request."""

    inputs: Mapping[str, Any]
    """Of the model, a batch of one, without mask."""
    labels: tuple[int, ...]
    """Token of each option."""

    @property
    def ids(self) -> Any:
        """Tensor [T]."""
        return self.inputs["input_ids"][0]

    @property
    def text_only(self) -> bool:
        """True where nothing but tokens goes in, so that prompts can share a batch."""
        return not any(name.startswith(("pixel", "image", "video")) for name in self.inputs)


Rendered = tuple[Prompt, ...]
"""The prompts of one request, in the order of `questions_about`."""


class DecisionModel:
    """A model, what writes its prompts, and its labels.

    Args:
        model: Causal language model, or vision language model.
        processor: Its tokenizer, or its processor where it reads images.
        labels: By question type; see `choose_labels`.
        form: Of the questions about tools; see `questions_about`.
        max_length: Tokens of a prompt, at most: a longer context is cut at its end.
    """

    def __init__(
        self, model: Any, processor: Any, labels: Mapping[str, Sequence[str]], form: Form, max_length: int
    ) -> None:
        from transformers.decision import DecisionConfig

        self.model = model
        self.processor = processor
        self.labels = {kind: list(names) for kind, names in labels.items()}
        self.form: Form = form
        self.max_length = max_length
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._config = DecisionConfig(labels=self.labels)
        self.reads_images = getattr(processor, "image_processor", None) is not None

    def render(self, asked: Asked, tools: Sequence[ToolSpec]) -> Rendered:
        """The prompts of a question.

        Raises:
            GateError: there are images and the model reads none, or one can't be read, or too many tools.
        """
        if asked.images and not self.reads_images:
            raise GateError(
                f"The question has {len(asked.images)} images, and this gate's model reads text only. Train one on a "
                "vision language model."
            )
        prompts = self._prompts(asked, asked.background, tools)
        over = max(len(prompt.ids) for prompt in prompts) - self.max_length
        if over > 0 and asked.background:
            prompts = self._prompts(asked, self._cut(asked.background, over), tools)
        return prompts

    def _prompts(self, asked: Asked, context: str, tools: Sequence[ToolSpec]) -> Rendered:
        from transformers.decision import label_token_ids

        request = decision_request(asked.question, context, tools=tools, form=self.form, images=_checked(asked.images))
        try:
            prepared = self._config.prepare_inputs(request, self.processor)
        except (OSError, ValueError, TypeError) as error:
            raise GateError(f"The question can't be put to the gate's model: {error}") from error
        return tuple(
            Prompt(
                inputs={name: value for name, value in inputs.items() if name != "marks"},
                labels=tuple(label_token_ids(self._tokenizer, tuple(questions[0].labels))),
            )
            for inputs, questions in prepared
        )

    def _cut(self, context: str, tokens: int) -> str:
        """Without its last `tokens` tokens, and a few more for those that grow where it is cut."""
        ends = self._tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        kept = len(ends) - tokens - 4
        return context[: ends[kept - 1][1]] if kept > 0 else ""

    def heads(self, rendered: Sequence[Rendered]) -> Any:
        """Tensor [n, 1 + tools]: one row a request; all of them about equally many tools."""
        import torch

        flat = [prompt for prompts in rendered for prompt in prompts]
        scores = self.label_logits(flat)
        rows, start = [], 0
        for prompts in rendered:
            own = scores[start : start + len(prompts)]
            start += len(prompts)
            rows.append(_choice_heads(own) if self.form == "choice" else torch.stack([y - n for y, n in own]))
        return torch.stack(rows)

    def label_logits(self, prompts: Sequence[Prompt]) -> list[Any]:
        """For each prompt, a tensor [options]: the logits of its labels after its last token."""
        found: dict[int, Any] = {}
        plain = [index for index, prompt in enumerate(prompts) if prompt.text_only]
        # Of like length together, so that little is padded.
        plain.sort(key=lambda index: len(prompts[index].ids))
        for start in range(0, len(plain), CHUNK):
            chunk = plain[start : start + CHUNK]
            found |= dict(zip(chunk, self._plain([prompts[index] for index in chunk]), strict=True))
        for index, prompt in enumerate(prompts):
            if index not in found:
                inputs = {name: _to(value, self.model.device) for name, value in prompt.inputs.items()}
                logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
                found[index] = logits[list(prompt.labels)].float()
        return [found[index] for index in range(len(prompts))]

    def _plain(self, prompts: Sequence[Prompt]) -> list[Any]:
        import torch

        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        width = int(lengths.max())
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            # Padded on the right: a causal model's positions then need no care, and what follows is not seen.
            row[: len(prompt.ids)] = prompt.ids
        mask = (torch.arange(width) < lengths[:, None]).long()
        last, place = torch.unique(lengths - 1, return_inverse=True)
        device = self.model.device
        logits = self.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=last.to(device)
        ).logits
        return [logits[row, at, list(prompts[row].labels)].float() for row, at in enumerate(place.tolist())]


def _checked(images: Sequence[Any]) -> list[Any]:
    """Images given as base64, loaded by the safe loader: transformers' own has no limits and takes any format.

    Raises:
        GateError: one can't be read.
    """
    if not any(isinstance(image, str) for image in images):
        return list(images)
    from metis_agent.tools.images import load_image

    try:
        return [
            load_image(f"data:;base64,{image}").convert("RGB") if isinstance(image, str) else image for image in images
        ]
    except InputError as error:
        raise GateError(f"The question can't be put to the gate's model: {error}") from error


def _choice_heads(scores: Sequence[Any]) -> Any:
    """[1 + tools]: from the labels' logits of direct, tools and, of several tools, tool."""
    import torch

    direct, tools = (yes - no for yes, no in scores[:2])
    choice = scores[2] - scores[2].max() if len(scores) > 2 else tools.new_zeros(1)
    return torch.cat([direct[None], tools + choice])


def _to(value: Any, device: Any) -> Any:
    return value.to(device) if hasattr(value, "to") else value


def choose_labels(tokenizer: Any) -> dict[str, list[str]]:
    """Labels that are single tokens of this tokenizer, by question type.

    Raises:
        ConfigurationError: there are none, or no chat template.
    """
    from transformers.decision import label_token_ids

    if not getattr(tokenizer, "chat_template", None):
        raise ConfigurationError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, so a question can't become a prompt. "
            "Use the instruct variant of the model."
        )
    chosen: dict[str, list[str]] = {}
    spaced = tuple(f" {letter}" for letter in LETTERS)
    for kind, candidates in (("noul", _BINARY), ("choice", (LETTERS, spaced))):
        for labels in candidates:
            try:
                label_token_ids(tokenizer, labels)
            except ValueError:
                continue
            chosen[kind] = list(labels)
            break
        else:
            raise ConfigurationError(
                f"The tokenizer of {tokenizer.name_or_path!r} has none of {candidates!r} as single tokens, which the "
                "answers are read from. Add the tokens, or use another model."
            )
    return chosen


def decision_files(source: Any, *, local: bool = False, **options: Any) -> tuple[Any, Any]:
    """(model, processor or tokenizer) of a chat model; a vision language model comes with its processor.

    Raises:
        CheckpointError: it can't be loaded.
        MissingDependencyError: torch or transformers is not installed.
    """
    transformers = import_transformers("A gate of kind 'decision_lm'")
    config = load_part(transformers.AutoConfig, source, local=local)
    # As `pipeline("decision")` chooses.
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    loader = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    processor = load_part(transformers.AutoProcessor if sees else transformers.AutoTokenizer, source, local=local)
    return load_part(loader, source, local=local, use_safetensors=True, **options), processor


BATCH = 16


class DecisionLMScorer:
    """Serves an artefact of kind `decision_lm`; concurrent questions share a forward pass.

    Args:
        artefact: The gate's folder.
        device: Where it runs; by default the accelerator, where there is one.

    Raises:
        CheckpointError: the model can't be loaded, or a part of the description is missing.
        MissingDependencyError: torch or transformers is not installed.
    """

    instant = False
    open_tools = True
    draft_columns: tuple[str, ...] = ()

    def __init__(self, artefact: Artefact, device: str | None = None) -> None:
        model, processor = decision_files(artefact.folder, local=True)
        try:
            policy = artefact.description["policy"]
            self._tools = tuple(
                ToolSpec(name=tool["name"], description=tool["description"]) for tool in policy["tools"]
            )
            labels, form, length = policy["labels"], policy["form"], int(policy["max_length"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{str(artefact.folder)!r} lacks a part: {error!r}; export it again.") from error
        self.model = DecisionModel(model.to(pick_device(device)).eval(), processor, labels, form, length)
        self._batcher: Batcher[Asked, list[float]] = Batcher(self._answer, BATCH)

    def logits(self, asked: Asked) -> list[float]:
        """See `metis_agent.gates.scorers.Scorer`."""
        return self._batcher.ask(asked)

    def _answer(self, batch: Sequence[Asked]) -> list[list[float]]:
        import torch

        rendered = [self.model.render(asked, asked.tools or self._tools) for asked in batch]
        alike: dict[int, list[int]] = defaultdict(list)
        for index, asked in enumerate(batch):
            alike[len(asked.tools or self._tools)].append(index)
        rows: dict[int, list[float]] = {}
        with torch.inference_mode():
            for indices in alike.values():
                heads = self.model.heads([rendered[index] for index in indices])
                rows |= dict(zip(indices, heads.tolist(), strict=True))
        return [rows[index] for index in range(len(batch))]
