"""A batch of prompts through a transformers model: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from metis_agent.errors import InfrastructureError
from metis_agent.models.decoding import decode, left_padded
from metis_agent.models.sampler import RowSampling, TokenChooser
from metis_agent.models.vision import ImageReader, SeenImage

__all__ = ["Completion", "Engine", "GenerationRequest"]

_LOOK_EVERY = 8


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt to complete."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: RowSampling
    stop: tuple[str, ...] = ()
    """Texts after which the completion ends."""
    images: tuple[SeenImage, ...] = ()
    """Those that the prompt has places for."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came out: ids with the end-of-turn token, where the model wrote one."""

    ids: list[int]
    log_probs: list[float]
    """Among all tokens."""
    allowed_log_probs: list[float]
    """Among the tokens that were not banned."""
    finish: Literal["stop", "length"]


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

    def run(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Complete the prompts together.

        Raises:
            InfrastructureError: The model gave logits that are not numbers.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            return self._run(requests)
        finally:
            self._model.train(was_training)

    def _run(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        chooser = TokenChooser([request.sampling for request in requests], self._model.device)
        stops = _RowStops(requests, self._tokenizer, self._interrupted, self._model.device)
        limits = [request.max_new_tokens for request in requests]
        # Equal ids may stand for different pictures.
        if self._by_row and not any(request.images for request in requests):
            tokens_BT, log_probs_BT2 = self._decode(requests, chooser, stops)
        else:
            tokens_BT, log_probs_BT2 = self._generate(requests, chooser, stops)
        if bool(log_probs_BT2.isnan().any()):
            raise InfrastructureError(
                "The model's logits are not numbers (NaN): its weights have diverged, or its dtype "
                f"({self._model.dtype}) overflows. Load an earlier checkpoint, or use float32."
            )
        lengths = self._lengths(tokens_BT, limits, stops.ended)
        return [
            Completion(ids=ids[:length], log_probs=own[:length], allowed_log_probs=allowed[:length], finish=finish)
            for ids, own, allowed, (length, finish) in zip(
                tokens_BT.tolist(), *(it.tolist() for it in log_probs_BT2.unbind(-1)), lengths, strict=True
            )
        ]

    def _decode(
        self, requests: Sequence[GenerationRequest], chooser: TokenChooser, stops: _RowStops
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) and log-probabilities (B, T, 2); rows that end leave the batch."""
        eos_E = torch.tensor(sorted(self.eos_ids), dtype=torch.long, device=self._model.device)
        return decode(
            self._model,
            [request.prompt_ids for request in requests],
            pad_id=self._pad_id,
            steps=max(request.max_new_tokens for request in requests),
            # A stop text must be met as soon as it is there; the rest can wait for a device that works ahead.
            look_every=1 if self._model.device.type == "cpu" or any(r.stop for r in requests) else _LOOK_EVERY,
            chooser=chooser,
            ended=lambda rows, tokens_AT: torch.isin(tokens_AT, eos_E).any(dim=1) | stops.done(rows, tokens_AT),
        )

    def _generate(
        self, requests: Sequence[GenerationRequest], chooser: TokenChooser, stops: _RowStops
    ) -> tuple[Tensor, Tensor]:
        """The same by transformers' own loop, which knows every kind of model."""
        ids_BP, mask_BP = left_padded([request.prompt_ids for request in requests], self._pad_id, self._model.device)
        images = [image for request in requests for image in request.images]
        pixels = {} if self._reader is None else self._reader.inputs(ids_BP, images, self._model.dtype)
        stops.width = ids_BP.shape[1]
        ids_BL = self._model.generate(
            ids_BP,
            attention_mask=mask_BP,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([stops]),
            generation_config=self._greedy(max(request.max_new_tokens for request in requests)),
            custom_generate=_sample_as_chosen,
            **pixels,
        )
        return ids_BL[:, stops.width :], chooser.log_probs()

    def _greedy(self, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=sorted(self.eos_ids) or None,
            pad_token_id=self._pad_id,
            return_dict_in_generate=False,
        )

    def _lengths(
        self, tokens_BT: Tensor, limits: Sequence[int], ended: dict[int, int]
    ) -> list[tuple[int, Literal["stop", "length"]]]:
        """How many tokens of each row are its own, and why it ended there."""
        eos_E = torch.tensor(sorted(self.eos_ids), dtype=torch.long, device=tokens_BT.device)
        is_eos_BT = torch.isin(tokens_BT, eos_E)
        firsts = is_eos_BT.int().argmax(dim=1).tolist()
        has_eos = is_eos_BT.any(dim=1).tolist()
        lengths: list[tuple[int, Literal["stop", "length"]]] = []
        for row, limit in enumerate(limits):
            end = min(limit, tokens_BT.shape[1])
            natural = min(firsts[row] + 1 if has_eos[row] else end + 1, ended.get(row, end + 1))
            lengths.append((natural, "stop") if natural <= end else (end, "length"))
        return lengths


class _RowStops(StoppingCriteria):
    """Ends each row at its own limit or stop text, and all of them on an interruption."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        tokenizer: Any,
        interrupted: Callable[[], bool],
        device: torch.device,
    ) -> None:
        self.width = 0
        """Of the prompts in what `generate` shows."""
        self._tokenizer = tokenizer
        self._interrupted = interrupted
        self._limits_B = torch.tensor([request.max_new_tokens for request in requests], device=device)
        self._rows_B = torch.arange(len(requests), device=device)
        self._stops = {row: request.stop for row, request in enumerate(requests) if request.stop}
        self.ended: dict[int, int] = {}
        """Rows that met a stop text, with their length then."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.done(self._rows_B, input_ids[:, self.width :])

    def done(self, rows_A: Tensor, tokens_AT: Tensor) -> Tensor:
        """Which of these rows, with these tokens, have ended: (A,)."""
        if self._interrupted():
            return torch.ones_like(rows_A, dtype=torch.bool)
        length = tokens_AT.shape[1]
        done_A = self._limits_B[rows_A] <= length
        if not self._stops:
            return done_A
        for place, row in enumerate(rows_A.tolist()):
            if row not in self.ended and self._meets(tokens_AT[place], self._stops.get(row, ())):
                self.ended[row] = length
            if row in self.ended:
                done_A[place] = True
        return done_A

    def _meets(self, tokens_T: Tensor, stops: tuple[str, ...]) -> bool:
        # A stop text spans at most as many tokens as it has characters, bytes of one character included.
        tail = max((len(stop.encode()) for stop in stops), default=0)
        if not tail:
            return False
        text = self._tokenizer.decode(tokens_T[-tail:].tolist())
        return any(stop in text for stop in stops)


def _sample_as_chosen(model: Any, input_ids: Tensor, logits_processor: Any, **kwargs: Any) -> Any:
    """The stock decoding loop with our processor alone.

    A checkpoint's own generation settings (a repetition penalty, say) would otherwise be applied to the
    scores first, and the recorded log-probabilities would not be the policy's.
    """
    own = LogitsProcessorList(entry for entry in logits_processor if isinstance(entry, TokenChooser))
    return model._sample(input_ids, logits_processor=own, **kwargs)


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
