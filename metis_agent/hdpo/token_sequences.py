"""From a trajectory to the tokens that a policy is trained on, never through text.

A trajectory's model calls are joined as long as each prompt repeats the previous prompt and completion token
for token; what stands between two completions is an observation and is masked out. Where a prompt does not
repeat them (a rewritten history, a template that is not append-only) a new segment starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metis_agent.errors import InputError
from metis_agent.types import ModelCall, Trajectory

__all__ = ["Segment", "segments"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One token sequence; `completion_ids`, `mask` and `log_probs` have the same length T."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Everything after the first prompt: the model's own tokens and the observations between them."""
    mask: tuple[int, ...]
    """1 where the model wrote the token, 0 where it observed it."""
    log_probs: tuple[float, ...]
    """As sampled; 0 at observations."""


def segments(trajectory: Trajectory) -> tuple[Segment, ...]:
    """The trajectory's token segments, in order; most have one.

    Raises:
        InputError: a model call holds no tokens (a closed model): such a record trains gates, not policies.
    """
    if not trajectory.calls:
        raise InputError(
            f"trajectory {trajectory.id!r} has no model calls; record it with a chat model that runs in the graph"
        )
    runs: list[list[ModelCall]] = []
    for call in trajectory.calls:
        if call.prompt_ids is None or call.completion_ids is None:
            raise InputError(
                f"trajectory {trajectory.id!r} has a model call without token ids; only a model that records "
                "them (LocalChatModel) can train a policy, though the record can still train a gate"
            )
        if runs and _extends(call, runs[-1][-1]):
            runs[-1].append(call)
        else:
            runs.append([call])
    return tuple(_join(run) for run in runs)


def _extends(call: ModelCall, previous: ModelCall) -> bool:
    assert call.prompt_ids is not None
    assert previous.prompt_ids is not None
    assert previous.completion_ids is not None
    before = previous.prompt_ids + previous.completion_ids
    return call.prompt_ids[: len(before)] == before


def _join(run: Sequence[ModelCall]) -> Segment:
    prompt = run[0].prompt_ids or ()
    tokens: list[int] = []
    mask: list[int] = []
    log_probs: list[float] = []
    for call in run:
        observation = (call.prompt_ids or ())[len(prompt) + len(tokens) :]
        written = call.completion_ids or ()
        tokens += [*observation, *written]
        mask += [0] * len(observation) + [1] * len(written)
        log_probs += [0.0] * len(observation) + list(call.log_probs or (0.0,) * len(written))
    return Segment(prompt_ids=prompt, completion_ids=tuple(tokens), mask=tuple(mask), log_probs=tuple(log_probs))
