"""Takes secrets out of what tools return, before a model reads it or a recorder keeps it.

Two ways: the values that are known (given, or held by the environment), exactly; and the shapes that keys,
tokens and passwords have. Shapes can't find every secret, so name the values that matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from metis_agent.errors import ConfigurationError

__all__ = ["REDACTED", "Redactor"]

REDACTED = "[redacted]"
_SHORTEST = 8
_DEEPEST = 50
_NAMED_SECRET = re.compile(r"(?i)(api_?key|access_?key|secret|token|password|passwd|credential)s?$")
_SHAPES = tuple(
    re.compile(shape)
    for shape in (
        r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----(?:[^-]|-(?!----)){0,10000}+"
        r"(?:-----END [A-Z ]{0,20}PRIVATE KEY-----)?",
        r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,200}",  # OpenAI, Anthropic and those who followed
        r"\b(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{10,200}",  # Stripe
        r"\b(?:gh[pousr]_[A-Za-z0-9]{20,255}|github_pat_\w{20,255}|glpat-[\w-]{20,100})",
        r"\b(?:hf|e2b|tvly|lsv2_pt|lsv2_sk|gsk|r8|xai)[_-][A-Za-z0-9_-]{16,200}",
        r"\bxox[abprse]-[A-Za-z0-9-]{10,200}",
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
        r"\bAIza[A-Za-z0-9_-]{35}",
        r"\beyJ[A-Za-z0-9_-]{10,4000}\.eyJ[A-Za-z0-9_-]{10,8000}\.[A-Za-z0-9_-]{0,2000}",  # JSON web tokens
    )
)
# What stands before a secret stays: it says what was taken out.
_AFTER = (
    re.compile(
        r"(?i)\b(bearer\s{1,5}|basic\s{1,5}|token\s{1,5})(?=[A-Za-z0-9._~+/=-]{0,200}\d)[A-Za-z0-9._~+/=-]{8,4000}"
    ),
    re.compile(
        r"(?i)((?:api[_-]?key|access[_-]?key|secret|token|password|passwd|authorization)[\"']?\s{0,5}[:=]\s{0,5}[\"']?)"
        r"(?=[^\s\"'&,;]{0,200}\d)[^\s\"'&,;\[]{8,4000}"
    ),
    re.compile(r"(?i)(\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{0,200}:)[^\s/@]{1,200}(?=@)"),  # a password in an address
)


class Redactor:
    """Replaces secrets by `[redacted]` in any text, and in the texts of lists, dicts and dataclasses.

    Args:
        secrets: values to take out wherever they stand; each of at least 8 characters.
        patterns: further regular expressions; what they match is taken out.
        environment: where to read values from whose names end in `API_KEY`, `TOKEN`, `SECRET`, `PASSWORD` and
            the like, such as `os.environ`; `None` for none.
        shapes: also take out what looks like a key, a token or a password.

    Raises:
        ConfigurationError: a secret is so short that words would be torn, or a pattern is none.
    """

    def __init__(
        self,
        *,
        secrets: Iterable[str] = (),
        patterns: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        shapes: bool = True,
    ) -> None:
        known = set(secrets)
        short = sum(len(secret) < _SHORTEST for secret in known)
        if short:  # the value itself has no place in a message
            raise ConfigurationError(
                f"{short} of the secrets have fewer than {_SHORTEST} characters; they would tear words. Leave them out."
            )
        for name, value in (environment or {}).items():
            if _NAMED_SECRET.search(name) and len(value) >= _SHORTEST:
                known.add(value)
        try:
            given = [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise ConfigurationError(f"pattern {error.pattern!r} is no regular expression: {error}.") from error
        exact = "|".join(re.escape(secret) for secret in sorted(known, key=len, reverse=True))
        self._patterns = [re.compile(exact)] if exact else []
        self._patterns += given
        self._shapes = shapes

    @classmethod
    def from_environment(cls) -> Redactor:
        """All shapes, and the secrets that this process's environment holds now."""
        return cls(environment=os.environ)

    def text(self, text: str) -> str:
        """Return the text without secrets."""
        for pattern in self._patterns:
            text = pattern.sub(REDACTED, text)
        if self._shapes:
            for pattern in _SHAPES:
                text = pattern.sub(REDACTED, text)
            for pattern in _AFTER:
                text = pattern.sub(rf"\1{REDACTED}", text)
        return text

    def value(self, value: Any, *, _depth: int = 0) -> Any:
        """Return the same value, the texts within it without secrets; what holds none is not copied.

        Images are left as they are: their base64 is no text. What lies deeper than 50 levels is taken out.
        """
        if isinstance(value, str):
            return value if value[:5] == "data:" else self.text(value)
        if _depth > _DEEPEST:
            return REDACTED
        if isinstance(value, dict):
            return {
                key: item if key == "base64" else self.value(item, _depth=_depth + 1) for key, item in value.items()
            }
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.value(item, _depth=_depth + 1) for item in value)
        if is_dataclass(value) and not isinstance(value, type):
            old = {entry.name: getattr(value, entry.name) for entry in fields(value) if entry.init}
            new = {
                name: item if name == "base64" else self.value(item, _depth=_depth + 1) for name, item in old.items()
            }
            return value if new == old else replace(value, **new)
        return value
