"""From outcomes to a gate that serves, by the Python interface."""

import random

import numpy as np

from metis_agent import HDPOConfig, HDPOTrainer, PolicyGate
from metis_agent.evaluation.gates import score_table
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import train_gate
from metis_agent.hdpo.settings import GateTraining
from metis_agent.rollouts.outcomes import OutcomeTable

assert HDPOConfig.__module__.startswith("metis_agent.")
assert HDPOTrainer.__module__.startswith("metis_agent.")

dice = random.Random(0)
sums = [f"What is {dice.randint(1000, 9999)} times {dice.randint(1000, 9999)}?" for _ in range(60)]
chat = [f"Say hello to number {number}, please." for number in range(60)]
right = np.array([[0.0, 1.0]] * 60 + [[1.0, 1.0]] * 60)
right[::20, 1] = 0.0  # a tool that never fails is refused: there would be nothing to predict
table = OutcomeTable(
    questions=(*sums, *chat), actions=("direct", "python"), correct=right,
    cost=np.tile([0.0, 1.0], (120, 1)), seconds=np.full((120, 2), np.nan),
)  # fmt: skip
trained = train_gate(table, GateTraining(folds=2))
write_artefact(trained, "gate", table=table, metrics={})
gate = PolicyGate("gate")
scored = score_table(gate, table)
assert (scored.direct_right[60:].mean() - scored.direct_right[:60].mean()) > 0.5, scored.direct_right
