"""The runs that a report carries: each as the page's browser shows it, packed so that it reads what is looked at.

A run is its question, its decisions, and its messages in order, as plain values; every text in it is `clipped`, and
nothing is HTML. An index holds a line for each run (question, answer, and what filters need); the runs themselves lie
behind it in compressed blocks. The browser unpacks the index when the page has been drawn, and a block when one of its
runs is opened. Where a store holds more runs than the page may carry, `choose` says which ones it carries.

Images are embedded once each, small, and only what a browser draws safely: PNG, JPEG, GIF and WebP by their first
bytes, whatever the record calls them: an SVG is a document, not a picture. A larger one is shrunk where Pillow is
installed. What stands at an address is not fetched, neither now nor by the page.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import InputError, StorageError
from metis_agent.messages import image_source
from metis_agent.recording.images import ImageStore
from metis_agent.report.document import clipped
from metis_agent.report.figures import BRANCHES, LABELS, RunTable, labels
from metis_agent.types import GateDecision, ToolOutcome, Trajectory

__all__ = ["FIELD", "Archive", "Pictures", "choose", "packed", "transcript_of"]

FIELD = 20_000
"""Characters that one field may have."""
STEPS = 200
"""Messages that one run may have."""
SMALL = 300


def transcript_of(run: Trajectory, pictures: Pictures, store: ImageStore) -> dict[str, Any]:
    """Everything that the page shows of a run; keys that would be empty are left out."""
    steps = _steps(run, pictures, store)
    whole = {
        "id": clipped(run.id, SMALL),
        "question": clipped(run.question.text, FIELD),
        "reference": None if run.question.answer is None else clipped(run.question.answer, FIELD),
        "verifier": run.question.verifier,
        "answer": clipped(run.answer, FIELD),
        "error": clipped(run.error, FIELD),
        "seconds": _number(run.seconds),
        "cost": _number(run.cost),
        "started": _number(run.started_at),
        "metadata": _pairs(run.metadata) + _pairs(run.question.metadata),
        "decisions": [_decision(decision) for decision in run.decisions[:STEPS]],
        "steps": steps[:STEPS],
        "more": len(steps) - STEPS if len(steps) > STEPS else 0,
    }
    return {key: value for key, value in whole.items() if value not in (None, "", [], 0)}


def _decision(decision: GateDecision) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "allowed": [clipped(name, SMALL) for name in decision.allowed[:50]],
        "gate": clipped(" ".join(filter(None, (decision.gate, decision.version))), SMALL),
        "reason": clipped(decision.reason, 2000),
    }
    if decision.probabilities:
        shown["probabilities"] = [
            [clipped(name, SMALL), _number(value)] for name, value in list(decision.probabilities.items())[:50]
        ]
    for name in ("threshold", "propensity"):
        if (value := getattr(decision, name)) is not None:
            shown[name] = _number(value)
    if decision.required:
        shown["required"] = True
    if decision.shadow:
        shown["shadow"] = _pairs(decision.shadow)
    return shown


def _steps(run: Trajectory, pictures: Pictures, store: ImageStore) -> list[dict[str, Any]]:
    by_id = {outcome.call_id: outcome for outcome in run.outcomes}
    steps = [_step(message, by_id, pictures, store) for message in run.messages]
    # A record without messages still says which tools ran.
    return steps or [
        {"role": "tool", "parts": [{"text": clipped(outcome.content, FIELD)}], **_ran(outcome),
         "arguments": _pairs(outcome.arguments)}
        for outcome in run.outcomes
    ]  # fmt: skip


def _step(
    message: Mapping[str, Any], outcomes: Mapping[str, ToolOutcome], pictures: Pictures, store: ImageStore
) -> dict[str, Any]:
    fields = message.get("data", message)
    if not isinstance(fields, Mapping):
        fields = {}
    step: dict[str, Any] = {"role": clipped(str(message.get("type", "")), SMALL)}
    if parts := _parts(fields.get("content"), pictures, store):
        step["parts"] = parts
    calls = [*_listed(fields.get("tool_calls")), *_listed(fields.get("invalid_tool_calls"))]
    if calls:
        step["calls"] = [_call(call) for call in calls[:STEPS] if isinstance(call, Mapping)]
    if (outcome := outcomes.get(str(fields.get("tool_call_id", "")))) is not None:
        step |= _ran(outcome)
    elif fields.get("name"):
        step["tool"] = clipped(str(fields["name"]), SMALL)
    return step


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call.get("args")
    shown = {"tool": clipped(str(call.get("name")), SMALL), "arguments": _pairs(arguments)}
    return shown | ({"error": clipped(str(call["error"]), FIELD)} if call.get("error") else {})


def _ran(outcome: ToolOutcome) -> dict[str, Any]:
    return {
        "tool": clipped(outcome.tool, SMALL), "status": outcome.status, "seconds": _number(outcome.seconds),
        "cost": _number(outcome.cost),
    }  # fmt: skip


def _parts(content: object, pictures: Pictures, store: ImageStore) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"text": clipped(content, FIELD)}] if content else []
    parts: list[dict[str, Any]] = []
    for block in _listed(content)[:STEPS]:
        if isinstance(block, Mapping) and block.get("type") in ("image", "image_url"):
            parts.append(pictures.part_of(block, store))
        elif isinstance(block, Mapping) and isinstance(block.get("text"), str):
            parts.append({"text": clipped(block["text"], FIELD)})
        else:
            parts.append({"text": clipped(block, FIELD) if isinstance(block, str) else _json(block)})
    return parts


def _pairs(value: object) -> list[list[str]]:
    """Names and values of a mapping, each value a text: what was a text stays as it was written."""
    if value in (None, "", {}):
        return []
    if not isinstance(value, Mapping):
        return [["", clipped(value, FIELD) if isinstance(value, str) else _json(value)]]
    return [
        [clipped(str(key), SMALL), clipped(inner, FIELD) if isinstance(inner, str) else _json(inner)]
        for key, inner in list(value.items())[:100]
    ]


def _json(value: object) -> str:
    return clipped(json.dumps(value, ensure_ascii=False, indent=1, default=str), FIELD)


def _number(value: float) -> float | None:
    """Six digits; `None` for what JSON has no word for."""
    number = float(value)
    if not math.isfinite(number):
        return None
    return number if abs(number) >= 1e6 else float(f"{number:.6g}")


def _listed(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
_SIDE = 1024
_PIXELS = 40_000_000


class Pictures:
    """The images of one report.

    Args:
        each: Bytes that one may have; a larger one is shrunk.
        total: Bytes of all together; what comes after is named, not shown.
    """

    def __init__(self, *, each: int = 300_000, total: int = 24_000_000) -> None:
        self._each, self._left = each, total
        self._names: dict[str, int] = {}
        self.embedded: list[str] = []
        """Data URIs, in the order of their numbers."""
        self.left_out = 0
        """Images that are only named."""

    def part_of(self, block: Mapping[str, Any], store: ImageStore) -> dict[str, Any]:
        """A content block as the page shows it: `{"image": number}`, or the reason why not.

        Args:
            block: LangChain's own, OpenAI's `image_url` or Anthropic's `source`.
            store: Where `sha256:` references are looked up.
        """
        try:
            content = _bytes_of(block, store)
        except (InputError, StorageError, binascii.Error, ValueError) as error:
            self.left_out += 1
            return {"note": f"image not shown: {clipped(str(error), 300)}"}
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._names:
            try:
                kind, shown = self._fit(content)
            except InputError as error:
                self.left_out += 1
                return {"note": f"image not shown: {error}"}
            self._left -= len(shown)
            self._names[digest] = len(self.embedded)
            self.embedded.append(f"data:{kind};base64,{base64.b64encode(shown).decode()}")
        return {"image": self._names[digest]}

    def _fit(self, content: bytes) -> tuple[str, bytes]:
        kind = _kind_of(content)
        _check_size(content)
        if len(content) > self._each:
            kind, content = "image/jpeg", _shrunk(content)
        if len(content) > min(self._each, self._left):
            raise InputError(f"{len(content):,} bytes, more than this report has room for.")
        return kind, content


def _bytes_of(block: Mapping[str, Any], store: ImageStore) -> bytes:
    url = str(image_source(block) or "")
    if url.startswith("sha256:"):
        return store.get_image(url)
    if url.startswith("data:") and ";base64," in url[:100]:
        return base64.b64decode(url.partition(",")[2], validate=True)
    raise InputError(f"{url[:200]!r} is not in the record, and a report fetches nothing.")


def _kind_of(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    for start, kind in _TYPES.items():
        if content.startswith(start):
            return kind
    raise InputError(f"its {len(content):,} bytes are no PNG, JPEG, GIF or WebP.")


def _check_size(content: bytes) -> None:
    """A few bytes may claim more pixels than a reader's browser has memory for."""
    try:
        from PIL import Image
    except ImportError:
        return  # then nothing but its first bytes is known
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
    except Exception as error:  # Pillow raises whatever the decoder does
        raise InputError(f"it can't be decoded: {error}.") from error
    if width * height > _PIXELS:
        raise InputError(f"{width} x {height} pixels are more than {_PIXELS:,}.")


def _shrunk(content: bytes) -> bytes:
    try:
        from PIL import Image
    except ImportError as missing:
        raise InputError(f"{len(content):,} bytes are shrunk by Pillow, which isn't installed.") from missing
    flat = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            image.thumbnail((_SIDE, _SIDE))
            image.convert("RGB").save(flat, "JPEG", quality=80)
    except Exception as error:  # Pillow raises whatever the decoder does
        raise InputError(f"it can't be decoded: {error}.") from error
    return flat.getvalue()


_BLOCK_RUNS, _BLOCK_CHARACTERS = 200, 1_000_000
_SHOWN = 240


def choose(tables: Sequence[RunTable], limit: int, seed: int = 0) -> list[NDArray[np.bool_]]:
    """Which runs of each store the page carries: all, or `limit` of them drawn at random, fairly by what they are.

    Runs are grouped by store, by how they began, and by the first of the `LABELS` that fits. Groups smaller than
    their share of the limit come whole, and the others share equally what is left.
    """
    groups: list[tuple[int, NDArray[np.int64]]] = []
    for number, table in enumerate(tables):
        marks, branch = labels(table), table.column("branch")
        # The narrow label first: a harmful call is also a redundant one.
        order = ("failed", "harmful", "redundant", "wrong_direct", "missed", "wrong")
        label = np.select([marks[name] for name in order], range(len(order)), default=len(order))
        for group in np.unique(branch * 10 + label):
            groups.append((number, np.flatnonzero(branch * 10 + label == group)))
    kept = [np.zeros(len(table), dtype=bool) for table in tables]
    rng = np.random.default_rng(seed)
    left = limit
    for done, (number, rows) in enumerate(sorted(groups, key=lambda group: len(group[1]))):
        share = min(len(rows), left // (len(groups) - done))
        kept[number][rng.permutation(rows)[:share]] = True
        left -= share
    return kept


class Archive:
    """The index and the blocks.

    Args:
        pictures: Where images of runs go.
    """

    def __init__(self, pictures: Pictures | None = None) -> None:
        self.pictures = pictures or Pictures()
        self.blocks: list[str] = []
        """Base64 of gzipped JSON, a list of transcripts each."""
        self._starts: list[int] = []
        self._waiting: list[str] = []
        self._questions: dict[str, int] = {}
        self._kinds: dict[str, int] = {}
        self._tools: dict[str, int] = {}
        self._columns: dict[str, list[Any]] = {
            name: [] for name in ("store", "branch", "question", "text", "answer", "reference", "kind", "tools",
                                  "calls", "verdict", "labels")
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self._columns["store"])

    def add(
        self, runs: Iterable[Trajectory], table: RunTable, chosen: NDArray[np.bool_], *, store: str, number: int
    ) -> None:
        """Take in the chosen runs of a store, in its order.

        Args:
            runs: As `table` has read them, with their messages.
            table: Their columns.
            chosen: [R].
            store: Where its images are.
            number: Kept with each run, to tell stores apart.
        """
        images = ImageStore(store)
        marks = labels(table)
        bits = sum((marks[name].astype(np.int64) << bit for bit, name in enumerate(LABELS)), np.zeros(len(table), int))
        columns = {name: table.column(name) for name in ("branch", "verdict", "calls")}
        # A store that grows while it is read has more runs than the table.
        for row, (run, wanted) in enumerate(zip(runs, chosen, strict=False)):
            if not wanted:
                continue
            entry = {"store": number, "labels": int(bits[row])}
            entry |= {name: int(column[row]) for name, column in columns.items()}
            self._index(entry | self._words(run))
            self._pack(json.dumps(transcript_of(run, self.pictures, images), separators=(",", ":")))

    def index(self) -> dict[str, Any]:
        """What the page's browser reads first; closes the last block."""
        self._close_block()
        return {
            "columns": self._columns, "starts": self._starts, "kinds": list(self._kinds), "tools": list(self._tools),
            "labels": LABELS, "branches": BRANCHES,
        }  # fmt: skip

    def _words(self, run: Trajectory) -> dict[str, Any]:
        used = {outcome.tool for outcome in run.outcomes if outcome.executed}
        return {
            "question": self._questions.setdefault(run.question.id, len(self._questions)),
            "text": clipped(run.question.text, _SHOWN),
            "answer": clipped(run.answer, _SHOWN),
            "reference": clipped(run.question.answer or "", _SHOWN),
            "kind": self._kinds.setdefault(clipped(run.question.kind, _SHOWN), len(self._kinds)),
            "tools": sorted(self._tools.setdefault(clipped(tool, _SHOWN), len(self._tools)) for tool in sorted(used)),
        }

    def _index(self, entry: dict[str, Any]) -> None:
        for name, column in self._columns.items():
            column.append(entry[name])

    def _pack(self, transcript: str) -> None:
        if not self._waiting:
            self._starts.append(len(self) - 1)
        self._waiting.append(transcript)
        if len(self._waiting) >= _BLOCK_RUNS or sum(map(len, self._waiting)) > _BLOCK_CHARACTERS:
            self._close_block()

    def _close_block(self) -> None:
        if self._waiting:
            self.blocks.append(packed(f"[{','.join(self._waiting)}]"))
            self._waiting = []


def packed(text: str) -> str:
    """Base64 of the gzipped text, the same for the same text."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 6, mtime=0)).decode()
