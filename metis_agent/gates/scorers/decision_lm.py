"""The `decision_lm` policy at run time: a chat model, of text or of text and images, as a gate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from metis_agent.errors import CheckpointError
from metis_agent.gates.artefact import Artefact
from metis_agent.gates.scorers.base import Asked
from metis_agent.gates.scorers.batching import Batcher
from metis_agent.gates.scorers.decision_model import DecisionModel, decision_files
from metis_agent.gates.scorers.pretrained import pick_device
from metis_agent.types import ToolSpec

__all__ = ["DecisionLMScorer"]

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
        """See `metis_agent.gates.scorers.base.Scorer`."""
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
