"""From a trajectory to the rows of tokens that a policy is trained on, never through text.

A trajectory's model calls are joined as long as each prompt repeats the previous prompt and completion token
for token; what stands between two completions is an observation and is masked out. Where a prompt does not
repeat them (a rewritten history, a template that is not append-only) a new segment starts.

A segment is a row. TRL wants one row a rollout, whole groups of them, and as many in every process. So the first
segments of the rollouts come first, in their order; what a rollout has beyond that follows, then blank rows (every
token masked out) up to a number that fits.

A rollout that splits counts once. With a normaliser over tokens ("dapo", "bnpo") it does so by itself: each token that
the model wrote stands in one row only. With one over sequences ("grpo"), row s of a rollout gets the share of its
tokens, n_s / N, and the mean over R rows is made the mean over B rollouts again:

    w_s = (n_s / N) (R / B)

Rows differ in length, and late in training most teach nothing: all of a branch were right. So the model reads them in
pieces of about one length, and keeps what a gradient needs of those alone that have one (`in_pieces`).

A rollout's pictures are in its messages, in their order; a row holds the first so many of them, as many as its
placeholder tokens account for: every prompt begins with the whole history. Pixels are made by what made them for the
rollout (`metis_agent.models.vision.ImageReader`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from langchain_core.messages import BaseMessage, messages_from_dict
from numpy.typing import NDArray
from torch import Tensor

from metis_agent.errors import InputError
from metis_agent.hdpo.advantages import Channels
from metis_agent.hdpo.contrast import Opening, by_token
from metis_agent.hdpo.loss import Normaliser
from metis_agent.hdpo.rewards import Scores
from metis_agent.types import ModelCall, Trajectory

__all__ = [
    "PIXELS",
    "Row",
    "RowImages",
    "Rows",
    "SeesImages",
    "Segment",
    "StepBatch",
    "images_of",
    "in_pieces",
    "rows_learnt",
    "rows_of",
    "segments",
]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One token sequence; `completion_ids`, `mask` and `log_probs` have the same length T."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Everything after the first prompt: the model's own tokens and the observations between them."""
    mask: tuple[int, ...]
    """1 where the model wrote the token, 0 where it observed it."""
    log_probs: tuple[float, ...]
    """As sampled; 0 at observations, NaN where no choice of the policy's own was sampled (see `_as_sampled`)."""
    starts: tuple[tuple[int, int], ...] = ()
    """Of each reply in it: which model call of the trajectory it is, from 0, and where its first token stands."""


def segments(trajectory: Trajectory) -> tuple[Segment, ...]:
    """The trajectory's token segments, in order; most have one.

    Raises:
        InputError: a model call holds no tokens (a closed model): such a record trains gates, not policies.
    """
    if not trajectory.calls:
        raise InputError(
            f"trajectory {trajectory.id!r} has no model calls; record it with a chat model that runs in the graph"
        )
    runs: list[list[tuple[int, ModelCall]]] = []
    for step, call in enumerate(trajectory.calls):
        if call.prompt_ids is None or call.completion_ids is None:
            raise InputError(
                f"trajectory {trajectory.id!r} has a model call without token ids; only a model that records "
                "them (LocalChatModel) can train a policy, though the record can still train a gate"
            )
        if runs and _extends(call, runs[-1][-1][1]):
            runs[-1].append((step, call))
        else:
            runs.append([(step, call)])
    return tuple(_join(run) for run in runs)


def _extends(call: ModelCall, previous: ModelCall) -> bool:
    assert call.prompt_ids is not None
    assert previous.prompt_ids is not None
    assert previous.completion_ids is not None
    before = previous.prompt_ids + previous.completion_ids
    return call.prompt_ids[: len(before)] == before


def _join(run: Sequence[tuple[int, ModelCall]]) -> Segment:
    prompt = run[0][1].prompt_ids or ()
    tokens: list[int] = []
    mask: list[int] = []
    log_probs: list[float] = []
    starts: list[tuple[int, int]] = []
    for step, call in run:
        observation = (call.prompt_ids or ())[len(prompt) + len(tokens) :]
        written = call.completion_ids or ()
        starts.append((step, len(tokens) + len(observation)))
        tokens += [*observation, *written]
        mask += [0] * len(observation) + [1] * len(written)
        log_probs += [0.0] * len(observation) + _as_sampled(call, len(written))
    return Segment(
        prompt_ids=prompt, completion_ids=tuple(tokens), mask=tuple(mask), log_probs=tuple(log_probs),
        starts=tuple(starts),
    )  # fmt: skip


def _as_sampled(call: ModelCall, length: int) -> list[float]:
    """Log-probabilities that a trainer may correct its gradient by, for an engine that samples otherwise than it reads.

    A forced token was not sampled, so there is nothing to correct; and where a call was banned but the engine tells no
    log-probability from before the ban, the ratio to what it tells would be the ban's and not the engine's.
    """
    if call.log_probs is None:
        return [0.0] * length
    if call.sampling.get("tool_choice") == "none" and call.allowed_log_probs is None:
        return [math.nan] * length
    return [math.nan] * call.forced + list(call.log_probs[call.forced :])


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
        if reason := _unusable(trajectory, found, max_length):
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


def _unusable(trajectory: Trajectory, found: Sequence[Segment], max_length: int | None) -> str:
    if not found:
        return "failed run"
    if max_length and any(len(each.prompt_ids) + len(each.completion_ids) > max_length for each in found):
        return "too long"
    if not all(math.isfinite(log_prob) for call in trajectory.calls for log_prob in call.log_probs or ()):
        return "log-probability not finite"
    return ""


def _blank(rollout: int) -> Row:
    return Row(segment=_BLANK, rollout=rollout, weight=0.0)


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The rollouts of one step in one process, as TRL takes them: P questions with G rollouts each, in R rows."""

    layout: Sequence[Row]
    """The R rows: the first segments of the rollouts, in their order, what they have beyond that, and blank ones."""
    scores: Scores
    channels: Channels
    weights: NDArray[np.float64]
    """[P, G], see `exploration`."""
    openings: Mapping[tuple[int, int], Opening] = field(default_factory=dict)
    """Where rollouts decided to call, by (rollout, model call)."""

    def rollouts(self) -> dict[str, list[Any]]:
        """What TRL's `rollout_func` returns."""
        r_acc = self.scores.r_acc.flatten()
        return {
            "prompt_ids": [list(row.segment.prompt_ids) for row in self.layout],
            "completion_ids": [list(row.segment.completion_ids) for row in self.layout],
            "logprobs": [list(row.segment.log_probs) for row in self.layout],
            "env_mask": [list(row.segment.mask) if row.weight else [0] * len(row.segment.mask) for row in self.layout],
            # A rollout's reward is logged once, with its first segment.
            "r_acc": [
                float(r_acc[place]) if place < len(r_acc) and not np.isnan(r_acc[place]) else None
                for place in range(len(self.layout))
            ],
        }

    def decisions(self, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which tokens of the rows are openings of a call, and what those decisions are worth: [R, T] and [R, S]."""
        which, contrast = by_token(self.openings, [(row.rollout, row.segment.starts) for row in self.layout], width)
        return which.to(device), contrast.to(device)

    def by_row(self, advantages_P_G: Tensor) -> Tensor:
        """Advantages of the rows as TRL takes them: [R]."""
        weighted = advantages_P_G.flatten() * torch.as_tensor(self.weights, dtype=advantages_P_G.dtype).flatten()
        rollouts = torch.tensor([max(row.rollout, 0) for row in self.layout])
        return weighted[rollouts] * torch.tensor([row.weight for row in self.layout])


Read = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(ids [R, P + T], attention mask, T) -> log-probabilities and entropies of the last T tokens, [R, T] each."""

_ALIKE = 0.8
"""The shortest row of a piece has so much of the length of its longest: at most a fifth of it is padding."""


def in_pieces(read: Read, ids: Tensor, attention: Tensor, width: int, learnt: Tensor) -> tuple[Tensor, Tensor]:
    """What `read` says of all rows, for less.

    Most of the padding is not read, rows of the same tokens are read once (the surer a policy is, the more rollouts of
    a group agree), and only what is learnt has a graph.

    Args:
        read: The forward pass.
        ids: [R, P + T], prompts padded on the left, completions on the right.
        attention: [R, P + T], 0 at padding.
        width: T.
        learnt: [R] bool, the rows whose loss has a gradient.

    Returns:
        [R, T] each, 0 at the padding that was not read.
    """
    prompt = ids.shape[1] - width
    places = torch.arange(ids.shape[1], device=ids.device)
    first = torch.where(attention > 0, places, prompt - 1).amin(1).tolist()
    end = torch.where(attention > 0, places, prompt).amax(1).add(1).tolist()
    equals: dict[tuple[int, bytes], list[int]] = {}
    for row, tokens in enumerate(ids.cpu().numpy()):
        equals.setdefault((first[row], tokens[first[row] : end[row]].tobytes()), []).append(row)
    teaches = {rows[0]: any(learnt[row] for row in rows) for rows in equals.values()}
    pieces: list[list[int]] = []
    for row in sorted(teaches, key=lambda row: (teaches[row], end[row] - first[row]), reverse=True):
        longest = pieces[-1][0] if pieces else row
        alike = end[row] - first[row] >= _ALIKE * (end[longest] - first[longest])
        if pieces and alike and teaches[row] == teaches[longest]:
            pieces[-1].append(row)
        else:
            pieces.append([row])
    log_probs: list[Tensor] = []
    entropies: list[Tensor] = []
    for rows in pieces:
        read_from, read_to = min(first[row] for row in rows), max(end[row] for row in rows)
        with torch.set_grad_enabled(torch.is_grad_enabled() and teaches[rows[0]]):
            found = read(ids[rows, read_from:read_to], attention[rows, read_from:read_to], read_to - prompt)
        for whole, part in zip((log_probs, entropies), found, strict=True):
            whole.append(torch.nn.functional.pad(part, (0, ids.shape[1] - read_to)))
    place = {row: position for position, row in enumerate(row for rows in pieces for row in rows)}
    of_row = {row: place[rows[0]] for rows in equals.values() for row in rows}
    back = torch.tensor([of_row[row] for row in range(len(ids))], device=ids.device)
    return torch.cat(log_probs)[back], torch.cat(entropies)[back]


def rows_learnt(inputs: Mapping[str, Any]) -> Tensor:
    """[R] bool, the rows of a batch whose loss has a gradient; the first one where none has: backward needs a graph."""
    signals = [inputs[name] for name in ("advantages", "tool_advantages", "contrasts") if name in inputs]
    learnt = torch.stack([signal.reshape(len(signal), -1).ne(0).any(1) for signal in signals]).any(0)
    learnt[0] |= ~learnt.any()
    return learnt


PIXELS = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")
"""What TRL's forward pass takes of pictures, for models whose pictures have a grid, such as Qwen's."""


class SeesImages(Protocol):
    """What reads the pictures; `ImageReader` is one."""

    placeholder: str
    """The token that stands for a part of a picture."""

    def of(self, message: BaseMessage) -> Sequence[Any]:
        """The pictures of a message, each with the `text` that stands for it in a prompt."""

    def inputs(self, ids_BP: Tensor, images: Sequence[Any], dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's arguments for these ids and pictures."""


def images_of(trajectory: Trajectory, segments: Sequence[Segment], reader: SeesImages, token: int) -> list[list[Any]]:
    """The pictures of each segment.

    Args:
        trajectory: With its messages.
        segments: Its own.
        reader: Reads the pictures.
        token: The id of the placeholder.

    Returns:
        One list a segment; none at all where a segment's placeholders are not those of its pictures.
    """
    seen = [
        image
        for message in messages_from_dict([dict(each) for each in trajectory.messages])
        for image in reader.of(message)
    ]
    sizes = [image.text.count(reader.placeholder) for image in seen]
    found: list[list[Any]] = []
    for segment in segments:
        wanted = (*segment.prompt_ids, *segment.completion_ids).count(token)
        count = next((n for n in range(len(sizes) + 1) if sum(sizes[:n]) == wanted), None)
        if count is None:
            return []
        found.append(seen[:count])
    return found


class RowImages:
    """The pictures of the rows of one step.

    Args:
        layout: The rows, in order.
        images: The pictures of each row.
        reader: Makes the model's arguments of them.
        dtype: Of the model.
    """

    def __init__(
        self, layout: Sequence[Row], images: Sequence[Sequence[Any]], reader: SeesImages, dtype: torch.dtype
    ) -> None:
        assert len(layout) == len(images)
        self._images, self._reader, self._dtype = images, reader, dtype

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """The model's arguments for [R, P + T] ids, and how many pictures each row has; empty without a picture."""
        flat = [image for row in self._images for image in row]
        if not flat:
            return {}
        return {**self._reader.inputs(ids, flat, self._dtype), "num_images": [len(row) for row in self._images]}
