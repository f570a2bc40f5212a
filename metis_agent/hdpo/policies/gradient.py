"""Fit a torch model's heads by mini-batches, with early stopping, taken up again after a crash.

Shared by the `encoder` and `decision_lm` policies. Some groups of questions are held out of each fit; the epoch with
the lowest loss on them is kept, the untrained state included. Every epoch's order and dropout follow from the seed
and its number alone, so a run that was killed and resumed gives the weights of one that was not. The state of a fit is
one safetensors file, its numbers in the header; written beside its place and moved there whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import binary_cross_entropy_with_logits

from metis_agent.errors import StorageError
from metis_agent.formats import atomic_path
from metis_agent.hdpo.settings import GradientTraining

__all__ = [
    "FitProgress",
    "FitState",
    "Heads",
    "fit_heads",
    "fit_name",
    "load_state",
    "logits_of",
    "save_state",
    "seeded",
    "source_stamp",
]

FitProgress = Callable[[str, int, int], None]
"""Called with what goes on, how many rows of it are done, and of how many."""


class Heads(Protocol):
    """A model that reads rows of a table."""

    @property
    def module(self) -> torch.nn.Module:
        """What is trained: those of its parameters that require a gradient."""

    def logits(self, rows: Sequence[int], epoch: int | None) -> torch.Tensor:
        """[n, H]; `epoch` is None outside of training."""


def seeded(seed: int, epoch: int) -> torch.Generator:
    """A generator of its own for each epoch."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)


def fit_heads(
    heads: Heads,
    rows: NDArray[np.int64],
    targets: NDArray[np.float64],
    groups: Sequence[str],
    training: GradientTraining,
    *,
    name: str,
    progress: FitProgress,
) -> None:
    """Train in place by the log loss; the module is left in evaluation mode with its best weights.

    Args:
        heads: To train.
        rows: [n], of the table.
        targets: [n, H], in [0, 1].
        groups: [n]; the rows of one are held out together or not at all.
        training: How.
        name: Of the state in `training.resume`: the same for the same fit, and for no other.
        progress: See `FitProgress`.
    """
    run = _Run(heads, rows, targets, training, _held_out(groups, training), progress)
    path = training.resume / f"{name}.safetensors" if training.resume is not None else None
    state = load_state(path) if path is not None else None
    if state is None:
        run.begin()
    else:
        run.take_up(state)
    while not run.finished:
        run.one_epoch()
        if path is not None:
            save_state(path, run.state())
    run.keep_best()


def logits_of(heads: Heads, rows: Sequence[int], batch_size: int) -> NDArray[np.float64]:
    """[n, H], in evaluation mode and without gradients."""
    heads.module.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            parts.append(heads.logits(batch, None).double().cpu().numpy())
    return np.concatenate(parts)


class _Run:
    def __init__(
        self,
        heads: Heads,
        rows: NDArray[np.int64],
        targets: NDArray[np.float64],
        training: GradientTraining,
        held_out: NDArray[np.bool_],
        progress: FitProgress,
    ) -> None:
        self._heads, self._training, self._progress = heads, training, progress
        self._fit, self._kept = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self._rows, self._targets = rows, torch.tensor(targets, dtype=torch.float32)
        module = heads.module
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self._steps = math.ceil(len(self._fit) / training.batch_size)
        self._epoch, self._best_loss, self._since_best = 0, math.inf, 0
        self._best: dict[str, torch.Tensor] = {}

    @property
    def finished(self) -> bool:
        return self._epoch >= self._training.epochs or self._since_best >= self._training.patience

    def begin(self) -> None:
        self._judge()

    def one_epoch(self) -> None:
        """Over all rows but the held-out ones, then judged by those."""
        generator = seeded(self._training.seed, self._epoch)
        order = self._fit[torch.randperm(len(self._fit), generator=generator).numpy()]
        self._heads.module.train()
        devices = [p.device for p in self._parameters.values() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            for step in range(self._steps):
                start = step * self._training.batch_size
                self._one_step(order[start : start + self._training.batch_size], self._epoch * self._steps + step)
                self._progress(self._stage(), min(start + self._training.batch_size, len(order)), len(order))
        self._epoch += 1
        self._judge()

    def _one_step(self, batch: NDArray[np.int64], step: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.learning_rate * self._schedule(step)
        logits = self._heads.logits(self._rows[batch].tolist(), self._epoch)
        loss = binary_cross_entropy_with_logits(logits, self._targets[batch].to(logits.device))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._training.clip)
        self._optimizer.step()

    def _schedule(self, step: int) -> float:
        total = self._training.epochs * self._steps
        warm = max(1, round(self._training.warmup * total))
        return min((step + 1) / warm, (total - step) / max(1, total - warm))

    def _judge(self) -> None:
        """Without held-out rows the latest state counts as the best."""
        loss = self._held_out_loss() if len(self._kept) else -float(self._epoch)
        if loss < self._best_loss:
            self._best_loss, self._since_best = loss, 0
            self._best = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        else:
            self._since_best += 1

    def _held_out_loss(self) -> float:
        logits = logits_of(self._heads, self._rows[self._kept].tolist(), self._training.batch_size)
        loss = binary_cross_entropy_with_logits(torch.tensor(logits), self._targets[self._kept].double())
        # A diverged state is never the best.
        return float(loss) if bool(torch.isfinite(loss)) else math.inf

    def _stage(self) -> str:
        best = f", held-out loss {self._best_loss:.3f}" if 0 <= self._best_loss < math.inf else ""
        return f"epoch {self._epoch + 1} of at most {self._training.epochs}{best}"

    def keep_best(self) -> None:
        with torch.no_grad():
            for name, value in self._best.items():
                self._parameters[name].copy_(value)
        self._heads.module.eval()

    def state(self) -> FitState:
        adam = self._optimizer.state
        moments = {
            f"{name}/{key}": value
            for name, p in self._parameters.items()
            for key, value in adam.get(p, {}).items()
            if isinstance(value, torch.Tensor)
        }
        return FitState(
            epoch=self._epoch,
            best_loss=self._best_loss,
            since_best=self._since_best,
            best=self._best,
            # What is finished needs no more than its best weights.
            latest={} if self.finished else {name: p.detach() for name, p in self._parameters.items()},
            moments={} if self.finished else moments,
        )

    def take_up(self, state: FitState) -> None:
        self._epoch, self._best_loss, self._since_best = state.epoch, state.best_loss, state.since_best
        self._best = dict(state.best)
        with torch.no_grad():
            for name, value in state.latest.items():
                self._parameters[name].copy_(value)
        for key, value in state.moments.items():
            name, _, moment = key.rpartition("/")
            p = self._parameters[name]
            self._optimizer.state[p][moment] = value.to(p.device if moment != "step" else "cpu")


def _held_out(groups: Sequence[str], training: GradientTraining) -> NDArray[np.bool_]:
    """[n]: whole groups; none where there are too few to spare one."""
    labels, place = np.unique(np.asarray(groups), return_inverse=True)
    count = math.ceil(training.held_out * len(labels)) if len(labels) > 1 else 0
    chosen = np.random.default_rng(training.seed).permutation(len(labels))[:count]
    return np.asarray(np.isin(place, chosen))


@dataclass(frozen=True, kw_only=True)
class FitState:
    """After `epoch` epochs."""

    epoch: int
    best_loss: float
    since_best: int
    best: Mapping[str, torch.Tensor]
    latest: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    """Of Adam, by parameter and name."""


def source_stamp(model: str) -> list[Any]:
    """What tells one state of a model folder from another; of a model on the Hub, its name."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return [model]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())]


def fit_name(
    description: Sequence[Any], keys: Sequence[str], rows: NDArray[np.int64], targets: NDArray[np.float64]
) -> str:
    """The same for the same fit of the same model to the same outcomes, and for no other."""
    digest = hashlib.sha256(json.dumps([description, [keys[row] for row in rows]], sort_keys=True).encode())
    digest.update(np.ascontiguousarray(targets).tobytes())
    return digest.hexdigest()[:20]


def save_state(path: Path, state: FitState) -> None:
    """Write it.

    Raises:
        StorageError: it can't be written.
    """
    parts = {"best": state.best, "latest": state.latest, "moments": state.moments}
    tensors = {
        f"{part}:{name}": value.detach().to("cpu", copy=True).contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }
    numbers = {"epoch": state.epoch, "best_loss": state.best_loss, "since_best": state.since_best}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as draft:
            save_file(tensors, draft, metadata={"state": json.dumps(numbers)})
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{str(path)!r} can't be written: {error}. Free some space, or give another.") from error


def load_state(path: Path) -> FitState | None:
    """Read it; None where there is none, or none that is whole."""
    parts: dict[str, dict[str, torch.Tensor]] = {"best": {}, "latest": {}, "moments": {}}
    try:
        with safe_open(path, framework="pt") as file:
            numbers = json.loads(file.metadata()["state"])
            for key in file.keys():  # noqa: SIM118 - no mapping
                part, _, name = key.partition(":")
                parts[part][name] = file.get_tensor(key)
        return FitState(**{**numbers, **parts})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
