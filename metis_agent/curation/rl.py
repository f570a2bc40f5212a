"""Curation for RL: recorded rollouts in, prompts worth rolling out again out.

Two passes: the rollouts of each question are counted (`prompts`), then the prompts go through the stages `corrupted`
(its images are there, and are images), `mix`, `disagreement` and `duplicates`, and `leaks`, shared with SFT. What is
kept is a JSONL file of questions, or with `hold_out` two: `train` and `test`, split by a hash of the question, so that
the same question always falls on the same side.

Source: arXiv:2604.08545, the RL data: prompts with a mix of successes and failures.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from metis_agent.curation.leaks import SimilarityIndex, fingerprint, images_of
from metis_agent.curation.pipeline import (
    KEEP,
    Chunking,
    CurationReport,
    Mark,
    Pipeline,
    Row,
    Stage,
    Verdict,
    drop,
    undecided,
)
from metis_agent.curation.prompts import Answer, Prompt, PromptCounts, judged_answers, question_line
from metis_agent.curation.sft import MARK, source_identity
from metis_agent.errors import ConfigurationError, InfrastructureError, InputError, StorageError
from metis_agent.formats import is_image
from metis_agent.judging.judge import AnswerJudge
from metis_agent.judging.verifiers import VERIFIERS, Verifier
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.recording.images import ImageStore
from metis_agent.recording.store import StoreReport, TrajectoryStore, spread
from metis_agent.types import Question

__all__ = ["CorruptedStage", "DisagreementStage", "DuplicatesStage", "MixStage", "curate_rl", "image_fault"]


def curate_rl(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    stages: Sequence[Stage[Prompt]],
    *,
    work: Path,
    verify: Callable[[Question, str], bool | None] = default_verify,
    hold_out: float = 0.0,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    chunking: Chunking = Chunking(),
    fresh: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    counting: Callable[[int], None] = lambda _: None,
    ray: str | None = None,
    verify_there: Callable[[], Callable[[Question, str], bool | None]] = lambda: default_verify,
    progress: Callable[[CurationReport], None] = lambda _: None,
) -> CurationReport:
    """Count the rollouts of each question, and stream the prompts through stages.

    Args:
        source: a trajectory store; it is only read, and must not change until the run is finished.
        out: a folder or any fsspec URL: `OUT/kept/*.jsonl`, or `OUT/train` and `OUT/test`, hold questions.
        stages: in order, the cheap ones first.
        work: a local folder for the counts.
        verify: judges the rollouts' answers.
        hold_out: share of the kept prompts that goes to `OUT/test`.
        seed: of that split.
        settings: what else the run depends on, as JSON.
        chunking: how much is done at a time.
        fresh: start again, over what an earlier run left.
        storage_options: keywords for the fsspec file systems.
        counting: called with the number of trajectories counted so far.
        ray: address of a Ray cluster on which answers are judged, shard by shard (see `recording.store.spread`); its
            machines must see the source.
        verify_there: makes on a worker what `verify` is here.
        progress: called with the counts of prompts so far.

    Returns:
        The report; its rows are prompts.

    Raises:
        ConfigurationError, InfrastructureError, StorageError: as `curate_sft`.
    """
    if not 0 <= hold_out < 1:
        raise ConfigurationError(f"hold_out={hold_out!r}: it is a share, 0 or more and less than 1.")
    store = TrajectoryStore(source, read_only=True, storage_options=storage_options)
    identity = source_identity(source, storage_options)
    # Before anything is counted: a folder of another run is refused at once.
    pipeline = Pipeline(
        out, stages, _Prompts(hold_out, seed), chunking=chunking, fresh=fresh, storage_options=storage_options,
        settings={"source": identity, "hold_out": hold_out, "seed": seed, **(settings or {})},
    )  # fmt: skip
    counts = work / f"prompts-{identity}.sqlite"
    if fresh:
        for left in work.glob(f"{counts.name}*"):
            left.unlink()
    prompts = PromptCounts(counts, verify=verify)
    met: list[StoreReport] = []
    if ray is None:
        prompts.count(store.read(whole=False), progress=counting)
        met.append(store.report)
    else:
        judged = spread(
            partial(_judged, source=os.fspath(source), storage_options=storage_options, verify=verify_there),
            store.shards(), ray=ray,
        )  # fmt: skip
        prompts.count_answers(_answers(judged, met), progress=counting)
    report = pipeline.run(prompts.prompts(), progress=progress)
    report.unreadable = sum(each.torn + each.corrupt for each in met)
    pipeline.finish(report)
    return report


def _judged(
    shard: str, *, source: str, storage_options: Mapping[str, Any] | None, verify: Callable[[], Any]
) -> Iterator[tuple[list[Answer], StoreReport]]:
    store = TrajectoryStore(source, read_only=True, storage_options=storage_options)
    yield list(judged_answers(store.read(only_shard=shard, whole=False), verify())), store.report


def _answers(judged: Iterable[Iterable[tuple[list[Answer], StoreReport]]], met: list[StoreReport]) -> Iterator[Answer]:
    for made in judged:
        for answers, report in made:
            met.append(report)
            yield from answers


class _Prompts:
    """The codec: questions as JSON lines, with the counts of their rollouts in the metadata."""

    def __init__(self, hold_out: float, seed: int) -> None:
        self._hold_out, self._seed = hold_out, seed

    def line(self, value: Prompt) -> str:
        return question_line(value.question, rollouts=_counts(value))

    def marked(self, value: Prompt, mark: Mark) -> str:
        return question_line(value.question, rollouts=_counts(value), **{MARK: vars(mark)})

    def folder(self, value: Prompt) -> str:
        if not self._hold_out:
            return "kept"
        print_ = fingerprint(value.question)
        # Questions about one image stay together.
        group = print_.images.partition(" ")[0] or print_.text
        digest = hashlib.sha256(f"{self._seed}\x00{group}".encode(errors="surrogatepass")).digest()
        return "test" if int.from_bytes(digest[:8], "big") < self._hold_out * 2**64 else "train"


def _counts(prompt: Prompt) -> dict[str, int]:
    return {"right": prompt.right, "wrong": prompt.wrong, "excluded": prompt.excluded}


class CorruptedStage:
    """Drops prompts that no policy can be trained on: no text, no checkable reference, missing images, clashes.

    Args:
        verifiers: by name, as `verify` takes them.
        images: where `sha256:` references are looked up; none are there without it.
    """

    name = "corrupted"
    settings: Mapping[str, Any] = {}

    def __init__(self, *, verifiers: Mapping[str, Verifier] = VERIFIERS, images: ImageStore | None = None) -> None:
        self._verifiers, self._images = verifiers, images

    def rule(self, rows: Sequence[Row[Prompt]]) -> list[Verdict]:
        """As `Stage`."""
        return [self._verdict(row.value) for row in rows]

    def _verdict(self, prompt: Prompt) -> Verdict:
        question = prompt.question
        if not question.text.strip():
            return drop("no text")
        if prompt.fault:
            return drop(prompt.fault)
        if fault := image_fault(question, self._images):
            return drop("missing image", fault)
        return self._reference(question)

    def _reference(self, question: Question) -> Verdict:
        """A reference that its own verifier does not accept can never be met."""
        if question.answer is None or not question.answer.strip():
            return drop("no reference")
        if question.verifier == "judge":
            return KEEP
        if question.verifier not in self._verifiers:
            return drop("unknown verifier", question.verifier)
        try:
            accepted = self._verifiers[question.verifier](question, question.answer)
        except InfrastructureError as error:
            return undecided("judge unavailable", error)
        except ConfigurationError as error:
            return undecided("verifier not installed", error)
        if not accepted:
            return drop("unverifiable reference", f"{question.verifier} does not accept {question.answer[:200]!r}")
        return KEEP


class MixStage:
    """Keeps prompts with successes and failures: the others have no advantage, and teach nothing.

    Args:
        least_rollouts: judged rollouts that it takes to tell.
        lowest: share of right rollouts; at least, where more than 0.
        highest: at most, where less than 1.
    """

    name = "mix"

    def __init__(self, *, least_rollouts: int = 2, lowest: float = 0.0, highest: float = 1.0) -> None:
        if least_rollouts < 2:
            raise ConfigurationError(f"MixStage(least_rollouts={least_rollouts!r}): a mix takes at least 2.")
        if not 0 <= lowest < highest <= 1:
            raise ConfigurationError(f"MixStage(lowest={lowest!r}, highest={highest!r}): 0 <= lowest < highest <= 1.")
        self._least, self._lowest, self._highest = least_rollouts, lowest, highest
        self.settings: Mapping[str, Any] = {"least_rollouts": least_rollouts, "lowest": lowest, "highest": highest}

    def rule(self, rows: Sequence[Row[Prompt]]) -> list[Verdict]:
        """As `Stage`."""
        return [self._verdict(row.value) for row in rows]

    def _verdict(self, prompt: Prompt) -> Verdict:
        judged = prompt.right + prompt.wrong
        if judged < self._least:
            detail = f"{judged} judged, {prompt.excluded} excluded"
            if prompt.question.verifier == "judge" and not judged:
                detail += "; a judge must be named, with --judge, and answer"
            return undecided("too few rollouts", detail) if prompt.excluded else drop("too few rollouts", detail)
        detail = f"{prompt.right} of {judged} right"
        if not prompt.right:
            return drop("all wrong", detail)
        if not prompt.wrong:
            return drop("all right", detail)
        share = prompt.right / judged
        if share < self._lowest:
            return drop("too hard", detail)
        return drop("too easy", detail) if share > self._highest else KEEP


class DisagreementStage:
    """Drops prompts on whose answers a judge and the verifier disagree: one of them would teach the wrong thing.

    Args:
        judge: rules on a few of each prompt's answers, right ones and wrong ones.
    """

    name = "disagreement"

    def __init__(self, judge: AnswerJudge) -> None:
        self._judge = judge
        self.settings: Mapping[str, Any] = {"judge": judge.identity}

    def rule(self, rows: Sequence[Row[Prompt]]) -> list[Verdict]:
        """As `Stage`."""
        # Where the judge is the verifier there is nobody to disagree with.
        asked = [
            (row.number, row.value.question, answer, right)
            for row in rows
            if row.value.question.verifier != "judge"
            for answer, right in row.value.answers
        ]
        rulings = self._judge.judge([(question, answer) for _, question, answer, _ in asked])
        verdicts = {row.number: KEEP for row in rows}
        for (number, _, answer, right), ruling in zip(asked, rulings, strict=True):
            if ruling.right is None:
                if verdicts[number].outcome == "keep":
                    verdicts[number] = undecided(ruling.reason)
            elif ruling.right != right:
                said = (
                    f"the verifier says {'right' if right else 'wrong'} of {answer[:200]!r}, the judge: {ruling.reason}"
                )
                verdicts[number] = drop("judge disagrees", said)
        return [verdicts[row.number] for row in rows]


class DuplicatesStage:
    """Keeps the first of prompts that are the same, exactly or nearly (see `similarity`).

    Args:
        index: a local file for what was kept; `None` for memory.
        least: Jaccard index from which two questions with the same numbers and the same reference are one.
    """

    name = "duplicates"

    def __init__(self, index: Path | None = None, *, least: float = 0.9) -> None:
        if not 0 < least <= 1:
            raise ConfigurationError(f"DuplicatesStage(least={least!r}): it must be above 0 and at most 1.")
        self._index, self._least = SimilarityIndex(index), least
        self.settings: Mapping[str, Any] = {"least": least}

    def rule(self, rows: Sequence[Row[Prompt]]) -> list[Verdict]:
        """As `Stage`; what a killed run had entered from these rows on is forgotten first."""
        verdicts = []
        self._index.begin_from(rows[0].number)
        for row in rows:
            print_ = fingerprint(row.value.question)
            match = self._index.find(print_, least=self._least, same_answer=True)
            if match is None:
                self._index.add(row.number, row.value.question.id, print_)
                verdicts.append(KEEP)
                continue
            reason = "duplicate" if match.similarity == 1 else "near duplicate"
            verdicts.append(drop(reason, f"of {match.id!r}, similarity {match.similarity:.3f}"))
        self._index.commit()
        return verdicts


_MAX_BYTES, _MAX_PIXELS = 60_000_000, 89_000_000
"""A question's image is the user's own: wider limits than for what strangers send."""


def image_fault(question: Question, images: ImageStore | None) -> str:
    """What is wrong with the first bad image of a question; empty where all are good.

    References are `sha256:...` of the image store, data URIs, and paths; what stands at an http(s) address is not
    fetched, and let through.
    """
    for reference in images_of(question):
        if fault := _fault(reference, images):
            return f"{reference[:100]!r}: {fault}"
    return ""


def _fault(reference: str, images: ImageStore | None) -> str:
    if reference.startswith(("http://", "https://")):
        return ""
    try:
        if reference.startswith("sha256:"):
            content = images.get_image(reference) if images is not None else b""
        elif reference.startswith("data:"):
            content = base64.b64decode(reference.partition(",")[2], validate=True)
        else:
            content = _file(Path(reference.removeprefix("file://")))
    except (InputError, StorageError, OSError, ValueError, binascii.Error) as error:
        return str(error)
    return _decodes(content)


def _file(path: Path) -> bytes:
    if not path.is_file():  # a device would never end
        raise InputError(f"{str(path)!r} is no file")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise InputError(f"more than {_MAX_BYTES:,} bytes")
    return content


def _decodes(content: bytes) -> str:
    if not is_image(content):
        return "no image" if content else "empty"
    try:
        from PIL import Image
    except ImportError:
        return ""  # without Pillow the beginning has to do
    import io

    try:
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                return f"{image.width} x {image.height} pixels, more than {_MAX_PIXELS:,}"
            image.verify()
    except Exception as error:  # Pillow raises whatever the decoder does
        return f"damaged: {error}"
    return ""
