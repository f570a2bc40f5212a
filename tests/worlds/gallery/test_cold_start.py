"""What the cold start is taught is token for token what the agent will ask of it, and the model can learn from it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage, ToolMessage

from metis_agent.gates.baselines import BranchGate
from metis_agent.hdpo.rollouts import Rollouts, group_rollouts
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.tools.images import image_source, load_image
from metis_agent.tools.python import PythonTool
from metis_agent.types import TOKEN_RECORD, Question, Trajectory
from metis_agent.worlds.gallery.agent import REPLY, gallery_agent
from metis_agent.worlds.gallery.cold_start import (
    Recipe,
    Stage,
    _call,
    _Row,
    _Rows,
    _seen,
    build_model,
    train_cold_start,
)
from metis_agent.worlds.gallery.pictures import CANVAS, GRID, VIEW, Exhibit, draw, exhibit
from metis_agent.worlds.gallery.questions import ask
from metis_agent.worlds.gallery.tokens import SHOWN, build_processor, crop_code

SMALL = replace(Recipe(), pool=2, fresh=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chat() -> LocalChatModel:
    torch.manual_seed(0)
    processor = build_processor()
    model: Any = build_model(processor)
    model.eval()
    return LocalChatModel(
        model=model, tokenizer=processor.tokenizer, processor=processor, temperature=1.0, max_new_tokens=REPLY
    )


def about(size: str) -> tuple[Exhibit, Question]:
    rng = random.Random(3)
    it = exhibit("47", size, rng)  # type: ignore[arg-type]
    return it, ask(it, rng)


def row_of(processor: Any, it: Exhibit, question: str, task: str, *, direct: float) -> _Row:
    """The row that training would make of an exhibit and this form of the question."""
    rows = _Rows(processor, replace(SMALL, pool=0, direct_large=direct, direct_tiny=direct), random.Random(0))
    rows._rng = _Chooses(question)
    return rows._row(task, _seen(it))  # type: ignore[arg-type]


class _Chooses(random.Random):
    def __init__(self, question: str) -> None:
        super().__init__(0)
        self._question = question

    def choice(self, seq: Any) -> Any:
        return self._question


@pytest.fixture(scope="module")
def cropped(chat: LocalChatModel, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """A run of the graph in which the policy's tokens are given: the crop, in the real sandbox, and the answer."""
    it, question = about("tiny")
    call = "".join(text for text, _ in _call(it))
    said = [chat.tokenizer(text)["input_ids"] for text in (call, "<answer>47</answer><|end|>")]
    patch = pytest.MonkeyPatch()
    patch.setattr(LocalChatModel, "_forced", lambda self, choice, tools: tuple(said.pop(0)))
    tool = PythonTool()
    try:
        runs = Rollouts(
            lambda gate: gallery_agent(chat, gate, tool=tool), TrajectoryStore(tmp_path_factory.mktemp("runs"))
        )
        return runs.collect(group_rollouts([question], ("free",), name="t", seed=0))[0]
    finally:
        patch.undo()
        tool.close()


def test_the_agent_crops_in_the_sandbox_and_sees_the_crop(cropped: Trajectory) -> None:
    it, _ = about("tiny")
    assert cropped.status == "finished", cropped.error
    assert cropped.answer == "47"
    assert [outcome.status for outcome in cropped.outcomes] == ["ok"]
    assert cropped.outcomes[0].arguments == {"code": crop_code(it.cell)}
    shown = next(message["data"]["content"] for message in cropped.messages if message["type"] == "tool")
    assert shown[0]["text"] == SHOWN
    source = image_source(shown[1])
    assert source is not None
    crop = load_image(source)
    assert crop.size == (CANVAS, CANVAS)
    assert crop.resize((VIEW, VIEW), 3).tobytes() == _seen(it).crop.tobytes()


def test_what_is_taught_is_what_the_agent_asks_token_for_token(chat: LocalChatModel, cropped: Trajectory) -> None:
    it, question = about("tiny")
    row = row_of(chat.processor, it, question.text, "act", direct=0.0)
    first, last = cropped.calls
    assert last.continues
    assert list((last.prompt_ids or ()) + (last.completion_ids or ())) == row.ids
    learnt = [token for token, label in zip(row.ids, row.labels, strict=True) if label >= 0]
    assert learnt == [*(first.completion_ids or ()), *(last.completion_ids or ())]


def test_a_direct_row_learns_the_answer_but_not_the_decision(chat: LocalChatModel) -> None:
    it, question = about("large")
    tokenizer = chat.tokenizer
    asked = chat.invoke([HumanMessage([{"type": "image", "url": question.metadata["images"][0]}, _text(question)])])
    prompt = asked.response_metadata[TOKEN_RECORD]["prompt_ids"]
    answer = tokenizer("<answer>47</answer><|end|>")["input_ids"]
    for task, first in (("read", -100), ("act", answer[0])):
        row = row_of(chat.processor, it, question.text, task, direct=1.0)
        assert row.ids == prompt + answer
        assert row.labels == [-100] * len(prompt) + [first, *answer[1:]]


def test_pointing_learns_the_coordinates_alone(chat: LocalChatModel) -> None:
    it, question = about("tiny")
    row = row_of(chat.processor, it, question.text, "point", direct=0.0)
    learnt = chat.tokenizer.decode([label for label in row.labels if label >= 0])
    left, top = (64 * place for place in it.cell)
    assert learnt == f"({left}, {top}, {left + 64}, {top + 64}))"


def test_pixels_of_a_training_row_are_those_of_the_chat_model(chat: LocalChatModel) -> None:
    it, question = about("large")
    seen = chat._reader.see(question.metadata["images"][0])  # type: ignore[union-attr]
    rows = _Rows(chat.processor, replace(SMALL, pool=0), random.Random(0))
    rows._pool = {"large": [_seen(it)]}
    batch = rows.batch(Stage(steps=1, rows=(("read", "large", 2),), rates=(1, 1)))
    torch.testing.assert_close(batch["pixel_values"][:64], seen.tensors["pixel_values"], rtol=0, atol=0)
    assert draw(it).size == (CANVAS, CANVAS)


def test_coordinates_are_single_tokens_and_no_number_is_taken_for_one() -> None:
    tokenizer = build_processor().tokenizer
    for column in range(GRID):
        for row in range(GRID):
            assert len(tokenizer.tokenize(crop_code((column, row)))) == 6
    for number in range(100):
        assert len(tokenizer.tokenize(f"<answer>{number:02d}</answer>")) == 4


def test_the_opening_of_a_forced_call_names_the_tool(chat: LocalChatModel) -> None:
    _, question = about("tiny")
    message = HumanMessage([{"type": "image", "url": question.metadata["images"][0]}, _text(question)])
    forced = chat.bind_tools([PythonTool()], tool_choice="python").invoke([message]).response_metadata[TOKEN_RECORD]
    opening = chat.tokenizer.decode(forced["completion_ids"][: forced["forced"]])
    assert opening == '<tool_call>{"name": "python", "arguments": {"code": "'


def test_a_call_that_fails_and_a_blocked_one_are_read_too(chat: LocalChatModel) -> None:
    """Texts that were never taught still have tokens, images among them or not."""
    _, question = about("tiny")
    asked = HumanMessage([{"type": "image", "url": question.metadata["images"][0]}, _text(question)])
    error = ToolMessage("NameError: name 'image_9' is not defined", tool_call_id="c", status="error")
    call = {"name": "python", "args": {"code": "image_9"}, "id": "c", "type": "tool_call"}
    ids = asyncio.run(
        chat.ainvoke([asked, {"role": "assistant", "content": "", "tool_calls": [call]}, error])
    ).response_metadata[TOKEN_RECORD]["prompt_ids"]
    assert ids.count(chat.processor.image_token_id) == 16
    assert chat.tokenizer.unk_token_id not in ids


def test_a_few_steps_lower_the_loss_and_the_folder_loads(tmp_path: Path) -> None:
    losses: list[float] = []
    stage = Stage(steps=12, rows=(("read", "large", 4), ("point", "tiny", 4)), rates=(1.0, 1.0))
    recipe = replace(SMALL, stages=(stage,), warmup=4)
    train_cold_start(tmp_path, recipe, progress=lambda step, loss, model: losses.append(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000_000
    chat = LocalChatModel.load(tmp_path, max_new_tokens=2)
    assert sum(parameter.numel() for parameter in chat.model.parameters()) < 700_000
    _, question = about("tiny")
    message = HumanMessage([{"type": "image", "url": question.metadata["images"][0]}, _text(question)])
    assert chat.invoke([message]).response_metadata[TOKEN_RECORD]["completion_ids"]


def test_a_gate_can_force_either_branch(chat: LocalChatModel) -> None:
    _, question = about("tiny")
    tool = PythonTool()
    message = HumanMessage([{"type": "image", "url": question.metadata["images"][0]}, _text(question)])
    try:
        state = gallery_agent(chat, BranchGate("direct"), tool=tool).invoke({"messages": [message]})
    finally:
        tool.close()
    assert not [it for it in state["messages"] if isinstance(it, ToolMessage)]


def _text(question: Question) -> dict[str, str]:
    return {"type": "text", "text": question.text}
