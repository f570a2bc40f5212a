"""The whole idea in one file: question -> gate -> tool or answer -> rewards -> advantages -> loss -> step.

A small model knows the sums of numbers below 10 by heart, and its gate calls a calculator for everything. HDPO teaches
the gate, from rollouts alone, to call only for what the model does not know; so does the decision contrast. PyTorch and
LangGraph, a minute. `metis_agent.hdpo` has each step in full; source of HDPO: arXiv:2604.08545.
"""

import random
from typing import TypedDict

import torch
from langgraph.graph import END, START, StateGraph
from torch import Tensor, nn

DIRECT, TOOL = 0, 1
P, STEPS = 12, 25  # questions a step, steps
BRANCHES = [DIRECT, DIRECT, TOOL, TOOL, None, None]  # a group's G rollouts: two forced down each branch, two free
W_ACC, W_TOOL, CLIP, EPS = 1.0, 0.5, 0.2, 1e-4  # the paper's w_tool is 0.15, for longer training
PRICE, ODDS = 0.5, 6.0  # of the contrast: the accuracy that a call may cost, and log-odds at which a decision is made
SMALL, LARGE = ([(a, b) for a in numbers for b in numbers] for numbers in (range(10), range(10, 100)))


class Policy(nn.Module):
    """Reads a + b as four digits: `gate` decides, direct or tool, and `memory` answers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(40, 2)
        self.memory = nn.Sequential(nn.Linear(40, 128), nn.ReLU(), nn.Linear(128, 199))

    def forward(self, questions: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities: [B, 2] of the decision, [B, 199] of the answer."""
        digits = torch.tensor([[a // 10, a % 10, b // 10, b % 10] for a, b in questions])
        x = nn.functional.one_hot(digits, 10).flatten(1).float()
        return self.gate(x).log_softmax(-1), self.memory(x).log_softmax(-1)


def cold_start(policy: Policy) -> None:
    """What supervised fine-tuning leaves behind: small sums known by heart, a call for four questions of five."""
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    for _ in range(150):
        decision, answer = policy(SMALL + random.sample(LARGE, 100))
        recalled = nn.functional.nll_loss(answer[: len(SMALL)], torch.tensor([a + b for a, b in SMALL]))
        step(optimizer, recalled - (0.2 * decision[:, DIRECT] + 0.8 * decision[:, TOOL]).mean())


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class State(TypedDict, total=False):
    question: tuple[int, int]
    greedy: bool
    forced: int | None  # the branch to go down, whatever the gate says
    decision: int
    observation: int
    answer: int
    T: int  # calls


def agent(policy: Policy):
    """question -> gate -> (tool ->) answer."""

    def gate(state: State) -> State:
        forced = state.get("forced")
        return {"decision": choose(policy([state["question"]])[0], state) if forced is None else forced, "T": 0}

    def tool(state: State) -> State:
        return {"observation": sum(state["question"]), "T": state["T"] + 1}

    def answer(state: State) -> State:
        return {"answer": state["observation"] if state["T"] else choose(policy([state["question"]])[1], state)}

    def choose(log_probs: Tensor, state: State) -> int:
        return int(log_probs.argmax() if state.get("greedy") else torch.multinomial(log_probs.exp(), 1))

    graph = StateGraph(State).add_node(gate).add_node(tool).add_node(answer).add_edge(START, "gate")
    graph.add_conditional_edges("gate", lambda state: "tool" if state["decision"] == TOOL else "answer")
    return graph.add_edge("tool", "answer").add_edge("answer", END).compile()


def normalised(r: Tensor, among: Tensor) -> Tensor:
    """(r - mean) / (std + eps) of each row [G] over the rollouts in `among`; 0 elsewhere, and where all are equal."""
    n = among.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(among, r - (r * among).sum(1, keepdim=True) / n, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    return torch.where(std > 1e-6, centred / (std + EPS), 0.0)


def clipped(log_probs: Tensor, old: Tensor, A: Tensor) -> Tensor:
    """PPO's surrogate over the decisions of all rollouts, [P * G]."""
    ratio = (log_probs - old).exp()
    return -torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A).mean()


def hinge(J: Tensor, called: Tensor, log_probs: Tensor) -> Tensor:
    """|Delta| relu(m - sign(Delta) l): Delta is what a call is worth, between branch means, and l its log-odds."""
    Delta = (J * called).sum(1) / called.sum(1) - (J * ~called).sum(1) / (~called).sum(1)  # both branches are forced
    return (Delta.abs() * (ODDS - Delta.sign() * (log_probs[:, TOOL] - log_probs[:, DIRECT])).relu()).mean()


def train_step(policy: Policy, optimizer: torch.optim.Optimizer, questions: list, contrast: bool) -> None:
    """A group of rollouts for each question, then two passes over what they teach."""
    graph = agent(policy)
    with torch.no_grad():
        rollouts = [graph.invoke({"question": q, "forced": b}) for q in questions for b in BRANCHES]
    correct = torch.tensor([r["answer"] == sum(r["question"]) for r in rollouts]).view(len(questions), -1)  # [P, G]
    T = torch.tensor([r["T"] for r in rollouts]).view_as(correct)
    r_acc, r_tool = correct.float(), torch.where(correct, 1 / (T + 1), 0.0)
    A_acc = normalised(r_acc, torch.ones_like(correct)).flatten()  # among all: this alone is GRPO
    A_tool = normalised(r_tool, correct).flatten()  # among the correct alone: thrift can't excuse a wrong answer
    chosen, old = torch.tensor([[r["decision"]] for r in rollouts]), None
    for _ in range(2):
        new = policy([r["question"] for r in rollouts])[0].gather(1, chosen).flatten()
        old = new.detach() if old is None else old
        hdpo = W_ACC * clipped(new, old, A_acc) + W_TOOL * clipped(new, old, A_tool)
        step(optimizer, hinge(r_acc + PRICE * r_tool, T > 0, policy(questions)[0]) if contrast else hdpo)


@torch.no_grad()
def measure(policy: Policy, questions: list[tuple[int, int]]) -> dict[str, float]:
    """Accuracy, and how often it calls where it knows the answer (redundant) and where it does not (necessary)."""
    run = agent(policy).invoke
    free, alone = ([run({"question": q, "greedy": True, "forced": b}) for q in questions] for b in (None, DIRECT))
    right, knows = (torch.tensor([float(r["answer"] == sum(r["question"])) for r in runs]) for runs in (free, alone))
    T, known = torch.tensor([float(r["T"]) for r in free]), knows > 0
    return {"accuracy": right.mean().item(), "redundant": T[known].mean().item(), "necessary": T[~known].mean().item()}


def main(seed: int = 0, contrast: bool = False, rate: float = 3.0) -> tuple[dict[str, float], dict[str, float]]:
    """Train; print and return the figures of before and after, on questions that training never saw."""
    random.seed(seed)
    torch.manual_seed(seed)
    small, large = random.sample(SMALL, 100), random.sample(LARGE, 1000)
    cold_start(policy := Policy())
    before = measure(policy, held_out := small[:40] + large[:40])
    optimizer = torch.optim.SGD(policy.gate.parameters(), lr=rate)
    for _ in range(STEPS):
        train_step(policy, optimizer, random.sample(small[40:], P // 2) + random.sample(large[40:], P // 2), contrast)
    after = measure(policy, held_out)
    print(*(f"{name:10} {before[name]:.2f} -> {after[name]:.2f}" for name in before), sep="\n")
    return before, after


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    main(contrast=True)
