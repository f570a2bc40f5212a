"""A batch of prompts through a transformers model: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from metis_agent.errors import InfrastructureError
from metis_agent.models.sampler import RowSampling, TokenChooser
from metis_agent.models.vision import ImageReader, SeenImage

__all__ = ["Completion", "Engine", "GenerationRequest"]


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
        # Vision models count positions in ways of their own, and other caches than full attention's can't be
        # copied row by row.
        layers = getattr(model.config, "layer_types", None) or ()
        self._can_share = set(layers) == {"full_attention"}

    @property
    def context_length(self) -> int | None:
        """How many positions the model has, prompt and completion together."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

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
        device = self._model.device
        ids_BP, mask_BP = self._left_padded([request.prompt_ids for request in requests], device)
        width = ids_BP.shape[1]
        limits = [request.max_new_tokens for request in requests]
        chooser = TokenChooser([request.sampling for request in requests], device)
        stops = _RowStops(requests, width, self._tokenizer, self._interrupted, device)
        ids_BL = self._model.generate(
            ids_BP,
            attention_mask=mask_BP,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([stops]),
            generation_config=self._greedy(max(limits)),
            custom_generate=_sample_as_chosen,
            **self._shared_prefill(requests),
            **self._pixels(ids_BP, requests),
        )
        log_probs_BT = chooser.log_probs()
        if bool(log_probs_BT.isnan().any()):
            raise InfrastructureError(
                "The model's logits are not numbers (NaN): its weights have diverged, or its dtype "
                f"({self._model.dtype}) overflows. Load an earlier checkpoint, or use float32."
            )
        tokens_BT = ids_BL[:, width:]
        lengths = self._lengths(tokens_BT, limits, stops.ended)
        return [
            Completion(ids=row[:length], log_probs=row_log_probs[:length], finish=finish)
            for row, row_log_probs, (length, finish) in zip(
                tokens_BT.tolist(), log_probs_BT.tolist(), lengths, strict=True
            )
        ]

    def _pixels(self, ids_BP: Tensor, requests: Sequence[GenerationRequest]) -> dict[str, Tensor]:
        if self._reader is None:
            return {}
        images = [image for request in requests for image in request.images]
        return self._reader.inputs(ids_BP, images, self._model.dtype)

    def _shared_prefill(self, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
        """Run each distinct prompt once, all but its last token, where a group of rollouts repeats prompts.

        Returns:
            `generate`'s argument with the filled cache, one row a request; empty where it would not pay.
        """
        if any(request.images for request in requests):
            return {}  # equal ids may stand for different pictures
        distinct = {ids: row for row, ids in enumerate(dict.fromkeys(r.prompt_ids for r in requests))}
        if not self._can_share or 2 * len(distinct) > len(requests) or max(map(len, distinct)) == 1:
            return {}
        ids_UP, mask_UP = self._left_padded(list(distinct), self._model.device)
        ids_UP, mask_UP = ids_UP[:, :-1], mask_UP[:, :-1]
        cache = DynamicCache(config=self._model.config)
        with torch.no_grad():
            self._model.get_decoder()(
                input_ids=ids_UP,
                attention_mask=mask_UP,
                position_ids=(mask_UP.cumsum(dim=-1) - 1).clamp_(min=0),
                past_key_values=cache,
                use_cache=True,
            )
        rows_B = torch.tensor([distinct[request.prompt_ids] for request in requests], device=ids_UP.device)
        cache.batch_select_indices(rows_B)
        return {"past_key_values": cache}

    def _left_padded(self, prompts: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, both (B, P)."""
        width = max(map(len, prompts))
        pads = [width - len(prompt_ids) for prompt_ids in prompts]
        rows = [(*[self._pad_id] * pad, *prompt_ids) for pad, prompt_ids in zip(pads, prompts, strict=True)]
        ids_BP = torch.tensor(rows, dtype=torch.long, device=device)
        first_B1 = torch.tensor(pads, device=device)[:, None]
        return ids_BP, (torch.arange(width, device=device) >= first_B1).long()

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
        width: int,
        tokenizer: Any,
        interrupted: Callable[[], bool],
        device: torch.device,
    ) -> None:
        self._width = width
        self._tokenizer = tokenizer
        self._interrupted = interrupted
        self._limits_B = torch.tensor([request.max_new_tokens for request in requests], device=device)
        self._stops = {row: request.stop for row, request in enumerate(requests) if request.stop}
        self.ended: dict[int, int] = {}
        """Rows that met a stop text, with their length then."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self._width
        if self._interrupted():
            return torch.ones_like(self._limits_B, dtype=torch.bool)
        done_B = self._limits_B <= length
        for row, stops in self._stops.items():
            if row not in self.ended and self._meets(input_ids[row, self._width :], stops):
                self.ended[row] = length
        if self.ended:
            done_B[list(self.ended)] = True
        return done_B

    def _meets(self, tokens_T: Tensor, stops: tuple[str, ...]) -> bool:
        # A stop text spans at most as many tokens as it has characters, bytes of one character included.
        tail = max(len(stop.encode()) for stop in stops)
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
