"""Curation for RL: each kind of prompt where it belongs, none lost, train and test apart, resumed exactly."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metis_agent.curation.leaks import LeaksStage, SimilarityIndex, _TestSet, fingerprint
from metis_agent.curation.pipeline import Chunking
from metis_agent.curation.prompts import Prompt, PromptCounts, read_questions
from metis_agent.curation.rl import CorruptedStage, DisagreementStage, DuplicatesStage, MixStage, curate_rl
from metis_agent.curation.sft import MARK
from metis_agent.judging.judge import AnswerJudge
from metis_agent.judging.rubric import Asking
from metis_agent.judging.verifiers import verify
from metis_agent.recording.images import ImageStore
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Question
from tests.judging.judges import SimulatedJudge

from .runs import run

LONG = (
    "A merchant leaves Ostend with 12 barrels of herring and sells 7 of them on the road; how many are left for Ghent?"
)


def question(id: str, text: str, answer: str | None = "42", **fields: Any) -> Question:
    return Question(id=id, text=text, answer=answer, **{"verifier": "numeric", **fields})


def picture() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(content, "PNG")
    return content.getvalue()


HERE = f"sha256:{'0' * 64}"
TESTED = question("t1", "How many legs have 21 hens of the inn?")
EXPECTED = {
    # id: where it must end; "kept" for the kept ones
    "mixed": "kept",
    "plus": "kept",
    "minus": "kept",
    "long": "kept",
    "with image": "kept",
    "all right": "mix: all right",
    "all wrong": "mix: all wrong",
    "one rollout": "mix: too few rollouts",
    "runs failed": "undecided mix: too few rollouts",
    "no reference": "corrupted: no reference",
    "reference is no number": "corrupted: unverifiable reference",
    "no letter": "corrupted: unverifiable reference",
    "no text": "corrupted: no text",
    "image lost": "corrupted: missing image",
    "image damaged": "corrupted: missing image",
    "image is text": "corrupted: missing image",
    "contradicted": "corrupted: references disagree",
    "contradicts": "corrupted: references disagree",
    "one id": "corrupted: one id for several questions",
    "judge disagrees": "disagreement: judge disagrees",
    "judge down": "undecided disagreement: judge unavailable",
    "same again": "duplicates: duplicate",
    "nearly the same": "duplicates: near duplicate",
    "of the test set": "leaks: asks a test question",
    "nearly of the test set": "leaks: nearly asks a test question",
}


def questions(images: ImageStore, folder: Path) -> list[tuple[Question, str]]:
    """Questions, and what their rollouts said: R right, W wrong, F failed."""
    (folder / "damaged.png").write_bytes(picture()[:40])
    (folder / "text.png").write_text("hello")
    good = images.put_image(picture())
    return [
        (question("mixed", "How many figs in all?"), "RWRW"),
        (question("plus", "What is 30 + 12?"), "RW"),
        (question("minus", "What is 30 - 12?", "18"), "RW"),
        (question("long", LONG, "5"), "RRRW"),
        (question("with image", "How many dots?", metadata={"images": [good]}), "RW"),
        (question("all right", "Easy?"), "RRRR"),
        (question("all wrong", "Hopeless?"), "WWW"),
        (question("one rollout", "Once?"), "R"),
        (question("runs failed", "Where is the server?"), "RFFF"),
        (question("no reference", "Who knows?", None), "RW"),
        (question("reference is no number", "Which word?", "forty"), "RW"),
        (question("no letter", "Which letter?", "all of them", verifier="choice"), "RW"),
        (question("no text", " "), "RW"),
        (question("image lost", "How many cats?", metadata={"images": [HERE]}), "RW"),
        (question("image damaged", "How many dogs?", metadata={"images": [str(folder / "damaged.png")]}), "RW"),
        (question("image is text", "How many owls?", metadata={"image": str(folder / "text.png")}), "RW"),
        (question("contradicted", "How old is the abbot?", "42"), "RW"),
        (question("contradicts", "How old is the abbot??", "43"), "RW"),
        (question("one id", "The first of two?"), "RW"),
        (question("one id", "Quite another one?"), "RW"),
        (question("judge disagrees", "What does the judge say?"), "RW"),
        (question("judge down", "Is the judge there?"), "RW"),
        (question("same again", "how many FIGS, in all"), "RWRW"),
        (question("nearly the same", LONG.replace("merchant", "merchants"), "5"), "RW"),
        (question("of the test set", "how many legs have 21 hens, of the inn"), "RW"),
        (question("nearly of the test set", "How many legs have 21 hens of the inns?", "84"), "RW"),
    ]


def write(folder: Path) -> int:
    """The rollouts, those of a question scattered over the store."""
    asked = questions(ImageStore(folder / "store"), folder)
    number = 0
    with TrajectoryStore(folder / "store") as store:
        for place in range(4):
            for it, said in asked:
                if place < len(said):
                    answer = {"R": it.answer or "42", "W": "77", "F": ""}[said[place]]
                    trajectory = run(id=f"r{number}", question=it, answer=answer)
                    store.append(replace(trajectory, status="failed") if said[place] == "F" else trajectory)
                    number += 1
    return number


def judging(record: dict[str, str]) -> dict[str, Any]:
    if record["question"] == "Is the judge there?":
        raise ConnectionError("no route")
    right = record["answer"] == record["reference"]
    return {"reason": "so", "right": right != (record["question"] == "What does the judge say?")}


def curate(folder: Path, **options: Any) -> Any:
    judge = AnswerJudge(SimulatedJudge(rule=judging), asking=Asking(backoff=0.0))
    return curate_rl(
        folder / "store", folder / "out",
        [
            CorruptedStage(images=ImageStore(folder / "store")), MixStage(), DisagreementStage(judge),
            DuplicatesStage(folder / "work/duplicates"),
            LeaksStage([TESTED], question_of=lambda it: it.question, folder=folder / "work/test"),
        ],
        work=folder / "work", chunking=Chunking(rows=4), **options,
    )  # fmt: skip


def ends(folder: Path) -> dict[str, str]:
    found = {}
    for place, prefix in (("kept", ""), ("quarantine/dropped", ""), ("quarantine/undecided", "undecided ")):
        for it in read_questions(str(folder / "out" / place)):
            mark = it.metadata.get(MARK)
            found[it.id] = "kept" if mark is None else f"{prefix}{mark['stage']}: {mark['reason']}"
    return found


def test_each_prompt_ends_where_it_belongs_and_none_is_lost(tmp_path: Path) -> None:
    rollouts = write(tmp_path)
    report = curate(tmp_path)
    assert ends(tmp_path) == EXPECTED
    assert report.rows == len(EXPECTED) + 1  # "one id" is there twice
    assert report.rows == report.kept.total() + report.dropped + report.undecided
    lines = [
        json.loads(line)
        for path in (tmp_path / "out").rglob("segment-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    counts = [line["metadata"]["rollouts"] for line in lines]
    assert sum(sum(count.values()) for count in counts) == rollouts
    mixed = next(line for line in lines if line["id"] == "long")
    assert mixed["metadata"]["rollouts"] == {"right": 3, "wrong": 1, "excluded": 0}


def test_stopped_while_counting_and_while_curating_it_ends_the_same(tmp_path: Path) -> None:
    write(tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for moment in ("counting", "progress"):
        with pytest.raises(KeyboardInterrupt):
            curate(tmp_path, **{moment: stop})
    assert curate(tmp_path).rows == len(EXPECTED) + 1
    assert ends(tmp_path) == EXPECTED


def test_counting_goes_on_where_it_was(tmp_path: Path) -> None:
    runs = [run(id=f"{number}", question=question(f"q{number % 5}", f"{number % 5}?")) for number in range(30)]
    with pytest.raises(KeyboardInterrupt):
        PromptCounts(tmp_path / "c", verify=verify, batch=4).count(_broken(runs, at=18))
    counts = PromptCounts(tmp_path / "c", verify=verify, batch=4)
    assert counts.trajectories == 16
    counts.count(runs)
    counts.count(runs)
    assert [prompt.rollouts for prompt in counts.prompts()] == [6] * 5


def _broken(runs: Sequence[Any], at: int) -> Any:
    yield from runs[:at]
    raise KeyboardInterrupt


def test_train_and_test_are_apart_and_the_same_each_time(tmp_path: Path) -> None:
    with TrajectoryStore(tmp_path / "store") as store:
        for number in range(200):
            it = question(f"q{number}", f"How many figs has stall {number} in the market of town {number * 7}?")
            store.append(run(id=f"a{number}", question=it))
            store.append(run(id=f"b{number}", question=it, answer="41"))
    sides = []
    for out in ("one", "two"):
        curate_rl(
            tmp_path / "store", tmp_path / out, [MixStage(), DuplicatesStage()], work=tmp_path / out / "work",
            hold_out=0.25, seed=3,
        )  # fmt: skip
        sides.append([{it.id for it in read_questions(str(tmp_path / out / side))} for side in ("train", "test")])
    train, test = sides[0]
    assert sides[0] == sides[1]
    assert len(train | test) == 200
    assert not train & test
    assert 25 <= len(test) <= 75
    held_out = list(read_questions(str(tmp_path / "one/test")))
    assert all(not leak_of(it, held_out) for it in list(read_questions(str(tmp_path / "one/train")))[:20])


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("What is 12 + 7?", "what is 12 + 7", True),
        ("What is 12 + 7?", "What is 12 - 7?", False),
        ("What is 5 minus 3?", "What is 3 minus 5?", False),
        ("What is 3.5 of it?", "What is 35 of it?", False),
        (LONG, LONG.replace("herring", "herrings"), True),
        (LONG, LONG.replace("12", "13"), False),
        (LONG, LONG.replace("herring", "wine and of the best beer there is in all of the country"), False),
        ("Which river runs through Abele?", "Which river runs through Brugge?", False),
        ("富士山の高さは何メートルですか", "富士山の高さは何メートルですか?", True),
        ("富士山の高さは何メートルですか", "黒部川の長さは何キロですか", False),
    ],
)
def test_which_questions_are_the_same(first: str, second: str, same: bool) -> None:
    index = SimilarityIndex()
    index.begin_from(0)
    index.add(0, "first", fingerprint(question("a", first)))
    found = index.find(fingerprint(question("b", second)), least=0.85, same_answer=True)
    assert (found is not None) == same


def test_the_same_words_with_another_answer_are_no_near_duplicate() -> None:
    index = SimilarityIndex()
    index.begin_from(0)
    index.add(0, "first", fingerprint(question("a", LONG, "5")))
    other = fingerprint(question("b", LONG.replace("herring", "herrings"), "6"))
    assert index.find(other, least=0.85, same_answer=True) is None
    assert index.find(other, least=0.85, same_answer=False) is not None


def test_near_duplicates_are_found_among_thousands() -> None:
    index = SimilarityIndex()
    index.begin_from(0)
    texts = [f"The mill of {name} grinds {number} sacks; how much flour is that in all, says the miller?"
             for number in range(300) for name in ("Abele", "Brugge", "Celle", "Damme")]  # fmt: skip
    for number, text in enumerate(texts):
        index.add(number, str(number), fingerprint(question("a", text)))
    missed = []
    for number, text in enumerate(texts[::10]):
        print_ = fingerprint(question("b", text.replace("sacks", "sackz")))
        found = index.find(print_, least=0.8, same_answer=True)
        if found is None or found.number != 10 * number:
            missed.append((text, found))
    assert missed == []


def leak_of(one: Question, test: list[Question]) -> str:
    return _TestSet(test, None).leak(fingerprint(one), 0.8)[0]


def test_a_test_question_inside_a_longer_one_leaks_and_boilerplate_does_not() -> None:
    asked = "Of the nine bridges over the river at Damme which one was built by the guild of the weavers in spring?"
    rules = "Answer with one word only and do not explain how you came to it or what you think of the question."
    test = [question("t", asked), *(question(f"b{number}", f"{rules} Item {number}?") for number in range(20))]
    assert (
        leak_of(question("x", f"{'A long story of the old town goes before it. ' * 4}{asked} Be brief."), test)
        == "holds a test question"
    )
    assert leak_of(question("x", f"{rules} Which saint is on the seal of the town of Damme?"), test) == ""


def test_an_image_of_the_test_set_leaks() -> None:
    test = [question("t", "How many?", metadata={"images": ["sha256:a", "sha256:b"]})]
    assert leak_of(question("x", "Which colour?", metadata={"image": "sha256:b"}), test)
    assert not leak_of(question("x", "How many?", metadata={"image": "sha256:c"}), test)


def test_a_judge_that_is_the_verifier_has_nobody_to_disagree_with() -> None:
    prompt = Prompt(question=question("q", "?", verifier="judge"), right=1, wrong=1, answers=(("42", True),))
    model = SimulatedJudge()
    from metis_agent.curation.pipeline import Row

    stage = DisagreementStage(AnswerJudge(model, asking=Asking(backoff=0.0)))
    assert stage.rule([Row(number=0, value=prompt)])[0].outcome == "keep"
    assert model.prompts == []


def test_a_picture_is_known_by_its_content_however_it_is_given(tmp_path: Path) -> None:
    content = picture()
    plain, wrapped = base64.b64encode(content).decode(), base64.encodebytes(content).decode()
    assert wrapped.count("\n") > 1
    forms = [f"data:image/png;base64,{plain}", f"data:image/png;base64,{wrapped}", plain, wrapped]
    names = [fingerprint(question("a", "What is this?", metadata={"images": [form]})).images for form in forms]
    assert set(names) == {ImageStore(tmp_path).put_image(content)}
    assert len(names[0]) == len("sha256:") + 64


def test_a_picture_in_any_form_has_a_short_name_and_a_path_one_of_its_own() -> None:
    whole = base64.b64encode(random.Random(0).randbytes(30_000)).decode()
    block = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{whole}"}}
    forms = [whole, f"data:image/png;base64,{whole}", {"type": "image", "base64": whole}, block, "a/my picture.png"]
    names = [fingerprint(question("a", "What?", metadata={"images": [form]})).images for form in forms]
    assert names[0] == names[1]
    assert {len(name) for name in names} == {len("sha256:") + 64}
    for name in ("a/picture.png", "a/pictures/of/it"):  # the second can be read as base64, but as no picture
        assert fingerprint(question("a", "What?", metadata={"images": [name]})).images == name


def test_a_picture_within_a_text_is_an_image_and_no_words() -> None:
    whole = base64.b64encode(random.Random(0).randbytes(30_000)).decode()
    uri = f"data:image/png;base64,{whole}"
    beside = fingerprint(question("a", "What is this?", metadata={"images": [uri]}))
    assert fingerprint(question("b", f"What is ![]({uri}) this?")).images == beside.images
    assert len(fingerprint(question("b", f"What is ![]({uri}) this?")).text) < 40
    test = [question("t", "How many?", metadata={"images": [uri]})]
    assert leak_of(question("x", f"Which colour has ![it]({uri})?"), test)


def test_prompts_for_a_judge_without_one_say_what_is_missing() -> None:
    from metis_agent.curation.pipeline import Row

    prompt = Prompt(question=question("q", "?", verifier="judge"), excluded=2)
    (verdict,) = MixStage().rule([Row(number=0, value=prompt)])
    assert (verdict.outcome, verdict.reason) == ("undecided", "too few rollouts")
    assert "--judge" in verdict.detail
