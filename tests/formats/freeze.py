"""Makes the frozen samples of every format on disk: `python -m tests.formats.freeze [--unreleased]`.

A sample that is there is never changed: it stands for what users have on their disks. When a version is raised, this
writes the sample of the new one beside the old. `--unreleased` makes those of the newest versions again, for a format
that nobody has yet. Gates are kept as text: their files packed with gzip and base64, with what they answer.
"""

from __future__ import annotations

import base64
import gzip
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from metis_agent import formats
from metis_agent.curation.pipeline import Mark
from metis_agent.curation.prompts import question_line
from metis_agent.curation.sft import MARK
from metis_agent.gates import artefact
from metis_agent.recording import schema
from metis_agent.types import GateDecision, ModelCall, Question, ToolOutcome, Trajectory

SAMPLES = Path(__file__).with_name("samples")
ASKED = ("Compute the sum of a", "Find the river of b", "Say hello to the guest of c")
"""What the frozen gates are asked."""

QUESTION = Question(
    id="q1", text="What is 4821 * 7310?", answer="35241510", verifier="numeric", kind="product",
    metadata={"context": "", "page": 3},
)  # fmt: skip
WHOLE = Trajectory(
    id="run/q1/tool", question=QUESTION, branch="tool", answer="35241510",
    messages=(
        {"type": "human", "data": {"content": QUESTION.text}},
        {"type": "ai", "data": {"content": "", "tool_calls": [{"name": "python", "args": {"code": "1"}, "id": "c1"}]}},
    ),
    calls=(
        ModelCall(
            node="act", step=1, text="<tool_call>", tool_calls=({"name": "python", "args": {"code": "1"}, "id": "c1"},),
            prompt_ids=(1, 2, 3), completion_ids=(4, 5), log_probs=(-0.25, float("-inf")), forced=1, continues=True,
            sampling={"temperature": 1.0, "top_p": 0.9}, weights_version="step-3", template_hash="abc",
            usage={"input_tokens": 3},
        ),
    ),
    decisions=(
        GateDecision(
            allowed=("python",), required=True, probabilities={"python": 0.875}, threshold=0.5, gate="policy",
            version="0123456789ab", reason="", seconds=0.001, propensity=0.95, shadow={"allowed": []},
        ),
    ),
    outcomes=(
        ToolOutcome(
            call_id="c1", tool="python", arguments={"code": "print(4821 * 7310)"}, status="ok", content="35241510",
            seconds=0.5, cost=0.01,
        ),
    ),
    seconds=1.5, started_at=1_750_000_000.0, metadata={"model": "almanac", "forced": "python"},
)  # fmt: skip
"""A trajectory with a value in every field."""
MARKED = replace(WHOLE, id="run/q1/direct", metadata={MARK: vars(Mark(stage="sound", reason="no answer", detail="x"))})
FAILED = Trajectory(id="run/q1/free", question=QUESTION, status="failed", error="the server went away")


def trajectories() -> str:
    """Whole, quarantined, failed."""
    return "".join(f"{schema.dumps(each)}\n" for each in (WHOLE, MARKED, FAILED))


TOOLED = replace(
    WHOLE, id="run/q1/tools",
    tools=(
        {
            "type": "function", "read_only": True,
            "function": {"name": "python", "description": "Runs.", "parameters": {"type": "object", "properties": {}}},
        },
    ),
)  # fmt: skip
"""A trajectory that says which tools were on offer: a store keeps them beside its lines."""


def store() -> str:
    """The files of a store, by name."""
    from metis_agent.recording.store import TrajectoryStore

    with tempfile.TemporaryDirectory() as scratch:
        with TrajectoryStore(scratch) as kept:
            kept.append(TOOLED)
        files = [path for path in Path(scratch).rglob("*") if path.is_file()]
        named = {path.relative_to(scratch).as_posix(): path.read_text() for path in sorted(files, reverse=True)}
        (shard,) = kept.shards()
    return json.dumps({name.replace(shard, "segment-1.jsonl"): text for name, text in named.items()}, indent=1) + "\n"


def questions() -> str:
    """As curation keeps them, and as it sets them aside."""
    mark = vars(Mark(stage="mix", reason="all right", detail="3 of 3"))
    return "\n".join((question_line(QUESTION, rollouts={"right": 3}), question_line(QUESTION, **{MARK: mark}))) + "\n"


def gate(kind: str) -> str:
    """A tiny gate of that kind."""
    from metis_agent.gates.policy import PolicyGate
    from metis_agent.hdpo.export import set_threshold, write_artefact
    from metis_agent.hdpo.gate_trainer import train_gate
    from metis_agent.hdpo.settings import GateTraining
    from tests.hdpo.policies.tiny import planted

    with tempfile.TemporaryDirectory() as scratch:
        folder, table = Path(scratch) / "gate", planted(60)
        training = GateTraining(beta=0.2, folds=2)
        write_artefact(train_gate(table, training, policy=_policy(kind, scratch)), folder, table=table, metrics={})
        note = {"value": 0.25, "chosen": "frozen", "reference": {"direct": [0.1, 0.5], "tools": [[0.2, 0.7]]}}
        set_threshold(folder, note)
        loaded = PolicyGate(folder)
        files = {path.name: _packed(path.read_bytes()) for path in sorted(folder.iterdir())}
        answers = {question: [loaded.score(question)[0], loaded.score(question)[1]] for question in ASKED}
    return json.dumps({"answers": answers, "files": files}, indent=1) + "\n"


def _policy(kind: str, scratch: str) -> Any:
    from metis_agent.hdpo.policies.decision_lm import DecisionLMPolicy
    from metis_agent.hdpo.policies.encoder import EncoderPolicy
    from metis_agent.hdpo.policies.features import FeaturesPolicy
    from metis_agent.hdpo.settings import GradientTraining
    from tests.hdpo.policies.tiny import DESCRIPTIONS

    quick = GradientTraining(epochs=1, batch_size=8, learning_rate=2e-3, patience=1)
    if kind == "encoder":
        return EncoderPolicy(model=_bert(f"{scratch}/model"), training=quick)
    if kind == "decision_lm":
        return DecisionLMPolicy(model=_qwen(f"{scratch}/model"), descriptions=DESCRIPTIONS, training=quick)
    return FeaturesPolicy()


def _bert(folder: str) -> str:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from tests.hdpo.policies.tiny import tokenizer

    torch.manual_seed(0)
    words = tokenizer(chat=False)
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=64, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _qwen(folder: str) -> str:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.hdpo.policies.tiny import tokenizer

    torch.manual_seed(0)
    words = tokenizer(chat=True)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def evaluation() -> str:
    """What `metis evaluate gate --json` writes."""
    from metis_agent.cli.output import write_json
    from metis_agent.evaluation.gates import Scored, evaluate_gate
    from tests.hdpo.policies.tiny import planted

    table = planted(60)
    need = table.correct[:, 1:] * 0.6 + 0.2
    figures = evaluate_gate(Scored(direct_right=1 - need[:, 0], probabilities=need), table, 0.5, resamples=20)
    with tempfile.TemporaryDirectory() as scratch:
        write_json(path := Path(scratch) / "figures.json", figures)
        return path.read_text()


def history() -> str:
    """What `metis demo` writes, cut down to what is read again."""
    entry = {"step": 1, "hdpo/accuracy": 0.9, "hdpo/tool_rate": 0.5, "hdpo/rho": 0.25}
    return json.dumps(formats.with_format({"history": [entry], "seed": 0}, formats.FIGURES), indent=2) + "\n"


def cache() -> str:
    """The cache of curation, as SQL."""
    import sqlite3

    from metis_agent.sqlite import DiskCache

    with tempfile.TemporaryDirectory() as scratch:
        with DiskCache(path := Path(scratch) / "cache.sqlite") as kept:
            kept.put("key", {"verdict": True, "why": "as the rubric says"})
        connection = sqlite3.connect(path)
        statements = [*connection.iterdump(), f"PRAGMA user_version = {formats.CACHE};"]
        connection.close()
    return "\n".join(statements) + "\n"


MAKERS: dict[str, Callable[[], str]] = {
    f"trajectory-{schema.SCHEMA_VERSION}.jsonl": trajectories,
    f"store-{schema.SCHEMA_VERSION}.json": store,
    f"questions-{formats.QUESTIONS}.jsonl": questions,
    f"gate-features-{artefact.FORMAT}.json": lambda: gate("features"),
    f"gate-encoder-{artefact.FORMAT}.json": lambda: gate("encoder"),
    f"gate-decision_lm-{artefact.FORMAT}.json": lambda: gate("decision_lm"),
    f"evaluation-{formats.FIGURES}.json": evaluation,
    f"history-{formats.FIGURES}.json": history,
    f"cache-{formats.CACHE}.sql": cache,
}
"""By file, of the versions that this tree writes."""


def unpack(sample: Path, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Write a frozen gate to a folder; returns what it answered when it was frozen."""
    frozen = json.loads(sample.read_text())
    folder.mkdir(parents=True)
    for name, content in frozen["files"].items():
        (folder / name).write_bytes(gzip.decompress(base64.b64decode(content)))
    answers: dict[str, list[dict[str, float]]] = frozen["answers"]
    return answers


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def main() -> None:
    SAMPLES.mkdir(exist_ok=True)
    for name, make in MAKERS.items():
        path = SAMPLES / name
        if not path.exists() or "--unreleased" in sys.argv[1:]:
            path.write_text(make())
            print(f"{name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
