"""A batch of prompts through a transformers model: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from metis_agent.models.completions import Completion, Completions, GenerationRequest
from metis_agent.models.decoding import RunningBatch
from metis_agent.models.generating import generate
from metis_agent.models.vision import ImageReader

__all__ = ["Engine"]

_LOOK_EVERY = 8
"""Tokens between two looks at what has ended, on a device that works ahead: each look waits for it."""
_LEAVING = 4
"""Rows leave once one in so many has ended: taking the cache apart costs about as much as a token."""


class Engine:
    """Runs batches on a causal language model, or on one that also reads images.

    Args:
        model: Any transformers causal LM, or `AutoModelForImageTextToText`. Its weights may change between batches.
            A batch runs in evaluation mode, and the mode is put back afterwards.
        tokenizer: Its tokenizer; needed for stop texts and for the end and padding tokens.
        interrupted: Asked at every token; once true, the running batch ends.
        reader: Makes the model's further inputs of the requests' images.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        reader: ImageReader | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._reader = reader
        self._interrupted = interrupted
        self.eos_ids = _eos_ids(model, tokenizer)
        self._pad_id = _pad_id(tokenizer, self.eos_ids)
        self.context_length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        """How many positions the model has, prompt and completion together."""
        # Vision models count positions in ways of their own, and other caches than full attention's can't be
        # taken apart row by row.
        layers = getattr(model.config, "layer_types", None) or ()
        self._by_row = set(layers) == {"full_attention"}

    def run(
        self,
        requests: Sequence[GenerationRequest],
        joining: Callable[[int], Sequence[GenerationRequest]] = lambda running: (),
    ) -> Iterator[Mapping[int, Completion]]:
        """Complete the prompts together.

        Args:
            requests: At least one.
            joining: Asked from time to time, with the number of prompts that are being completed, for more of them.
                Models that decode by `generate` don't ask.

        Yields:
            Completions as they end, by the places of their requests among `requests` and all that have joined.

        Raises:
            InfrastructureError: The model gave logits that are not numbers.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            # Equal ids may stand for different pictures.
            by_row = self._by_row and not any(request.images for request in requests)
            last = (yield from self._decode(requests, joining)) if by_row else self._generate(requests)
        finally:
            self._model.train(was_training)
        yield last  # who waits for the last may be a trainer, which wants the mode back

    def _generate(self, requests: Sequence[GenerationRequest]) -> Mapping[int, Completion]:
        completions = self._completions(requests)
        generate(
            self._model, requests, completions, pad_id=self._pad_id, eos_ids=self.eos_ids,
            interrupted=self._interrupted, reader=self._reader,
        )  # fmt: skip
        return dict(enumerate(completions.of(range(len(requests)))))

    def _decode(
        self, requests: Sequence[GenerationRequest], joining: Callable[[int], Sequence[GenerationRequest]]
    ) -> Generator[Mapping[int, Completion], None, Mapping[int, Completion]]:
        """Yields completions as they end, and returns the last."""
        batch, completions = self._batch(requests), self._completions(requests)
        asked = len(requests)
        places: list[int | None] = list(range(asked))  # of each row's request; `None` once its completion is given
        while True:
            self._advance(batch, completions)
            ended = completions.ended_A.tolist()
            new = {row: place for row, place in enumerate(places) if ended[row] and place is not None}
            given = dict(zip(new.values(), completions.of(list(new)), strict=True)) if new else {}
            places = [None if end else place for place, end in zip(places, ended, strict=True)]
            going = len(ended) - sum(ended)
            joined = joining(going)
            if not going and not joined:
                return given
            if given:
                yield given
            if not going:
                batch, completions, places = self._batch(joined), self._completions(joined), []
            elif joined or _LEAVING * going <= (_LEAVING - 1) * len(ended):
                rows_A = (~completions.ended_A).nonzero()[:, 0]
                batch.keep(rows_A)
                completions.keep(rows_A)
                places = [place for place in places if place is not None]
                if joined:
                    batch.join(self._batch(joined))
                    completions.join(self._completions(joined))
            places += range(asked, asked + len(joined))
            asked += len(joined)

    def _advance(self, batch: RunningBatch, completions: Completions) -> None:
        """Go on until the next look at what has ended."""
        # A stop text must be met as soon as it is there; the rest can wait for a device that works ahead.
        works_ahead = self._model.device.type != "cpu" and not completions.has_stop_texts
        for _ in range(min(_LOOK_EVERY if works_ahead else 1, completions.steps_left)):
            completions.take(*batch.step())
            if self._interrupted():
                completions.cut()
                return

    def _batch(self, requests: Sequence[GenerationRequest]) -> RunningBatch:
        return RunningBatch(
            self._model,
            [request.prompt_ids for request in requests],
            [request.sampling for request in requests],
            pad_id=self._pad_id,
            steps=max(request.max_new_tokens for request in requests),
        )

    def _completions(self, requests: Sequence[GenerationRequest]) -> Completions:
        return Completions(requests, self.eos_ids, self._tokenizer, self._model.device)


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = set(configured) if isinstance(configured, list) else {configured}
    ids.add(tokenizer.eos_token_id)
    return frozenset(token for token in ids if token is not None)


def _pad_id(tokenizer: Any, eos_ids: frozenset[int]) -> int:
    # Padding is masked, so which token it is makes no difference.
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return min(eos_ids, default=0)
