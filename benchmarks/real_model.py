"""A real model on real servers: does it answer directly, is a forced call run, are log-probabilities the model's own?

    python benchmarks/real_model.py --openai URL --served URL --vllm URL --folder FOLDER --model NAME

Each argument adds what it names, and what has none is left out: `--openai` and `--served` any OpenAI-compatible server
(vLLM, llama.cpp, `transformers serve`), `--vllm` a vLLM server, `--folder` what `save_pretrained` wrote, which
`LocalChatModel` runs and the log-probabilities of both are compared with. Forty easy questions, answered with a gate
that says "answer"; twenty sums, with a gate that forces the Python tool; then log-probabilities of free, forced and
banned replies against those of a plain forward pass. Prints JSON, with nothing where no argument is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from pydantic import SecretStr

from metis_agent.agent import create_metis_agent
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollout, Rollouts
from metis_agent.rules.budget import Budget
from metis_agent.tools.python import PythonTool
from metis_agent.types import TOKEN_RECORD, Question, Trajectory

SUMS = [(a, b) for a, b in zip((7, 12, 3, 25, 8, 14, 40, 6, 31, 9), (9, 5, 4, 10, 8, 3, 20, 7, 8, 11), strict=True)]
FACTS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Denmark": "Copenhagen", "Finland": "Helsinki",
    "Ireland": "Dublin", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Thailand": "Bangkok", "Iran": "Tehran",
    "Iraq": "Baghdad", "Hungary": "Budapest", "Ukraine": "Kyiv", "Chile": "Santiago", "Belgium": "Brussels",
    "Turkey": "Ankara", "India": "Delhi", "England": "London",
}  # fmt: skip
EASY = [
    *(Question(id=f"{a}+{b}", text=f"What is {a} + {b}? Answer with the number.", answer=str(a + b)) for a, b in SUMS),
    *(
        Question(id=country, text=f"What is the capital of {country}? Answer with its name.", answer=capital)
        for country, capital in FACTS.items()
    ),
]
LARGE = [
    Question(id=f"{a}*{b}", text=f"What is {a} * {b}? Use the tool.", answer=str(a * b))
    for a, b in ((1234 + 17 * place, 5678 + 31 * place) for place in range(20))
]
BRANCHES = {"direct": "direct", "forced": "tool"}


def main() -> int:
    options = arguments()
    chats = models(options)
    if not chats:
        print("nothing to measure: give --openai, --served, --vllm or --folder; see the head of this file")
        return 0
    shown: dict[str, Any] = {}
    for name, chat in chats.items():
        shown[name] = measured(chat, LARGE[: options.forced], options.concurrency)
        print(json.dumps({name: shown[name]}), file=sys.stderr)
    if options.folder:
        shown["log_probs"] = {
            name: log_probs(chats[name], options.folder) for name in ("local", "vllm") if name in chats
        }
    print(json.dumps(shown, indent=2))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openai", metavar="URL", help="for ChatOpenAI; ends in /v1")
    parser.add_argument("--served", metavar="URL", help="for ServedChatModel")
    parser.add_argument("--vllm", metavar="URL", help="for VLLMChatModel")
    parser.add_argument("--folder", help="of the model, for LocalChatModel and the comparison")
    parser.add_argument("--model", default="model", help="the name that the servers know")
    parser.add_argument("--forced", type=int, default=len(LARGE), help="questions whose call is forced")
    parser.add_argument("--tokens", type=int, default=128, help="of a reply, at most")
    parser.add_argument("--concurrency", type=int, default=4)
    return parser.parse_args()


def models(options: argparse.Namespace) -> dict[str, Any]:
    """What is to be measured, by name."""
    common = {"model": options.model, "temperature": 0.0, "max_tokens": options.tokens}
    chats: dict[str, Any] = {}
    if options.openai:
        from langchain_openai import ChatOpenAI

        chats["openai"] = ChatOpenAI(base_url=options.openai, api_key=SecretStr("none"), **common)
    if options.served:
        from metis_agent.models.served import ServedChatModel

        chats["served"] = ServedChatModel(base_url=options.served, **common)
    if options.vllm:
        from metis_agent.models.vllm import VLLMChatModel

        chats["vllm"] = VLLMChatModel(base_url=options.vllm, **common)
    if options.folder:
        from metis_agent.models.local import LocalChatModel

        chats["local"] = LocalChatModel.load(options.folder, temperature=0.0, max_new_tokens=options.tokens)
    return chats


def measured(chat: BaseChatModel, large: list[Question], concurrency: int) -> dict[str, Any]:
    """Of easy questions answered directly and of large products with a forced call: accuracy, and runs with a call."""

    def agent(gate: Any) -> Any:
        return create_metis_agent(chat, [PythonTool(images=False)], gate=gate, budget=Budget(calls=2))

    # All in one go, for an async client of OpenAI's belongs to one event loop.
    wanted = [Rollout(id=question.id, question=question, branch="direct", seed=0) for question in EASY]
    wanted += [Rollout(id=question.id, question=question, branch="tool", seed=0) for question in large]
    with tempfile.TemporaryDirectory() as folder:
        runs = Rollouts(agent, TrajectoryStore(folder), concurrency=concurrency).collect(wanted)
    parts = {name: [run for run in runs if run.branch == branch] for name, branch in BRANCHES.items()}
    return {name: summary(part) for name, part in parts.items() if part}


def summary(runs: list[Trajectory]) -> dict[str, Any]:
    right = [str(run.question.answer).casefold() in run.answer.casefold() for run in runs]
    return {
        "accuracy": sum(right) / len(runs),
        "called": sum(run.tool_calls > 0 for run in runs) / len(runs),
        "failed": sorted({run.error for run in runs if run.status != "finished"})[:3],
        "wrong": [run.answer[:80] for run, good in zip(runs, right, strict=True) if not good][:3],
        "seconds": round(sum(run.seconds for run in runs), 1),
    }


def log_probs(chat: Any, folder: str) -> Mapping[str, Any]:
    """The largest differences from a plain forward pass in the same dtype, and how many are above a hundredth."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tool = PythonTool(images=False)
    ask: dict[str, Callable[[str], AIMessage]] = {
        "free": chat.bind_tools([tool]).invoke,
        "forced": chat.bind_tools([tool], tool_choice="any").invoke,
        "banned": chat.bind_tools([tool], tool_choice="none").invoke,
    }
    found = {}
    for kind, invoke in ask.items():
        differences = []
        for question in (EASY[0], EASY[12], LARGE[0]):
            record = invoke(question.text).response_metadata[TOKEN_RECORD]
            ids = torch.tensor([record["prompt_ids"] + record["completion_ids"]])
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, len(record["prompt_ids"]) - 1 : -1].float()
            own = logits.log_softmax(-1).gather(1, ids[0, len(record["prompt_ids"]) :, None])[:, 0].tolist()
            differences += [abs(a - b) for a, b in zip(own, record["log_probs"], strict=True)]
        found[kind] = {
            "tokens": len(differences),
            "largest": round(max(differences), 4),
            "above_a_hundredth": sum(difference > 0.01 for difference in differences),
        }
    return found


if __name__ == "__main__":
    raise SystemExit(main())
