"""The `encoder` policy: any sequence classifier of transformers, one logit a head.

Where it stands: `gate_trainer` fits it as it fits `features`, by the log loss of each branch's outcomes, and makes
the same contrast of it. Worth its time where the wording of a question says more than its n-grams do and there are
some thousands of rows; below that, try `features` first. It reads no `draft_*` numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metis_agent.gates.scorers.pretrained import (
    EncoderModel,
    check_source,
    import_transformers,
    load_part,
    pick_device,
    quiet,
)
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

__all__ = ["EncoderPolicy"]


@dataclass(frozen=True, kw_only=True)
class EncoderPolicy:
    """A classifier to fine-tune.

    Raises:
        ConfigurationError: `model` looks like a folder, and there is no model in it.
        MissingDependencyError: transformers is not installed.
    """

    model: str
    """Folder, or name on the Hub, of what `AutoModelForSequenceClassification` loads."""
    training: GradientTraining = GradientTraining()
    max_length: int = 512
    """Tokens of question and context together, at most; the model's own limit counts too."""
    device: str | None = None
    progress: FitProgress = field(default=lambda stage, done, total: None, compare=False)
    kind: str = "encoder"
    traits: Traits = Traits(searches_strength=False, reads_drafts=False)

    def __post_init__(self) -> None:
        import_transformers("The policy 'encoder'")
        check_source(self.model)

    def prepare(self, table: OutcomeTable) -> _Prepared:
        """Nothing is read before it is asked for: tokens are cheap beside the model."""
        return _Prepared(policy=self, table=table)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    policy: EncoderPolicy
    table: OutcomeTable

    def fit(self, rows: NDArray[np.int64], targets: NDArray[np.float64], strength: NDArray[np.float64]) -> _Fitted:
        """See `PreparedPolicy`; `strength` is not used, for early stopping takes its place."""
        policy, table = self.policy, self.table
        heads = _EncoderHeads(self, self._encoder(targets.shape[1]))
        groups = table.groups or table.keys
        description = [policy.kind, source_stamp(policy.model), policy.max_length, policy.training.describe()]
        fit_heads(
            heads, rows, targets, [groups[row] for row in rows], policy.training,
            name=fit_name(description, table.keys, rows, targets), progress=policy.progress,
        )  # fmt: skip
        return _Fitted(prepared=self, heads=heads)

    def _encoder(self, heads: int) -> EncoderModel:
        policy, table = self.policy, self.table
        transformers = import_transformers("The policy 'encoder'")
        tokenizer = load_part(transformers.AutoTokenizer, check_source(policy.model))
        with torch.random.fork_rng(devices=[]):
            # A new classification head is random.
            torch.manual_seed(policy.training.seed)
            model = load_part(
                transformers.AutoModelForSequenceClassification, check_source(policy.model),
                dtype=torch.float32, num_labels=heads, id2label=dict(enumerate(table.actions)),
                label2id={action: index for index, action in enumerate(table.actions)},
                problem_type="multi_label_classification", ignore_mismatched_sizes=True, use_safetensors=True,
            )  # fmt: skip
        return EncoderModel(model.to(pick_device(policy.device)), tokenizer, policy.max_length)


class _EncoderHeads:
    def __init__(self, prepared: _Prepared, encoder: EncoderModel) -> None:
        self._table, self.encoder = prepared.table, encoder
        self.module: torch.nn.Module = encoder.model

    def logits(self, rows: Sequence[int], epoch: int | None) -> torch.Tensor:
        table = self._table
        read = table.contexts or table.histories or table.observations
        contexts = [table.background(row) for row in rows] if read else None
        logits: torch.Tensor = self.encoder.logits([self._table.questions[row] for row in rows], contexts)
        return logits


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    prepared: _Prepared
    heads: _EncoderHeads

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return logits_of(self.heads, rows.tolist(), self.prepared.policy.training.batch_size)

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {}

    def config(self) -> Mapping[str, Any]:
        return {
            "context": bool(self.prepared.table.contexts),
            "history": bool(self.prepared.table.histories or self.prepared.table.observations),
            "steps": bool(self.prepared.table.observations),
            "draft": [],
            "model": self.prepared.policy.model,
            "max_length": self.heads.encoder.max_length,
        }

    def save(self, folder: Path, temperatures: NDArray[np.float64]) -> None:
        """Weights and tokenizer, as `save_pretrained` writes them; the temperatures stay in `gate.json`."""
        transformers = import_transformers("The policy 'encoder'")
        tokenizer = load_part(transformers.AutoTokenizer, check_source(self.prepared.policy.model))
        with quiet():
            self.heads.encoder.model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
