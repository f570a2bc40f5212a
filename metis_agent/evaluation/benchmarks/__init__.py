"""The paper's benchmarks: public data sets, their own scoring rules, and what the tools had to do with it.

Which is which: `rows` finds and reads a data set, a file a benchmark says what is asked and when an answer is right,
`run` rolls the agent out, records it and scores it. Needs the `train` extra (`datasets`) and `images`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from metis_agent.errors import ConfigurationError

if TYPE_CHECKING:
    from metis_agent.evaluation.benchmarks.base import Benchmark

__all__ = ["BENCHMARKS", "benchmark_named", "register_benchmark"]


def benchmark_named(name: str, **options: Any) -> Benchmark:
    """A benchmark.

    Args:
        name: One of `BENCHMARKS`.
        **options: For the benchmark, such as `extract` of "mathvista".

    Raises:
        ConfigurationError: another name.
    """
    if name not in BENCHMARKS:
        raise ConfigurationError(f"unknown benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name](**options)


def register_benchmark(name: str, make: Callable[..., Benchmark]) -> None:
    """Make a benchmark of one's own known by a name: `benchmark_named(name, **options)` is then `make(**options)`.

    Raises:
        ConfigurationError: the name is another's.
    """
    if BENCHMARKS.get(name, make) is not make:
        raise ConfigurationError(
            f"There is a benchmark {name!r} already; take a name that is none of {list(BENCHMARKS)!r}."
        )
    BENCHMARKS[name] = make


def _packaged(module: str, class_: str, *arguments: Any) -> Callable[..., Benchmark]:
    def make(**options: Any) -> Benchmark:
        found = getattr(import_module(f"metis_agent.evaluation.benchmarks.{module}"), class_)
        benchmark: Benchmark = found(*arguments, **options)
        return benchmark

    return make


BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "vstar": _packaged("options", "VStar"),
    "hrbench": _packaged("options", "HRBench", ("4k", "8k")),
    "hrbench-4k": _packaged("options", "HRBench", ("4k",)),
    "hrbench-8k": _packaged("options", "HRBench", ("8k",)),
    "wemath": _packaged("options", "WeMath"),
    "mathvista": _packaged("mathvista", "MathVista"),
}
"""What makes each, by the name that `benchmark_named` knows; "hrbench" is both resolutions."""
