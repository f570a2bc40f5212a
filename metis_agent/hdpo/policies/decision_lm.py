"""The `decision_lm` policy: any chat model, of text or of text and images, that answers by the logits of labels.

Where it stands: `gate_trainer` fits it as it fits `features`, by the log loss of each branch's outcomes, and makes
the same contrast of it. The heads come from questions in words (`metis_agent.gates.scorers.decision_lm`), so a
tool is known by its description and a new one can be asked about. Where tools are told apart by letters, they change
places from epoch to epoch, so that no letter comes to mean a tool. It reads no `draft_*` numbers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metis_agent.errors import InputError, MissingDependencyError
from metis_agent.gates.scorers import Asked
from metis_agent.gates.scorers.decision_lm import (
    DecisionModel,
    Form,
    Rendered,
    choose_labels,
    decision_files,
    questions_about,
)
from metis_agent.gates.scorers.pretrained import check_source, import_transformers, load_part, pick_device, quiet
from metis_agent.hdpo.policies import Traits
from metis_agent.hdpo.policies.gradient import (
    FitProgress,
    fit_heads,
    fit_name,
    logits_of,
    source_stamp,
)
from metis_agent.hdpo.settings import GradientTraining
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.types import ToolSpec

__all__ = ["DecisionLMPolicy", "Lora"]

_EYES = r".*(visual|vision|image_encoder).*"
ORDERS = 6
"""Orders of the tools that training goes through, at most."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train low-rank adapters of all linear layers of the language model, merged into it when the gate is written."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05

    def adapt(self, model: Any) -> Any:
        """`model` with adapters, the rest of it frozen.

        Raises:
            MissingDependencyError: PEFT is not installed.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as missing:
            raise MissingDependencyError(
                f"LoRA needs {missing.name!r}; install it with: pip install 'langgraph-metis[train]'"
            ) from missing
        sees = any(re.fullmatch(_EYES, name) for name, _ in model.named_modules())
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear",
            # What the model sees stays as it is; what it makes of it is trained.
            exclude_modules=_EYES if sees else None,
        )
        return get_peft_model(model, config)


@dataclass(frozen=True, kw_only=True)
class DecisionLMPolicy:
    """A chat model to fine-tune.

    Raises:
        ConfigurationError: `model` looks like a folder, and there is no model in it.
        MissingDependencyError: transformers is not installed.
    """

    model: str
    """Folder, or name on the Hub, of a chat model."""
    descriptions: Mapping[str, str] = field(default_factory=dict)
    """Of the tools, by name: all that the model knows of them."""
    form: Form = "noul"
    """Of the questions about tools; "choice" asks three questions however many tools there are."""
    lora: Lora | None = None
    """By default all weights are trained, in float32."""
    images: Sequence[Sequence[Any]] = ()
    """[N], the images of each question: PIL images, or base64 strings of their files. Empty for none at all."""
    training: GradientTraining = GradientTraining(learning_rate=1e-5, epochs=5)
    max_length: int = 4096
    """Tokens of a prompt, at most; a longer context is cut."""
    device: str | None = None
    progress: FitProgress = field(default=lambda stage, done, total: None, compare=False)
    kind: str = "decision_lm"
    traits: Traits = Traits(searches_strength=False, reads_drafts=False)

    def __post_init__(self) -> None:
        import_transformers("The policy 'decision_lm'")
        check_source(self.model)

    def prepare(self, table: OutcomeTable) -> _Prepared:
        """Prompts are written when they are first asked for, and kept.

        Raises:
            InputError: `images` is not one entry a row.
        """
        if self.images and len(self.images) != len(table):
            raise InputError(f"images has {len(self.images)} entries for {len(table)} questions: one each.")
        tools = tuple(ToolSpec(name=name, description=self.descriptions.get(name, "")) for name in table.tools)
        return _Prepared(policy=self, table=table, tools=tools, prompts={})


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    policy: DecisionLMPolicy
    table: OutcomeTable
    tools: tuple[ToolSpec, ...]
    prompts: dict[tuple[int, int], Rendered]
    """By row and order; they are the same in every fit."""

    def fit(self, rows: NDArray[np.int64], targets: NDArray[np.float64], strength: NDArray[np.float64]) -> _Fitted:
        """See `PreparedPolicy`; `strength` is not used, for early stopping takes its place."""
        policy, table = self.policy, self.table
        model = self._model()
        heads = _DecisionHeads(self, model)
        groups = table.groups or table.keys
        description = [
            policy.kind, source_stamp(policy.model), policy.max_length, policy.training.describe(), str(policy.lora),
            policy.form, [[tool.name, tool.description] for tool in self.tools], len(policy.images),
        ]  # fmt: skip
        fit_heads(
            heads, rows, targets, [groups[row] for row in rows], policy.training,
            name=fit_name(description, table.keys, rows, targets), progress=policy.progress,
        )  # fmt: skip
        return _Fitted(prepared=self, heads=heads)

    def _model(self) -> DecisionModel:
        policy = self.policy
        # Adapters are trained beside weights as they are; weights that are trained themselves need the precision.
        dtype: Any = torch.float32 if policy.lora is None else "auto"
        model, processor = decision_files(check_source(policy.model), dtype=dtype)
        if policy.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(policy.training.seed)
                model = policy.lora.adapt(model)
        labels = choose_labels(getattr(processor, "tokenizer", processor))
        return DecisionModel(model.to(pick_device(policy.device)), processor, labels, policy.form, policy.max_length)


class _DecisionHeads:
    def __init__(self, prepared: _Prepared, decision: DecisionModel) -> None:
        self._prepared, self.decision = prepared, decision
        self.module: torch.nn.Module = decision.model
        tools = len(prepared.tools)
        choice = prepared.policy.form == "choice"
        self._orders = _orders(tools, prepared.policy.training.seed) if choice else [tuple(range(tools))]

    def logits(self, rows: Sequence[int], epoch: int | None) -> torch.Tensor:
        """[n, H]; in training each row sees the tools in another order every epoch."""
        chosen = [0 if epoch is None else (row + epoch) % len(self._orders) for row in rows]
        heads = self.decision.heads([self._rendered(row, at) for row, at in zip(rows, chosen, strict=True)])
        # Back to the order of the table.
        back = [[0, *(1 + self._orders[at].index(tool) for tool in range(len(self._orders[at])))] for at in chosen]
        logits: torch.Tensor = heads.gather(1, torch.tensor(back, device=heads.device))
        return logits

    def _rendered(self, row: int, order: int) -> Rendered:
        prepared = self._prepared
        if (row, order) not in prepared.prompts:
            table, images = prepared.table, prepared.policy.images
            asked = Asked(
                question=table.questions[row],
                context=table.background(row),
                images=tuple(images[row]) if images else (),
            )
            tools = [prepared.tools[index] for index in self._orders[order]]
            rendered = self.decision.render(asked, tools)
            if images:
                # Pixels of many rows would fill the memory.
                return rendered
            prepared.prompts[row, order] = rendered
        return prepared.prompts[row, order]


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    prepared: _Prepared
    heads: _DecisionHeads

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return logits_of(self.heads, rows.tolist(), self.prepared.policy.training.batch_size)

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {}

    def config(self) -> Mapping[str, Any]:
        tools = self.prepared.tools
        return {
            "context": bool(self.prepared.table.contexts),
            "history": bool(self.prepared.table.histories or self.prepared.table.observations),
            "steps": bool(self.prepared.table.observations),
            "draft": [],
            "images": self.heads.decision.reads_images,
            "model": self.prepared.policy.model,
            "tools": [{"name": tool.name, "description": tool.description} for tool in tools],
            "form": self.prepared.policy.form,
            "labels": self.heads.decision.labels,
            "max_length": self.prepared.policy.max_length,
            "questions": questions_about(tools, self.prepared.policy.form),
        }

    def save(self, folder: Path, temperatures: NDArray[np.float64]) -> None:
        """Weights, tokenizer or processor, and `decision.json`, as `pipeline("decision")` loads them."""
        from transformers.decision import DecisionConfig

        transformers = import_transformers("The policy 'decision_lm'")
        decision, source = self.heads.decision, check_source(self.prepared.policy.model)
        loader = transformers.AutoProcessor if decision.reads_images else transformers.AutoTokenizer
        if self.prepared.policy.lora is not None:
            merged = (
                decision.model.merge_and_unload() if hasattr(decision.model, "merge_and_unload") else decision.model
            )
            decision.model = self.heads.module = merged
        with quiet():
            decision.model.save_pretrained(folder)
        # Loaded anew: rendering adds tokens of its own to the one in use.
        processor = load_part(loader, source)
        with quiet():
            processor.save_pretrained(folder)
        temperature = float(temperatures[0])
        DecisionConfig(
            labels=decision.labels, temperature={"noul": temperature, "choice": temperature}
        ).save_pretrained(folder)


def _orders(tools: int, seed: int) -> list[tuple[int, ...]]:
    """Some orders of the tools, that of the table first."""
    if tools <= 3:
        return list(itertools.permutations(range(tools)))
    rng = np.random.default_rng(seed)
    drawn = [tuple(int(index) for index in rng.permutation(tools)) for _ in range(ORDERS - 1)]
    return list(dict.fromkeys([tuple(range(tools)), *drawn]))
