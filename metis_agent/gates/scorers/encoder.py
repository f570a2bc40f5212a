"""The `encoder` policy at run time: a sequence classifier with one logit a branch.

Question and context go in as a pair, the longer of the two cut where they don't fit. `EncoderModel` is what
training (`metis_agent.hdpo.policies.encoder`) and serving share.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metis_agent.errors import CheckpointError
from metis_agent.gates.artefact import Artefact
from metis_agent.gates.scorers.base import Asked
from metis_agent.gates.scorers.pretrained import Batcher, import_transformers, load_part, pick_device

__all__ = ["EncoderModel", "EncoderScorer"]

BATCH = 32


class EncoderModel:
    """A classifier and its tokenizer.

    Args:
        model: `AutoModelForSequenceClassification`, one label a head.
        tokenizer: Its tokenizer.
        max_length: Tokens of question and context together, at most.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.model = model
        self._tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        # Decoders with a classification head look for the last token that is no padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None), max_length)
        self.max_length = min(limit for limit in limits if limit)

    def logits(self, questions: Sequence[str], contexts: Sequence[str] | None) -> Any:
        """Tensor [n, H]."""
        texts = (list(questions),) if contexts is None else (list(questions), list(contexts))
        inputs = self._tokenizer(
            *texts, truncation="longest_first", max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return self.model(**inputs.to(self.model.device)).logits.float()


class EncoderScorer:
    """Serves an artefact of kind `encoder`; concurrent questions share a forward pass.

    Args:
        artefact: The gate's folder.
        device: Where it runs; by default the accelerator, where there is one.

    Raises:
        CheckpointError: the model can't be loaded, or has another number of heads.
        MissingDependencyError: torch or transformers is not installed.
    """

    instant = False
    open_tools = False
    draft_columns: tuple[str, ...] = ()

    def __init__(self, artefact: Artefact, device: str | None = None) -> None:
        transformers = import_transformers("A gate of kind 'encoder'")
        folder: Path = artefact.folder
        model = load_part(transformers.AutoModelForSequenceClassification, folder, local=True, use_safetensors=True)
        heads = len(artefact.tools) + 1
        if model.config.num_labels != heads:
            raise CheckpointError(
                f"{str(folder)!r} has a classifier of {model.config.num_labels!r} labels for {heads} heads (direct and "
                f"{len(artefact.tools)} tools); train the gate again."
            )
        tokenizer = load_part(transformers.AutoTokenizer, folder, local=True)
        policy = artefact.description["policy"]
        self._context = bool(policy["context"])
        self._encoder = EncoderModel(model.to(pick_device(device)).eval(), tokenizer, int(policy["max_length"]))
        self._batcher: Batcher[Asked, list[float]] = Batcher(self._answer, BATCH)

    def logits(self, asked: Asked) -> list[float]:
        """See `metis_agent.gates.scorers.base.Scorer`."""
        return self._batcher.ask(asked)

    def _answer(self, batch: Sequence[Asked]) -> list[list[float]]:
        import torch

        questions = [asked.question for asked in batch]
        contexts = [asked.context for asked in batch] if self._context else None
        with torch.inference_mode():
            rows: list[list[float]] = self._encoder.logits(questions, contexts).tolist()
        return rows
