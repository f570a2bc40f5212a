"""The rows of tokens that one step of policy training sees: one for each segment of each rollout.

Between `segments` and the trainer. TRL wants one row a rollout, whole groups of them, and as many in every process.
So the first segments of the rollouts come first, in their order; what a rollout has beyond that follows, then blank
rows (every token masked out) up to a number that fits.

A rollout that splits counts once. With a normaliser over tokens ("dapo", "bnpo") it does so by itself: each token that
the model wrote stands in one row only. With one over sequences ("grpo"), row s of a rollout gets the share of its
tokens, n_s / N, and the mean over R rows is made the mean over B rollouts again:

    w_s = (n_s / N) (R / B)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metis_agent.hdpo.loss import Normaliser
from metis_agent.hdpo.segments import Segment, segments
from metis_agent.types import Trajectory

__all__ = ["Row", "Rows", "rows_of"]

_BLANK = Segment(prompt_ids=(0,), completion_ids=(0,), mask=(0,), log_probs=(0.0,))
"""Stands where there is nothing to learn from; which token it holds makes no difference."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a batch."""

    segment: Segment
    rollout: int
    """Whose it is, counted from 0 in this process; -1 for a blank one."""
    weight: float
    """What its advantage is multiplied by; 0 where nothing is learnt."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a process trains on in one step."""

    first: tuple[Segment | None, ...]
    """Each rollout's first segment; `None` where it can't be trained on."""
    further: tuple[tuple[int, Segment], ...]
    """The other segments, each with its rollout."""
    unusable: Mapping[int, str]
    """Rollouts that can't be trained on, with the reason."""
    images: Mapping[int, Sequence[Sequence[Any]]] = field(default_factory=dict)
    """The pictures of each segment, by rollout, for a model that sees."""

    @property
    def count(self) -> int:
        """How many rows it takes."""
        return len(self.first) + len(self.further)

    @property
    def usable(self) -> int:
        """How many rollouts can be trained on."""
        return len(self.first) - len(self.unusable)

    def laid_out(self, total: int, normaliser: Normaliser) -> list[Row]:
        """`total` rows, the weights as at the head of this module."""
        own = Counter({rollout: sum(segment.mask) for rollout, segment in enumerate(self.first) if segment})
        for rollout, segment in self.further:
            own[rollout] += sum(segment.mask)

        def weight(rollout: int, segment: Segment) -> float:
            if normaliser != "grpo":
                return 1.0
            return sum(segment.mask) / max(own[rollout], 1) * total / len(self.first)

        rows = [
            Row(segment=segment, rollout=rollout, weight=weight(rollout, segment)) if segment else _blank(rollout)
            for rollout, segment in enumerate(self.first)
        ]
        rows += [
            Row(segment=segment, rollout=rollout, weight=weight(rollout, segment)) for rollout, segment in self.further
        ]
        return rows + [_blank(-1)] * (total - len(rows))

    def laid_out_images(self, total: int) -> list[Sequence[Any]]:
        """The pictures of each of those rows."""
        nothing: Sequence[Any] = ()
        images = [self.images[rollout][0] if segment else nothing for rollout, segment in enumerate(self.first)]
        taken = Counter(range(len(self.first)))
        for rollout, _ in self.further:
            images.append(self.images[rollout][taken[rollout]])
            taken[rollout] += 1
        return images + [nothing] * (total - len(images))

    def padded_count(self, multiple: int) -> int:
        """The rows rounded up to whole groups and whole micro-batches."""
        return math.ceil(self.count / multiple) * multiple


def rows_of(
    trajectories: Sequence[Trajectory],
    *,
    max_length: int | None = None,
    images: Callable[[Trajectory, Sequence[Segment]], Sequence[Sequence[Any]]] | None = None,
) -> Rows:
    """The segments of rollouts, and which rollouts can't be trained on.

    Args:
        trajectories: In the order of the batch.
        max_length: Tokens, prompt included, that one row may have; a rollout with a longer one is left out.
        images: Finds the pictures of a rollout's segments, one list each; none where they don't fit.

    Raises:
        InputError: a model call holds no tokens.
    """
    first: list[Segment | None] = []
    further: list[tuple[int, Segment]] = []
    unusable: dict[int, str] = {}
    pictures: dict[int, Sequence[Sequence[Any]]] = {}
    for rollout, trajectory in enumerate(trajectories):
        found = () if trajectory.status == "failed" else segments(trajectory)
        if reason := _unusable(found, max_length):
            unusable[rollout] = reason
            found = ()
        elif images is not None:
            pictures[rollout] = images(trajectory, found)
            if len(pictures[rollout]) != len(found):
                unusable[rollout] = "images do not fit"
                found = ()
        first.append(found[0] if found else None)
        further += [(rollout, segment) for segment in found[1:]]
    return Rows(first=tuple(first), further=tuple(further), unusable=unusable, images=pictures)


def _unusable(found: Sequence[Segment], max_length: int | None) -> str:
    if not found:
        return "failed run"
    if max_length and any(len(each.prompt_ids) + len(each.completion_ids) > max_length for each in found):
        return "too long"
    if not all(math.isfinite(log_prob) for each in found for log_prob in each.log_probs):
        return "log-probability not finite"
    return ""


def _blank(rollout: int) -> Row:
    return Row(segment=_BLANK, rollout=rollout, weight=0.0)
