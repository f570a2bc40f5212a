"""Gates that need no training: the model decides, always a tool, never a tool, and forced rollout branches.

`ModelGate` is the agent's default, and the right one for a self-gating model; the others are the baselines
that a trained gate has to beat, and the branches of stratified rollouts.
"""

from metis_agent.errors import ConfigurationError
from metis_agent.gates.base import Gate
from metis_agent.turns import is_first_step, turn_of
from metis_agent.types import Branch, GateDecision, GateRequest

__all__ = ["AlwaysGate", "BranchGate", "ModelGate", "NeverGate"]


class _InstantGate(Gate):
    """A gate that decides without work, so that an async run needs no thread for it."""

    def __init__(self, *, name: str = "", version: str = "") -> None:
        super().__init__(name=name, version=version)

    async def adecide(self, request: GateRequest) -> GateDecision:
        return self.decide(request)

    def _allow_all(self, request: GateRequest, *, required: bool = False) -> GateDecision:
        allowed = tuple([tool.name for tool in request.tools])
        return GateDecision(allowed=allowed, required=required and bool(allowed), gate=self.name, version=self.version)


class ModelGate(_InstantGate):
    """Every tool within budget is allowed: the model itself decides."""

    def decide(self, request: GateRequest) -> GateDecision:
        """Allow everything."""
        return self._allow_all(request)


class NeverGate(_InstantGate):
    """No tool, ever."""

    def decide(self, request: GateRequest) -> GateDecision:
        """Allow nothing."""
        return GateDecision(allowed=(), gate=self.name, version=self.version)


class AlwaysGate(_InstantGate):
    """A tool has to be called at the first step of every turn; after that the model decides."""

    def decide(self, request: GateRequest) -> GateDecision:
        """Allow everything; require a call at the first step."""
        return self._allow_all(request, required=is_first_step(turn_of(request.messages)))


class BranchGate(_InstantGate):
    """How a rollout starts: "free" as `ModelGate`, "direct" as `NeverGate`, "tool" as `AlwaysGate`.

    With a `tool`, branch "tool" is that one's, decided as a trained gate decides: it alone is allowed in the whole
    turn, and has to be called at its first step.

    Source: stratified groups, which keep both branches in every group of rollouts.

    Raises:
        ConfigurationError: another branch, or a tool in a branch without one.
    """

    def __init__(self, branch: Branch, *, tool: str = "", version: str = "") -> None:
        super().__init__(name=f"branch:{branch}" + (f":{tool}" if tool else ""), version=version)
        gates = {"free": ModelGate, "direct": NeverGate, "tool": AlwaysGate}
        if branch not in gates:
            raise ConfigurationError(f"The branch is {branch!r}; it must be one of {sorted(gates)}.")
        if tool and branch != "tool":
            raise ConfigurationError(f"The branch is {branch!r} and the tool {tool!r}; only branch 'tool' has one.")
        self.branch, self.tool = branch, tool
        self._gate: _InstantGate = gates[branch](name=self.name, version=version)

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide as this branch's baseline does."""
        if not self.tool:
            return self._gate.decide(request)
        allowed = tuple([tool.name for tool in request.tools if tool.name == self.tool])
        required = bool(allowed) and is_first_step(turn_of(request.messages))
        return GateDecision(allowed=allowed, required=required, gate=self.name, version=self.version)
