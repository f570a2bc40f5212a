"""One function over many parts (a store's shards, the files of a spool): here, one after another, or on a Ray cluster.

The parts and their order are the same either way, so the result is too, to the byte. What runs elsewhere only reads;
what is written is written here. So a worker that dies costs its part's work, which Ray does again, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from metis_agent.errors import ConfigurationError, MissingDependencyError

__all__ = ["spread"]

A = TypeVar("A")
B = TypeVar("B")


def spread(
    function: Callable[[A], Iterable[B]], parts: Sequence[A], *, ray: str | None = None
) -> Iterator[Iterable[B]]:
    """Yield what the function makes of each part, in the parts' order.

    Args:
        function: Reads a part. On Ray it is sent to the workers, with what is bound to it; they must see the
            same files.
        parts: What there is to read.
        ray: Address of a Ray cluster: "auto", "HOST:PORT" or "ray://HOST:PORT"; "local" starts one on this machine. By
            default all runs in this process, each part only as far as its results are taken.

    Raises:
        MissingDependencyError: the `ray` extra is not installed.
        ConfigurationError: there is no cluster at the address.
    """
    if ray is None or not parts:
        yield from map(function, parts)
        return
    from pickle import dumps, loads

    with ExitStack() as stack:
        data = _connected(ray, stack)

        def made(row: dict[str, Any]) -> dict[str, Any]:
            return {"made": dumps(list(function(loads(row["part"]))))}

        rows = data.from_items([{"part": dumps(part)} for part in parts], override_num_blocks=len(parts)).map(made)
        for row in rows.iter_rows():
            yield loads(row["made"])


def _connected(address: str, stack: ExitStack) -> Any:
    """Ray's data library, connected; what was started or joined here is left at the end."""
    try:
        import ray
        from ray import data
    except ImportError as missing:
        raise MissingDependencyError(
            f"--ray {address!r} needs the extra `ray`: pip install 'langgraph-metis[ray]'"
        ) from missing
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except Exception as error:  # of grpc, of Ray, of the operating system
            raise ConfigurationError(
                f"there is no Ray cluster at {address!r}: {error}. Name a running one (`ray start --head`, then auto), "
                "or local for one on this machine."
            ) from error
        stack.callback(ray.shutdown)
    context = data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    return data
