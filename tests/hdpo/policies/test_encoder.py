"""A classifier learns a planted rule, and its gate is calibrated, measured and served like any other."""

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from langchain_core.messages import HumanMessage

from metis_agent.errors import CheckpointError, ConfigurationError
from metis_agent.evaluation.calibration import Promise, choose_threshold
from metis_agent.evaluation.gates import evaluate_gate, score_table
from metis_agent.gates.policy import PolicyGate
from metis_agent.hdpo.export import set_threshold, trained_keys
from metis_agent.hdpo.policies.encoder import EncoderPolicy
from metis_agent.types import GateRequest, ToolSpec
from tests.hdpo.policies.conftest import Trained
from tests.hdpo.policies.tiny import planted

TOOLS = (ToolSpec(name="calculator"), ToolSpec(name="wiki"))

# Training takes seconds, and minutes on a machine that is busy with other things.
pytestmark = pytest.mark.timeout(900)


def ask(text: str) -> GateRequest:
    return GateRequest(messages=[HumanMessage(f"note 7\n\n{text}")], tools=TOOLS)


@pytest.fixture(scope="module")
def gate(encoder: Trained) -> PolicyGate:
    return PolicyGate(encoder.folder)


def test_it_learns_the_rule(gate: PolicyGate) -> None:
    fresh = planted(300, seed=9, context=True)
    figures = evaluate_gate(score_table(gate, fresh), fresh, gate.threshold, resamples=50)
    at = figures["at_threshold"]
    # Two thirds of the questions need a tool, and the right one.
    assert figures["auc"] > 0.85
    assert at["accuracy"] > 0.9
    assert 0.5 < at["tool_rate"] < 0.8
    assert gate.decide(ask("Compute the sum of q")).allowed == ("calculator",)
    assert gate.decide(ask("Find the river of q")).allowed == ("wiki",)
    assert gate.decide(ask("Say hello to the team of q")).direct


def test_the_deployed_gate_says_what_was_trained(encoder: Trained, gate: PolicyGate) -> None:
    scored = score_table(gate, encoder.table)
    accuracy, probabilities = encoder.gate.score(np.arange(len(encoder.table)))
    np.testing.assert_allclose(scored.direct_right, accuracy[:, 0], atol=1e-5)
    np.testing.assert_allclose(scored.probabilities, probabilities, atol=1e-5)


def test_it_is_calibrated_like_any_gate(encoder: Trained, gate: PolicyGate, tmp_path: Path) -> None:
    held_out = planted(600, seed=5, context=True)
    scored = score_table(gate, held_out)
    promise = Promise(kind="calls", limit=0.6)
    threshold = choose_threshold(scored.probabilities, held_out.correct, held_out.cost, promise)
    folder = tmp_path / "gate"
    shutil.copytree(encoder.folder, folder)
    set_threshold(folder, threshold.note())
    assert PolicyGate(folder).threshold == threshold.value
    assert threshold.tool_rate <= 0.6
    assert tuple(trained_keys(PolicyGate(folder).artefact)) == encoder.table.keys


def test_many_threads_and_tasks_get_their_own_answers(gate: PolicyGate) -> None:
    texts = [f"{start} of {letter}" for start in ("Compute the sum", "Find the mayor") for letter in "abcdefghij"]
    alone = [gate.score(text, "note 7")[1]["wiki"] for text in texts]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda text: gate.score(text, "note 7")[1]["wiki"], texts))
    np.testing.assert_allclose(together, alone, atol=1e-5)

    async def tasks() -> list[float]:
        decisions = await asyncio.gather(*(gate.adecide(ask(text)) for text in texts))
        return [(decision.probabilities or {})["wiki"] for decision in decisions]

    np.testing.assert_allclose(asyncio.run(tasks()), alone, atol=1e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_file_is_refused(encoder: Trained, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "gate"
    shutil.copytree(encoder.folder, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256"):
        PolicyGate(folder)


def test_a_file_that_was_put_beside_the_weights_is_refused(encoder: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "gate"
    shutil.copytree(encoder.folder, folder)
    (folder / "README.md").write_text("A card does no harm.")
    PolicyGate(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds 'adapter_config\.json'"):
        PolicyGate(folder)


def test_nothing_is_pickled(encoder: Trained) -> None:
    assert not [path.name for path in encoder.folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_only_a_decision_lm_meets_new_tools(encoder: Trained) -> None:
    with pytest.raises(ConfigurationError, match="one head for each tool"):
        PolicyGate(encoder.folder, new_tools=True)


def test_a_model_that_is_not_there_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such folder"):
        EncoderPolicy(model=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        EncoderPolicy(model=str(tmp_path))
