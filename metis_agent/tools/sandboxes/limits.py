"""How much a session may use."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metis_agent.errors import ConfigurationError

__all__ = ["SandboxLimits"]

_MB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """Limits of one session.

    Raises:
        ConfigurationError: a value is not a number in its range.
    """

    seconds: float = 10.0
    """Wall-clock time of one call, in seconds."""
    memory_mb: int = 512
    """Address space beyond what the interpreter and its packages take, in MiB."""
    processes: int = 32
    """Threads, the main one included (Linux counts a thread as a process). New processes never start."""
    disk_mb: int = 64
    """All files of the session together, and the largest one, in MiB."""
    output_bytes: int = 16_384
    """Kept of stdout, of stderr, of the traceback and of the result, each, in bytes of UTF-8."""
    images: int = 4
    """Figures and images that come back from one call; 0 for none."""
    image_pixels: int = 2_000_000
    """Width times height of each of them; a larger one is made smaller."""

    def __post_init__(self) -> None:
        _check_seconds(self.seconds)
        for name, least, most in (
            ("memory_mb", 16, 1 << 20),
            ("processes", 1, 4096),
            ("disk_mb", 1, 1 << 20),
            ("output_bytes", 256, 64 * _MB),
            ("images", 0, 64),
            ("image_pixels", 256, 16_000_000),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigurationError(
                    f"SandboxLimits({name}={value!r}): it must be a whole number from {least} to {most}. "
                    f"The default is {type(self).__dataclass_fields__[name].default}."
                )


def _check_seconds(value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and 0 < value <= 86_400):  # type: ignore[arg-type, operator]
        raise ConfigurationError(
            f"SandboxLimits(seconds={value!r}): it must be a number of seconds above 0 and up to 86400 (a day)."
        )
