"""Takes secrets out of what tools return, before a model reads it or a recorder keeps it.

Two ways: the values that are known (given, or held by the environment), as they are and in the usual encodings; and the
shapes that keys, tokens and passwords have. Shapes can't find every secret, so name the values that matter. What it
can't see (a value in pieces, enciphered, drawn as pixels) is in `docs/security.md`.
"""

from __future__ import annotations

import base64
import copy
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any
from urllib.parse import quote, quote_plus

from langchain_core.tools import ToolException
from langgraph.types import Send
from pydantic import BaseModel

from metis_agent.errors import ConfigurationError
from metis_agent.formats import is_image

__all__ = ["REDACTED", "Redactor", "redacting"]

REDACTED = "[redacted]"
_SHORTEST = 8
_DEEPEST = 50
_PAYLOAD = re.compile(r"(?:data:[\w.+-]+/[\w.+-]+;base64,)?([A-Za-z0-9+/]{80,}={0,2})")
_ESCAPED = re.compile(r"%[0-9A-F]{2}")
_WORDS = re.compile(r"[A-Za-z]+?(?=[^A-Za-z]|$|(?<=[a-z])(?=[A-Z]))")
# The last word of a variable's name says what it holds, but for a number, or a word for where it is used.
_QUALIFIERS = frozenset(
    {"VALUE", "PROD", "DEV", "TEST", "STAGING", "LIVE", "PRIMARY", "SECONDARY", "OLD", "NEW", "BASE64"}
)
_SECRET_WORD = re.compile(
    r".*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|CRED)S?|PASS|\w+PASS|PAT|JWT|DSN|COOKIE|AUTHORIZATION"
)
_IN_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/:@]*:([^\s/@]+)@", re.I)
_IN_CONNECTION = re.compile(r"([\w ]+)=([^;]+)")
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
    re.compile(  # a key in an address
        r"(?i)([?&][\w.-]{0,40}(?:key|sig|signature|auth|jwt|pass|pwd)=)(?=[^\s\"'&#]{0,200}\d)[^\s\"'&#\[]{8,4000}"
    ),
)


class Redactor:
    """Replaces secrets by `[redacted]` in text, and in all that a tool of LangChain may return or raise.

    Args:
        secrets: values to take out wherever they stand; each of at least 8 characters.
        patterns: further regular expressions; what they match is taken out.
        environment: where to read values from whose names end in `KEY`, `TOKEN`, `SECRET`, `PASSWORD` and the like, and
            passwords within addresses, such as `os.environ`; `None` for none.
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
            known.update(_held_by(name, value))
        try:
            self._patterns = [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise ConfigurationError(f"pattern {error.pattern!r} is no regular expression: {error}.") from error
        forms = {form for secret in known for form in _forms(secret)}
        self._known = sorted((form for form in forms if form not in REDACTED), key=len, reverse=True)
        self._numbers = any(_is_number(secret) for secret in known)
        self._shapes = shapes

    @classmethod
    def from_environment(cls) -> Redactor:
        """All shapes, and the secrets that this process's environment holds now."""
        return cls(environment=os.environ)

    def text(self, text: str) -> str:
        """Return the text without secrets."""
        text = self.without_known(text)
        for pattern in self._patterns:
            text = pattern.sub(REDACTED, text)
        if self._shapes:
            for pattern in _SHAPES:
                text = pattern.sub(REDACTED, text)
            for pattern in _AFTER:
                text = pattern.sub(rf"\1{REDACTED}", text)
        return text

    def value(self, value: Any) -> Any:
        """Return the same value, the texts within it without secrets; what holds none is not copied.

        Goes into lists, dicts and their keys, bytes, dataclasses (a `Command`), pydantic models (messages, documents)
        and exceptions. Of any other object the text that a model or a log would get stands for it, where that holds a
        secret. Images are left as they are, and what lies deeper than 50 levels is taken out.
        """
        return _Walk(self).of(value, 0)

    def error(self, error: Exception) -> Exception:
        """Return the error, or one without secrets in its place: of the same type where that can be made.

        What caused it is left out then: a traceback would print it. Raise it `from None`.
        """
        said, walk = str(error), _Walk(self)
        if self.text(said) == said and all(walk.of(part, 0) is part for part in _told(error)):
            return error
        with suppress(Exception):  # an error's class may want any arguments
            args = walk.of(error.args, 0)
            cleaned = type(error).__new__(type(error), *args)
            cleaned.args = args
            for name, item in vars(error).items():
                setattr(cleaned, name, walk.of(item, 0))
            if self.text(str(cleaned)) == str(cleaned):
                return cleaned
        return ToolException(f"{type(error).__name__}: {self.text(said)}")

    def without_known(self, text: str) -> str:
        """Return the text without the known values, whatever else it holds."""
        # What stands around a value that was taken out could, with its mark, be another one.
        for _ in range(3):
            found = [form for form in self._known if form in text]
            if not found:
                break
            for form in found:
                text = text.replace(form, REDACTED)
        return text


def redacting(redactor: Redactor) -> Callable[[Any], Any]:
    """Return `redactor.value` for several values: an object that they share is cleaned once, so it must not change."""
    walk = _Walk(redactor)
    return lambda value: walk.of(value, 0)


class _Walk:
    """One pass through a value: what is there twice is cleaned once, and what holds itself ends."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._met: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int | float):
            return self._shown(value) if self._redactor._numbers else value
        if depth > _DEEPEST:
            return REDACTED
        if id(value) in self._met:
            return self._met[id(value)][1]
        self._met[id(value)] = (value, REDACTED)
        try:
            cleaned = self._inside(value, depth + 1)
        except Exception:  # an object that can't be looked at may hold anything
            cleaned = REDACTED
        self._met[id(value)] = (value, cleaned)
        return cleaned

    def _inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, bytes | bytearray | memoryview):
            return self._bytes(value)
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple | set | frozenset):
            items = [self.of(item, depth) for item in value]
            if isinstance(value, list):
                items = self._joined(items)
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            if isinstance(value, tuple) and hasattr(value, "_make"):
                return value._make(items)
            return type(value)(items) if type(value) in (list, tuple, set, frozenset) else items
        if isinstance(value, Exception):
            return self._redactor.error(value)
        if isinstance(value, type):
            return value
        if isinstance(value, BaseModel):
            private, extra = value.__pydantic_private__ or {}, value.__pydantic_extra__ or {}
            return self._with(value, {**value.__dict__, **extra, **private}, depth)
        if is_dataclass(value):
            names = (entry.name for entry in fields(value))
            return self._with(value, {name: getattr(value, name) for name in names if hasattr(value, name)}, depth)
        return self._with(value, {"arg": value.arg}, depth) if isinstance(value, Send) else self._shown(value)

    def _joined(self, items: list[Any]) -> list[Any]:
        """Content blocks: a model reads their texts as one, so a secret that is cut in two is taken out as well."""
        texts = {place: text for place, item in enumerate(items) if (text := _text_of_block(item)) is not None}
        whole = "".join(texts.values())
        cleaned = self._redactor.without_known(whole) if len(texts) > 1 else whole
        if cleaned == whole:
            return items
        for place in texts:
            block, cleaned = items[place], "" if place != next(iter(texts)) else cleaned
            items[place] = cleaned if isinstance(block, str) else {**block, "text": cleaned}
        return items

    def _with(self, value: Any, parts: Mapping[str, Any], depth: int) -> Any:
        """The object, with those of its parts replaced that hold a secret."""
        cleaned = {name: self.of(part, depth) for name, part in parts.items()}
        changed = {name: part for name, part in cleaned.items() if part is not parts[name]}
        if not changed:
            return value
        if isinstance(value, BaseModel):
            model = value.model_copy(update={name: part for name, part in changed.items() if name[0] != "_"})
            model.__pydantic_private__ = {**(value.__pydantic_private__ or {}), **{
                name: part for name, part in changed.items() if name[0] == "_"
            }} or None  # fmt: skip
            return model
        twin = copy.copy(value)
        for name, part in changed.items():
            object.__setattr__(twin, name, part)  # frozen ones too
        return twin

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> Any:
        cleaned: dict[Any, Any] = {}
        same = True
        for key, item in value.items():
            new_key, new = self.of(key, depth), self.of(item, depth)
            same = same and new_key is key and new is item
            while new_key is not key and new_key in cleaned:  # none of two values goes for having had secret names
                new_key = f"{new_key}*"
            cleaned[new_key] = new
        return value if same else cleaned

    def _text(self, text: str) -> str:
        payload = _PAYLOAD.fullmatch(text)
        if payload is not None and is_image(base64.b64decode(payload[1][:16])):
            return text
        cleaned = self._redactor.text(text)
        return text if cleaned == text else cleaned

    def _bytes(self, value: bytes | bytearray | memoryview) -> Any:
        content = bytes(value)
        if is_image(content):
            return value
        text = content.decode(errors="surrogateescape")
        cleaned = self._redactor.text(text)
        return value if cleaned == text else cleaned.encode(errors="surrogateescape")

    def _shown(self, value: Any) -> Any:
        """The object, or in its place the text that stands for it, where that holds a secret."""
        with suppress(Exception):  # objects of any kind come here
            for shown in (str(value), repr(value)):
                if self._redactor.text(shown) != shown:
                    return self._redactor.text(str(value))
        return value


def _text_of_block(item: Any) -> str | None:
    if isinstance(item, str):
        return item
    text = item.get("text") if isinstance(item, dict) and item.get("type") == "text" else None
    return text if isinstance(text, str) else None


def _told(error: BaseException | None) -> Iterator[Any]:
    """What a log prints of an error beside its own text: arguments, notes, and the errors behind it."""
    for _ in range(_DEEPEST):
        if error is None:
            return
        yield from (error.args, getattr(error, "__notes__", None))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        with suppress(Exception):
            yield str(error)


def _held_by(name: str, value: str) -> Iterator[str]:
    """The secrets in a variable of the environment."""
    value = value.strip()
    parts = [match[1] for match in _IN_ADDRESS.finditer(value)]
    if _names_a_secret(name):
        parts.append(value)
    if ";" in value:
        parts += [part for key, part in _IN_CONNECTION.findall(value) if _names_a_secret(key)]
    if value.startswith("{"):
        with suppress(ValueError, RecursionError):
            for key, part in json.loads(value).items():
                parts += _held_by(key, part) if isinstance(part, str) else ()
    yield from (part for part in parts if len(part) >= _SHORTEST)


def _names_a_secret(name: str) -> bool:
    words = [word.upper() for word in _WORDS.findall(name)]
    while words and words[-1] in _QUALIFIERS:
        words.pop()
    if not words or words[-2:] == ["PUBLIC", "KEY"]:
        return False
    if words[-1] == "PWD":  # alone it is the folder that one is in
        return len(words) > 1
    return words[-2:] == ["CONNECTION", "STRING"] or _SECRET_WORD.fullmatch(words[-1]) is not None


def _forms(secret: str) -> Iterator[str]:
    """A secret as it stands in texts: itself; escaped for JSON, addresses, pages; in base64, base32, hex; its lines."""
    yield secret
    stripped = secret.strip()
    lines = secret.splitlines() if "\n" in stripped else []
    content, wide = (secret.encode(name, errors="surrogatepass") for name in ("utf-8", "utf-16-be"))
    in_json = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    in_pages = {html.escape(secret), html.escape(secret, quote=False)}
    in_addresses = {quote(secret, safe=safe, errors="replace") for safe in ("", "/")}
    in_addresses.add(quote_plus(secret, errors="replace"))
    others = {
        stripped, repr(secret)[1:-1], repr(content)[2:-1], content.hex(), content.hex().upper(),
        *in_json, *(json.dumps(text)[1:-1] for text in in_json),  # JSON within JSON
        *in_addresses, *(_ESCAPED.sub(lambda match: match[0].lower(), text) for text in in_addresses),
        *(quote(text, safe="") for text in in_addresses),
        *in_pages, *(html.escape(secret).replace("&#x27;", quoted) for quoted in ("&apos;", "&#39;")),
        html.escape(secret).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
        "".join(f"\\x{byte:02x}" for byte in content),
        "".join(f"\\u{wide[at : at + 2].hex()}" for at in range(0, len(wide), 2)),
        *(line.strip() for line in lines if len(line.strip()) >= 2 * _SHORTEST),
    }  # fmt: skip
    for inner in (*_in_base(64, content), *_in_base(64, secret.encode("utf-16-le", errors="surrogatepass"))):
        others |= {inner, inner.replace("+", "-").replace("/", "_"), *_in_base(64, inner.encode())}
    others |= {form for inner in _in_base(32, content) for form in (inner, inner.lower())}
    yield from (form for form in others if len(form) >= _SHORTEST)


def _in_base(base: int, content: bytes) -> Iterator[str]:
    """The digits that are its own alone, by where it begins among the bytes of a group."""
    encode, bits, group = (base64.b64encode, 6, 3) if base == 64 else (base64.b32encode, 5, 5)
    for before in range(group):
        encoded = encode(bytes(before) + content).decode()
        yield encoded[-(-8 * before // bits) : 8 * (before + len(content)) // bits]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
