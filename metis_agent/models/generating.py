"""A batch through transformers' own `generate`, which knows every kind of model and of input.

It runs whole: nobody joins it, and its completions are there when the longest is. Models with full attention in every
layer decode faster as `decoding` does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from metis_agent.models.completions import Completions, GenerationRequest
from metis_agent.models.decoding import left_padded
from metis_agent.models.sampler import TokenChooser
from metis_agent.models.vision import ImageReader

__all__ = ["generate"]


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
