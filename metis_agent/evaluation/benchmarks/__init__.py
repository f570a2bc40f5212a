"""The paper's benchmarks: public data sets, their own scoring rules, and what the tools had to do with it.

Which is which: `rows` finds and reads a data set, a file a benchmark says what is asked and when an answer is right,
`run` rolls the agent out and records it, `scores` puts intervals to the figures.
Needs the `train` extra (`datasets`) and `images`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metis_agent.errors import ConfigurationError

if TYPE_CHECKING:
    from metis_agent.evaluation.benchmarks.base import Benchmark

__all__ = ["BENCHMARKS", "benchmark_named"]

BENCHMARKS = ("vstar", "hrbench", "hrbench-4k", "hrbench-8k", "wemath", "mathvista")
"""The names that `benchmark_named` knows; "hrbench" is both resolutions."""


def benchmark_named(name: str, **options: Any) -> Benchmark:
    """A benchmark.

    Args:
        name: One of `BENCHMARKS`.
        **options: For the benchmark, such as `extract` of "mathvista".

    Raises:
        ConfigurationError: another name.
    """
    if name == "vstar":
        from metis_agent.evaluation.benchmarks.vstar import VStar

        return VStar(**options)
    if name in ("hrbench", "hrbench-4k", "hrbench-8k"):
        from metis_agent.evaluation.benchmarks.hrbench import HRBench

        return HRBench(("4k", "8k") if name == "hrbench" else (name.removeprefix("hrbench-"),), **options)
    if name == "wemath":
        from metis_agent.evaluation.benchmarks.wemath import WeMath

        return WeMath(**options)
    if name == "mathvista":
        from metis_agent.evaluation.benchmarks.mathvista import MathVista

        return MathVista(**options)
    raise ConfigurationError(f"unknown benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}.")
