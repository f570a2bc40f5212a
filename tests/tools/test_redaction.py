import base64
import html
import json
import time
import traceback
from collections import UserDict, deque
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import ToolException
from langgraph.errors import GraphInterrupt, ParentCommand
from langgraph.types import Command, Interrupt, Send
from pydantic import BaseModel, ConfigDict, PrivateAttr, TypeAdapter, ValidationError

from metis_agent.errors import ConfigurationError, InfrastructureError, SandboxGoneError
from metis_agent.recording import schema
from metis_agent.tools.redaction import REDACTED, Redactor
from metis_agent.types import Question, Trajectory

QUESTION = Question(id="q", text="?")

# Put together, so that no scanner takes this file for a leak.
FAKE = {
    "openai": "sk-" + "proj-abcdEFGH1234abcdEFGH1234",
    "anthropic": "sk-" + "ant-api03-abcdEFGH1234abcdEFGH",
    "stripe": "sk_" + "live_abcdEFGH1234abcd",
    "github": "ghp_" + "abcdEFGH1234abcdEFGH1234abcdEFGH1234",
    "github fine": "github_" + "pat_abcdEFGH1234abcdEFGH1234",
    "gitlab": "glpat-" + "abcdEFGH1234abcdEFGH",
    "hugging face": "hf_" + "abcdEFGH1234abcdEFGH1234",
    "e2b": "e2b_" + "abcdEFGH1234abcdEFGH1234",
    "langsmith": "lsv2_" + "pt_abcdEFGH1234abcdEFGH_1234",
    "slack": "xoxb-" + "1234567890-abcdEFGH",
    "aws": "AKIA" + "ABCDEFGHIJKLMNOP",
    "google": "AIza" + "abcdEFGH1234abcdEFGH1234abcdEFGH123",
    "jwt": "eyJ" + "hbGciOiJIUzI1NiJ9." + "eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.abcdEFGH1234",
}


@pytest.mark.parametrize("secret", FAKE.values(), ids=FAKE)
def test_shapes(secret):
    assert Redactor().text(f"the key is {secret}, keep it") == f"the key is {REDACTED}, keep it"
    assert Redactor(shapes=False).text(secret) == secret


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Authorization: Bearer abc123def456", f"Authorization: Bearer {REDACTED}"),
        ("curl -H 'X-Api-Key: a1b2c3d4e5'", f"curl -H 'X-Api-Key: {REDACTED}'"),
        ('{"api_key": "a1b2c3d4e5"}', f'{{"api_key": "{REDACTED}"}}'),
        ("https://a.example/?token=a1b2c3d4e5&x=1", f"https://a.example/?token={REDACTED}&x=1"),
        ("PASSWORD=hunter2hunter2", f"PASSWORD={REDACTED}"),
        ("postgres://me:hunter2@db.example/x", f"postgres://me:{REDACTED}@db.example/x"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nrest", f"{REDACTED}\nrest"),
        ("-----BEGIN PRIVATE KEY-----\nabc, cut", REDACTED),
    ],
)
def test_what_stands_before_a_secret_stays(text, cleaned):
    assert Redactor().text(text) == cleaned
    assert Redactor().text(cleaned) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "the token economy of basic needs", "a secret: nobody knows", "password: correcthorse", "Bearer of bad news",
        "sk-learn and task-oriented", "https://a.example/b:c@d", "The API key is under Settings.", "eyJ", "AKIA",
        "tokens: 12", "basic understanding of 2024", "",
    ],
)  # fmt: skip
def test_ordinary_text_stays(text):
    assert Redactor().text(text) == text


def test_known_values():
    redactor = Redactor(secrets=["correcthorse", "correcthorsebattery"], shapes=False)
    assert redactor.text("correcthorsebattery, correcthorse") == f"{REDACTED}, {REDACTED}"


def test_the_environment():
    environment = {"MY_API_KEY": "plainvalue", "DB_PASSWORD": "short", "HOME": "/home/someone", "SECRET": "secretvalue"}
    redactor = Redactor(environment=environment)
    assert redactor.text("plainvalue short /home/someone secretvalue") == f"{REDACTED} short /home/someone {REDACTED}"


@pytest.mark.parametrize(
    "name",
    ["OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "SECRET_KEY", "STRIPE_SECRET_KEY", "PRIVATE_KEY", "AZURE_OPENAI_KEY",
     "ENCRYPTION_KEY", "DB_PASS", "GITHUB_PAT", "API_KEY_1", "KEY2", "PASSPHRASE", "CONNECTION_STRING", "DB_PWD", "DSN",
     "PGPASSWORD", "SSHPASS", "accessToken", "my-api-key", "HF_TOKEN", "JWT", "GOOGLE_CREDENTIALS", "API_KEY_PROD"],
)  # fmt: skip
def test_variables_that_hold_secrets(name):
    assert Redactor(environment={name: "plainvalue"}).text("is plainvalue") == f"is {REDACTED}"


@pytest.mark.parametrize(
    "name",
    ["PWD", "OLDPWD", "KEYBOARD", "TOKENIZERS_PARALLELISM", "PASSWORD_POLICY", "SECRET_NAME", "PUBLIC_KEY", "KEY_ID",
     "TOKEN_LIMIT", "PATH", "COMPASSES", "SSH_AUTH_SOCK", "", "_", "1"],
)  # fmt: skip
def test_variables_that_hold_none(name):
    assert Redactor(environment={name: "plainvalue"}).text("is plainvalue") == "is plainvalue"


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("postgres://me:plainvalue@db.example/x", "plainvalue"),
        ("redis://:plainvalue@cache.example:6379/0", "plainvalue"),
        ("Endpoint=https://a.example;AccountKey=plainvalue==;Suffix=core", "plainvalue=="),
        ('{"type": "service", "private_key": "plainvalue", "number": 1}', "plainvalue"),
    ],
)
def test_secrets_within_variables(value, secret):
    assert Redactor(environment={"ANYTHING": value}, shapes=False).text(f"is {secret}") == f"is {REDACTED}"
    assert Redactor(environment={"ANYTHING": value}, shapes=False).text("a.example") == "a.example"


@pytest.mark.parametrize(
    "form",
    [str, repr, json.dumps, quote, quote_plus, html.escape, lambda s: f"a{s}b", lambda s: json.dumps({"k": [s]})[1:],
     lambda s: base64.b64encode(f"user:{s}".encode()).decode(), lambda s: base64.urlsafe_b64encode(s.encode()).decode(),
     lambda s: base64.b64encode(f"me:{s}@x".encode()).decode(), lambda s: json.dumps(json.dumps({"k": s})),
     lambda s: repr(s.encode()), lambda s: s.encode().hex(), lambda s: s.encode().hex().upper(),
     lambda s: quote(s, safe="").lower() if s.islower() else quote(quote(s)), lambda s: html.escape(s, quote=False),
     lambda s: html.escape(s).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
     lambda s: html.escape(s).replace("&#x27;", "&apos;"), lambda s: "".join(f"\\x{byte:02x}" for byte in s.encode()),
     lambda s: base64.b64encode(s.encode("utf-16-le")).decode(), lambda s: base64.b32encode(s.encode()).decode(),
     lambda s: base64.b32encode(f"me:{s}@x".encode()).decode().lower(),
     lambda s: base64.b64encode(b"a: " + base64.b64encode(f"me:{s}".encode())).decode()],
)  # fmt: skip
def test_known_values_in_the_usual_encodings(form):
    secret = 'pa"ss/w\\ö & <rd>?'
    shown = form(secret)
    assert Redactor(secrets=[secret], shapes=False).text(f"it is {shown}.") not in (f"it is {shown}.", "")
    assert form("another text, not the secret") in Redactor(secrets=[secret]).text(form("another text, not the secret"))


def test_the_lines_of_a_key():
    key = "-----BEGIN X KEY-----\n" + "\n".join(f"{number:064}" for number in range(3)) + "\n-----END X KEY-----\n"
    redactor = Redactor(environment={"SSH_PRIVATE_KEY": key}, shapes=False)
    assert redactor.text(key.strip()) == redactor.text(json.dumps(key)[1:-3]) == REDACTED
    assert redactor.text(f"> {1:064} <") == f"> {REDACTED} <"


def test_from_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "from-the-environment")
    assert Redactor.from_environment().text("x from-the-environment") == f"x {REDACTED}"


def test_patterns():
    assert Redactor(patterns=[r"EMP-\d+"]).text("EMP-12 and EMP-x") == f"{REDACTED} and EMP-x"


@dataclass(frozen=True)
class Result:
    text: str
    parts: tuple


def test_values_within_values():
    redactor, secret = Redactor(secrets=["opensesame"]), "opensesame"
    value = {"a": [secret, 3, None, {"b": (secret,)}], "c": Result(secret, (secret, b"opensesame")), "d": {secret}}
    cleaned = redactor.value(value)
    assert cleaned["a"] == [REDACTED, 3, None, {"b": (REDACTED,)}]
    assert cleaned["c"] == Result(REDACTED, (REDACTED, REDACTED.encode()))
    assert cleaned["d"] == {REDACTED}
    assert value["a"][0] == secret  # the original is as it was


def test_images_stay():
    start = b"\x89PNG\r\n\x1a\n"
    encoded = base64.b64encode(start + bytes(100)).decode()
    redactor = Redactor(secrets=[encoded[:10]])
    block = {"type": "image", "base64": encoded, "url": f"data:image/png;base64,{encoded}", "bytes": start}
    assert redactor.value(block) is block
    other = {"base64": encoded[:10], "url": f"data:text/plain,{encoded[:10]}", "note": f"{encoded} "}
    assert encoded[:10] not in str(redactor.value(other))


def test_a_value_that_holds_itself():
    value = ["opensesame"]
    value.append(value)
    assert REDACTED in str(Redactor(secrets=["opensesame"]).value(value))


SECRET = "S3cr3t-value/of the+vault-0042"
TRIPWIRE = Redactor(secrets=[SECRET])


class Row(BaseModel):
    model_config = ConfigDict(extra="allow")
    v: Any
    _private: Any = PrivateAttr(default=SECRET)


class Pair(NamedTuple):
    one: Any
    two: Any


class Opaque:
    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Opaque({self.held!r})"


def chained():
    try:
        try:
            raise KeyError(f"no {SECRET}")
        except KeyError:
            raise ValueError("a failure") from None
    except ValueError as error:
        error.__cause__ = OSError(2, SECRET)
        return error


leaves = st.sampled_from(
    [SECRET, f"key={SECRET}", SECRET.encode(), bytearray(SECRET.encode()), Path("/run") / SECRET, Row(v=SECRET),
     Row(v=1, more=SECRET), Document(page_content=SECRET, metadata={"k": SECRET}),
     ToolMessage(SECRET, tool_call_id="1"),
     ToolMessage([{"type": "text", "text": SECRET}], tool_call_id="1", artifact=Opaque(SECRET)),
     AIMessage(SECRET),
     Send("node", {"k": SECRET}), Command(update={"messages": [ToolMessage(SECRET, tool_call_id="1")]}),
     Command(graph=Command.PARENT, goto=Send("a", SECRET), resume=SECRET), ValueError(SECRET),
     OSError(2, SECRET, SECRET), Opaque(SECRET), f"data: {SECRET}",
     f"data:text/plain;base64,{base64.b64encode(SECRET.encode()).decode()}", 7, None]
)  # fmt: skip
holders = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.builds(Pair, inner, inner)
        | st.dictionaries(st.sampled_from(["base64", "text", SECRET, f"{SECRET}2"]), inner, max_size=3)
        | st.builds(Result, text=inner, parts=inner) | st.builds(lambda v: Row(v=v), inner) | st.builds(Opaque, inner)
        | st.builds(lambda v: UserDict({"k": v}), inner) | st.builds(lambda v: deque([v]), inner)
        | st.builds(lambda v: MappingProxyType({"k": v}), inner)
        | st.builds(lambda v: ExceptionGroup("g", [ValueError(v)]), inner)
    ),
    max_leaves=6,
)  # fmt: skip


@given(holders)
def test_known_values_get_out_of_nothing(value):
    cleaned = TRIPWIRE.value(value)
    recorded = schema.dumps(Trajectory(id="t", question=QUESTION, metadata={"v": schema.plain(cleaned)}))
    shown = f"{cleaned!r} {cleaned!s} {recorded}"
    assert SECRET not in shown
    assert SECRET.encode() not in shown.encode()
    assert base64.b64encode(SECRET.encode()).decode()[:-4] not in shown
    assert TRIPWIRE.value(cleaned) is cleaned or repr(TRIPWIRE.value(cleaned)) == repr(cleaned)


@pytest.mark.parametrize(
    "value",
    [["x", {"a": (1, b"x")}], Row.model_construct(v="x"), ToolMessage("x", tool_call_id="1"), Command(goto="a"),
     Path("x"), Send("a", {}), Opaque("x"), ValueError("x"), print, int, {1: 2.5}, Pair(1, 2), object()],
)  # fmt: skip
def test_what_holds_no_secret_is_the_same_object(value):
    if isinstance(value, Row):
        value._private = "x"
    assert TRIPWIRE.value(value) is value


def test_models_and_commands_stay_what_they_are():
    message = ToolMessage(SECRET, tool_call_id="7", artifact={"a": SECRET}, status="error")
    cleaned = TRIPWIRE.value(Command(update={"messages": [message], "n": 1}, goto="x"))
    assert (cleaned.goto, cleaned.update["n"]) == ("x", 1)
    (again,) = cleaned.update["messages"]
    assert again == ToolMessage(REDACTED, tool_call_id="7", artifact={"a": REDACTED}, status="error")
    assert (message.content, message.artifact) == (SECRET, {"a": SECRET})
    assert TRIPWIRE.value({SECRET: 1, f"{SECRET}": 2, f"x{SECRET}": 3}) == {REDACTED: 2, f"x{REDACTED}": 3}
    assert list(Redactor(secrets=[SECRET, "another one"]).value({SECRET: 1, "another one": 2}).values()) == [1, 2]


def test_numbers_are_texts_too():
    redactor = Redactor(secrets=["4242424242"], shapes=False)
    assert redactor.value([4242424242, 42, 0.5]) == [REDACTED, 42, 0.5]
    assert Redactor(secrets=["not a number"]).value([4242424242]) == [4242424242]


class Picky(InfrastructureError):
    """An error that takes other arguments than its message."""

    def __init__(self, *, code):
        super().__init__(f"code {code}")
        self.code = code


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ValueError(SECRET), ValueError), (SandboxGoneError(f"at {SECRET}"), SandboxGoneError),
     (Picky(code=SECRET), Picky), (OSError(2, SECRET), FileNotFoundError),
     (GraphInterrupt([Interrupt(value={"ask": SECRET}, id="i")]), GraphInterrupt),
     (ParentCommand(Command(update={"k": SECRET})), ParentCommand), (chained(), ValueError),
     (ToolException(SECRET), ToolException)],
)  # fmt: skip
def test_errors_keep_their_kind(error, kind):
    cleaned = TRIPWIRE.error(error)
    try:
        raise cleaned from None
    except Exception as caught:
        printed = "".join(traceback.format_exception(caught))
    assert type(cleaned) is kind
    assert cleaned is not error
    assert SECRET not in f"{printed} {cleaned!r} {cleaned.args} {vars(cleaned)}"


def test_an_error_that_cannot_be_made_again_is_told():
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python(SECRET)
    cleaned = TRIPWIRE.error(caught.value)
    assert type(cleaned) is ToolException
    assert str(cleaned).startswith("ValidationError: 1 validation error")
    assert SECRET not in str(cleaned)
    assert Redactor(secrets=["something else"]).error(caught.value) is caught.value


@pytest.mark.parametrize(
    "unit",
    ["a", "sk-", "Bearer ", "token:", "token: ", "://", "a://b:", "eyJ", "eyJaaaaaaaaaa.",
     "-----BEGIN PRIVATE KEY-----",
     "password=", "Bearer aaaaaaaaaa "],
)  # fmt: skip
def test_no_text_takes_long(unit):
    text, redactor = unit * (250_000 // len(unit)), Redactor()
    began = time.process_time()
    redactor.text(text)
    assert time.process_time() - began < 1.25


@given(st.text(max_size=200))
def test_twice_is_once(text):
    redactor = Redactor(secrets=["opensesame"])
    once = redactor.text(f"opensesame{text}")
    assert "opensesame" not in once
    assert redactor.text(once) == once


@pytest.mark.parametrize("arguments", [{"secrets": ["short"]}, {"secrets": [""]}, {"patterns": ["("]}])
def test_settings_are_checked_without_telling_secrets(arguments):
    with pytest.raises(ConfigurationError) as caught:
        Redactor(**arguments)
    assert "short" not in str(caught.value)
