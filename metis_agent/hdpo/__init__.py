"""HDPO: from recorded trajectories to a gate or a policy that calls a tool only where it helps.

In flow order: `verifiers` -> `rewards` -> `advantages` -> `loss`; `exploration` says how a group's rollouts
start, `evaluation` what came of the training. Import from those modules: this package imports nothing, so
that reading a verifier does not cost an import of torch. The runtime never imports it.

Source: "Act Wisely: Cultivating Meta-Cognitive Tool Use in Agentic Multimodal Models", arXiv:2604.08545.
"""

__all__: list[str] = []
