"""What the cold start is taught is token for token what the agent will ask of it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import ToolMessage

from metis_agent.gates.reference import BranchGate
from metis_agent.messages import image_source
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollouts, group_rollouts, question_message
from metis_agent.tools.images import load_image
from metis_agent.tools.python import PythonTool
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.types import TOKEN_RECORD, Question, Trajectory
from metis_agent.worlds.gallery.cold_start import build_model
from metis_agent.worlds.gallery.experiment import REPLY, gallery_agent
from metis_agent.worlds.gallery.pictures import CANVAS, CONTENTS, GRID, SIZES, WORDS, Content, Exhibit, Size
from metis_agent.worlds.gallery.questions import Painting, ask, ask_painter, drawn_from, photograph, write_collection
from metis_agent.worlds.gallery.rows import Row, Rows, call_pieces, patches_of
from metis_agent.worlds.gallery.tokens import SEARCH, SHOWN, build_processor, crop_code


@pytest.fixture(scope="module")
def chat() -> LocalChatModel:
    torch.manual_seed(0)
    processor = build_processor()
    model: Any = build_model(processor)
    model.eval()
    return LocalChatModel(
        model=model, tokenizer=processor.tokenizer, processor=processor, temperature=1.0, max_new_tokens=REPLY
    )


def about(content: Content, size: Size) -> tuple[Exhibit, Question]:
    rng = random.Random(3)
    it = drawn_from("test", content, size, rng)
    return it, ask(it, rng)


class _Chooses(random.Random):
    def __init__(self, question: str) -> None:
        super().__init__(0)
        self._question = question

    def choice(self, seq: Any) -> Any:
        return self._question


def rows_of(chat: LocalChatModel, question: str, *, direct: float) -> Rows:
    """What makes training's rows, with this form of the question."""
    made = Rows(chat.processor, random.Random(0), pool=0, fresh=0, direct_large=direct, direct_tiny=direct)
    made._rng = _Chooses(question)
    return made


def run(chat: LocalChatModel, question: Question, said: list[str], folder: Path) -> Trajectory:
    """A run of the graph, with the real tools, in which what the policy says is given."""
    tokens = [chat.tokenizer(text)["input_ids"] for text in said]
    patch = pytest.MonkeyPatch()
    patch.setattr(LocalChatModel, "_forced", lambda self, choice, tools: tuple(tokens.pop(0)))
    tool = PythonTool()
    collection = ImageFolder.build(write_collection(folder / "collection"))
    try:
        runs = Rollouts(
            lambda gate: gallery_agent(chat, gate, tool=tool, collection=collection), TrajectoryStore(folder / "runs")
        )
        return runs.collect(group_rollouts([question], ("free",), name="t", seed=0))[0]
    finally:
        patch.undo()
        tool.close()


def assert_taught(row: Row, it: Trajectory) -> None:
    """The row is the run, and what is learnt is what the policy said."""
    assert it.status == "finished", it.error
    assert [outcome.status for outcome in it.outcomes] == ["ok"]
    first, last = it.calls
    assert last.continues
    assert list((last.prompt_ids or ()) + (last.completion_ids or ())) == row.ids
    learnt = [token for token, label in zip(row.ids, row.labels, strict=True) if label >= 0]
    assert learnt == [*(first.completion_ids or ()), *(last.completion_ids or ())]


def test_a_crop_is_taught_as_the_agent_meets_it(chat: LocalChatModel, tmp_path: Path) -> None:
    it, question = about("word", "tiny")
    call = "".join(text for text, _ in call_pieces(it))
    cropped = run(chat, question, [call, f"<answer>{it.text}</answer><|end|>"], tmp_path)
    made = rows_of(chat, question.text, direct=0.0)
    seen = made.see(it)
    assert_taught(made.row("act", seen), cropped)
    assert cropped.answer == it.text
    assert cropped.outcomes[0].arguments == {"code": crop_code(it.cell)}
    shown = next(message["data"]["content"] for message in cropped.messages if message["type"] == "tool")
    assert shown[0]["text"] == SHOWN
    source = image_source(shown[1])
    assert source is not None
    crop = load_image(source)
    assert crop.size == (CANVAS, CANVAS)
    assert torch.equal(patches_of(crop), seen.crop)


def test_a_search_is_taught_as_the_agent_meets_it(chat: LocalChatModel, tmp_path: Path) -> None:
    it = Painting(number=17)
    question = ask_painter(it, random.Random(0))
    call = f"<tool_call>{SEARCH}</tool_call><|end|>"
    found = run(chat, question, [call, f"<answer>{it.painter}</answer><|end|>"], tmp_path)
    made = rows_of(chat, question.text, direct=0.0)
    assert_taught(made.painting_row(it, patches_of(photograph(it, 1))), found)
    assert found.answer == it.painter == question.answer


def test_a_direct_row_learns_the_answer_but_not_the_decision(chat: LocalChatModel) -> None:
    it, question = about("number", "large")
    tokenizer = chat.tokenizer
    prompt = chat.invoke([question_message(question)]).response_metadata[TOKEN_RECORD]["prompt_ids"]
    answer = tokenizer(f"<answer>{it.text}</answer><|end|>")["input_ids"]
    made = rows_of(chat, question.text, direct=1.0)
    for task, first in (("read", -100), ("act", answer[0])):
        row = made.row(task, made.see(it))  # type: ignore[arg-type]
        assert row.ids == prompt + answer
        assert row.labels == [-100] * len(prompt) + [first, *answer[1:]]


def test_pointing_learns_the_coordinates_alone(chat: LocalChatModel) -> None:
    it, question = about("chart", "tiny")
    made = rows_of(chat, question.text, direct=0.0)
    row = made.row("point", made.see(it))
    learnt = chat.tokenizer.decode([label for label in row.labels if label >= 0])
    left, top = (64 * place for place in it.cell)
    assert learnt == f"({left}, {top}, {left + 64}, {top + 64}))"


def test_pixels_of_a_training_row_are_those_of_the_chat_model(chat: LocalChatModel) -> None:
    it, question = about("chart", "large")
    seen = chat._reader.see(question.metadata["images"][0])  # type: ignore[union-attr]
    made = rows_of(chat, question.text, direct=0.0)
    batch = made.batch([made.row("act", made.see(it))])  # one that only reads is varied
    assert len(batch["pixel_values"]) == 2 * 64
    torch.testing.assert_close(batch["pixel_values"][:64], seen.tensors["pixel_values"], rtol=0, atol=1e-6)
    assert batch["image_grid_thw"][:1].tolist() == seen.tensors["image_grid_thw"].tolist()


def test_batches_hold_what_was_asked_for_and_the_pool_is_renewed() -> None:
    rows = Rows(build_processor(), random.Random(0), pool=2, fresh=3, direct_large=0.0, direct_tiny=0.0)
    before = {kind: list(pool) for kind, pool in rows._pool.items()}
    assert set(before) == {(content, size) for content in CONTENTS for size in SIZES}
    short, long = rows.batches(((("read", "word", "large"), 2), (("act", "word", "tiny"), 3), ("painting", 1)))
    assert (len(short["labels"]), len(long["labels"])) == (3, 3)
    assert len(long["image_grid_thw"]) == 6
    renewed = sum(
        one is not other for kind in before for one, other in zip(before[kind], rows._pool[kind], strict=True)
    )
    assert 1 <= renewed <= 3


def test_coordinates_and_words_are_single_tokens_and_no_number_is_taken_for_one() -> None:
    tokenizer = build_processor().tokenizer
    for column in range(GRID):
        for row in range(GRID):
            assert len(tokenizer.tokenize(crop_code((column, row)))) == 6
    for number in range(100):
        assert len(tokenizer.tokenize(f"<answer>{number:02d}</answer>")) == 4
    for word in WORDS:
        assert tokenizer.tokenize(word) == [word]
    for painter in {Painting(number=number).painter for number in range(50)}:
        assert len(tokenizer.tokenize(painter)) == 2


def test_the_opening_of_a_forced_call_names_the_tool(chat: LocalChatModel) -> None:
    _, question = about("number", "tiny")
    message = question_message(question)
    forced = chat.bind_tools([PythonTool()], tool_choice="python").invoke([message]).response_metadata[TOKEN_RECORD]
    opening = chat.tokenizer.decode(forced["completion_ids"][: forced["forced"]])
    assert opening == '<tool_call>{"name": "python", "arguments": {"code": "'


def test_a_call_that_fails_and_a_blocked_one_are_read_too(chat: LocalChatModel) -> None:
    """Texts that were never taught still have tokens, images among them or not."""
    _, question = about("number", "tiny")
    asked = question_message(question)
    error = ToolMessage("NameError: name 'image_9' is not defined", tool_call_id="c", status="error")
    call = {"name": "python", "args": {"code": "image_9"}, "id": "c", "type": "tool_call"}
    ids = asyncio.run(
        chat.ainvoke([asked, {"role": "assistant", "content": "", "tool_calls": [call]}, error])
    ).response_metadata[TOKEN_RECORD]["prompt_ids"]
    assert ids.count(chat.processor.image_token_id) == 16
    assert chat.tokenizer.unk_token_id not in ids


def test_a_gate_can_force_either_branch(chat: LocalChatModel) -> None:
    _, question = about("number", "tiny")
    tool = PythonTool()
    message = question_message(question)
    try:
        state = gallery_agent(chat, BranchGate("direct"), tool=tool).invoke({"messages": [message]})
    finally:
        tool.close()
    assert not [it for it in state["messages"] if isinstance(it, ToolMessage)]
