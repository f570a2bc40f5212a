"""One trained gate of each kind, for all tests here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import TrainedGate, train_gate
from metis_agent.hdpo.policies import Policy
from metis_agent.hdpo.policies.decision_lm import DecisionLMPolicy
from metis_agent.hdpo.policies.encoder import EncoderPolicy
from metis_agent.hdpo.settings import GateTraining, GradientTraining
from metis_agent.rollouts.outcomes import OutcomeTable
from tests.hdpo.policies.tiny import DESCRIPTIONS, planted, save_bert, save_qwen
from tests.one_thread import one_thread as one_thread

# A price above what the estimates of a small table are off by.
TRAINING = GateTraining(beta=0.2, folds=2)


@dataclass(frozen=True, kw_only=True)
class Trained:
    table: OutcomeTable
    gate: TrainedGate
    folder: Path


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory, bert: str) -> Trained:
    training = GradientTraining(epochs=12, batch_size=8, learning_rate=2e-3, patience=4)
    policy = EncoderPolicy(model=bert, training=training)
    return trained(planted(200, context=True), policy, tmp_path_factory.mktemp("encoder") / "gate")


@pytest.fixture(scope="session")
def decision_lm(tmp_path_factory: pytest.TempPathFactory, qwen: str) -> Trained:
    training = GradientTraining(epochs=10, batch_size=8, learning_rate=3e-3, patience=10)
    policy = DecisionLMPolicy(model=qwen, descriptions=DESCRIPTIONS, training=training)
    return trained(planted(200), policy, tmp_path_factory.mktemp("decision_lm") / "gate")


def trained(table: OutcomeTable, policy: Policy, folder: Path) -> Trained:
    gate = train_gate(table, TRAINING, policy=policy)
    write_artefact(gate, folder, table=table, metrics={})
    return Trained(table=table, gate=gate, folder=folder)
