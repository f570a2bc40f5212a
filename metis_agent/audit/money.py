"""What model calls and tool calls cost, in dollars: a price file of the user's own, then `genai-prices`, then unknown.

An unknown price is never a price of nothing: such tokens are counted and said to be unpriced.
"""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metis_agent.errors import ConfigurationError

__all__ = ["Cost", "ModelPrice", "Prices"]

_PROVIDERS = {
    "azure_openai": "azure", "azure_ai": "azure", "bedrock": "aws", "bedrock_converse": "aws", "google_genai": "google",
    "google_vertexai": "google", "google_anthropic_vertex": "google", "mistralai": "mistral", "xai": "x-ai",
}  # fmt: skip
"""LangChain's names of providers, where `genai-prices` has another."""


class ModelPrice(BaseModel):
    """Dollars a million tokens."""

    model_config = ConfigDict(extra="forbid")

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cache_read: float | None = Field(default=None, ge=0)
    """Input tokens that the provider had cached; as `input` where it isn't given."""


class _PriceFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    models: dict[str, ModelPrice] = {}
    tools: dict[str, float] = {}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Dollars of one model call, by what it read and what it wrote."""

    read: float
    written: float

    @property
    def total(self) -> float:
        """Both."""
        return self.read + self.written


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of models and tools.

    Args:
        models: The user's own prices, by model name; they come first.
        tools: Dollars a call, by tool; they replace what tools declare.
    """

    models: Mapping[str, ModelPrice] = field(default_factory=dict)
    tools: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None, tools: Mapping[str, float] | None = None) -> Prices:
        """Prices from a .json or .toml file.

        It holds `models`, a table of name to `input`, `output` and `cache_read` in dollars a million tokens, and
        `tools`, a table of name to dollars a call.

        Args:
            path: The file; without one only `genai-prices` is asked.
            tools: Dollars a call; they come before the file's.

        Raises:
            ConfigurationError: the file can't be read, or holds something else.
        """
        if path is None:
            return cls(tools=dict(tools or {}))
        try:
            text = path.read_text("utf-8")
            parsed = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
            found = _PriceFile.model_validate(parsed)
        except (OSError, ValueError) as error:  # JSON, TOML and pydantic errors are ValueErrors
            said = _first_fault(error) if isinstance(error, ValidationError) else str(error)
            raise ConfigurationError(
                f'the price file {str(path)!r} can\'t be used: {said}. It holds {{"models": {{"NAME": {{"input": 1.25, '
                '"output": 10}}, "tools": {"NAME": 0.005}}: dollars a million tokens, and dollars a call.'
            ) from error
        return cls(models=found.models, tools={**found.tools, **(tools or {})})

    def of_call(self, model: str, usage: Mapping[str, int]) -> Cost | None:
        """Dollars of one model call, or `None` where the model's price is unknown.

        Args:
            model: Its name, with or without LangChain's name of the provider before a colon.
            usage: Tokens as LangChain counts them: `input_tokens` (cached ones included), `output_tokens`,
                `input_cache_read`, `input_cache_creation`.
        """
        _, _, bare = model.rpartition(":")
        own = self.models.get(model) or self.models.get(bare)
        read, written = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
        cached = min(usage.get("input_cache_read", 0), read)
        if own is not None:
            cheap = own.input if own.cache_read is None else own.cache_read
            dollars = (read - cached) * own.input + cached * cheap
            return Cost(read=dollars / 1e6, written=written * own.output / 1e6)
        return self._by_package(model, read, written, cached, usage.get("input_cache_creation", 0))

    def of_tool(self, tool: str, declared: float) -> float:
        """Dollars of one tool call."""
        return self.tools.get(tool, declared)

    def _by_package(self, model: str, read: int, written: int, cached: int, kept: int) -> Cost | None:
        if self._package is None or not model:
            return None
        provider, _, bare = model.rpartition(":")
        tokens = self._package.Usage(
            input_tokens=read, output_tokens=written, cache_read_tokens=cached, cache_write_tokens=kept
        )
        for provider_id in dict.fromkeys((_PROVIDERS.get(provider, provider) or None, None)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = self._package.calc_price(tokens, model_ref=bare, provider_id=provider_id)
            except (LookupError, ValueError):
                continue
            return Cost(read=float(found.input_price), written=float(found.output_price))
        return None

    @cached_property
    def _package(self) -> Any:
        try:
            import genai_prices
        except ImportError:
            return None
        return genai_prices


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
