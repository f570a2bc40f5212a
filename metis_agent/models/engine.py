"""A batch of prompts through a transformers model: token ids in, token ids and log-probabilities out.

Models with full attention in every layer decode row by row (`decoding`); the others through transformers' own
`generate`, which knows every kind of model and of input, and runs a batch whole: nothing joins it, and its completions
are there when the longest is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from metis_agent.models.completions import Completion, Completions, GenerationRequest
from metis_agent.models.decoding import RunningBatch, TokenChooser, left_padded
from metis_agent.models.vision import ImageReader

__all__ = ["Engine", "generate"]


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


def generate(
    model: Any,
    requests: Sequence[GenerationRequest],
    completions: Completions,
    *,
    pad_id: int,
    eos_ids: Collection[int],
    interrupted: Callable[[], bool],
    reader: ImageReader | None,
) -> None:
    """Run all requests until each has ended.

    Args:
        model: Any transformers causal LM, or `AutoModelForImageTextToText`.
        requests: What to complete.
        completions: Of these requests; take their tokens as they come.
        pad_id: What stands left of shorter prompts.
        eos_ids: Tokens that end a row.
        interrupted: Asked at every token; once true, all rows end.
        reader: Makes the model's further inputs of the requests' images.
    """
    chooser = TokenChooser([request.sampling for request in requests], model.device)
    ids_BP, mask_BP = left_padded([request.prompt_ids for request in requests], pad_id, model.device)
    images = [image for request in requests for image in request.images]
    pixels = {} if reader is None else reader.inputs(ids_BP, images, model.dtype)
    model.generate(
        ids_BP,
        attention_mask=mask_BP,
        logits_processor=LogitsProcessorList([chooser]),
        stopping_criteria=StoppingCriteriaList([_RowStops(completions, chooser, interrupted)]),
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            num_beams=1,
            max_new_tokens=completions.steps_left,
            use_cache=True,
            eos_token_id=sorted(eos_ids) or None,
            pad_token_id=pad_id,
            return_dict_in_generate=False,
        ),
        custom_generate=_sample_as_chosen,
        **pixels,
    )


class _RowStops(StoppingCriteria):
    """Gives each row its tokens, and tells `generate` which have ended."""

    def __init__(self, completions: Completions, chooser: TokenChooser, interrupted: Callable[[], bool]) -> None:
        self._completions, self._chooser, self._interrupted = completions, chooser, interrupted

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._completions.take(input_ids[:, -1], self._chooser.log_probs_B2)
        if self._interrupted():
            self._completions.cut()
        return self._completions.ended_A


def _sample_as_chosen(model: Any, input_ids: Tensor, logits_processor: Any, **kwargs: Any) -> Any:
    """The stock decoding loop with our processor alone.

    A checkpoint's own generation settings (a repetition penalty, say) would otherwise be applied to the
    scores first, and the recorded log-probabilities would not be the policy's.
    """
    own = LogitsProcessorList(entry for entry in logits_processor if isinstance(entry, TokenChooser))
    return model._sample(input_ids, logits_processor=own, **kwargs)
