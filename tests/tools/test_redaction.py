import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError
from metis_agent.tools.redaction import REDACTED, Redactor

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
    assert cleaned["c"] == Result(REDACTED, (REDACTED, b"opensesame"))
    assert cleaned["d"] == {REDACTED}
    assert value["a"][0] == secret  # the original is as it was


def test_images_stay():
    redactor = Redactor(secrets=["abcdefgh"])
    block = {"type": "image", "base64": "abcdefgh", "url": "data:image/png;base64,abcdefgh", "note": "abcdefgh"}
    assert redactor.value(block) == block | {"note": REDACTED}


def test_a_value_that_holds_itself():
    value = ["opensesame"]
    value.append(value)
    assert REDACTED in str(Redactor(secrets=["opensesame"]).value(value))


@pytest.mark.parametrize(
    "unit",
    ["a", "sk-", "Bearer ", "token:", "token: ", "://", "a://b:", "eyJ", "eyJaaaaaaaaaa.",
     "-----BEGIN PRIVATE KEY-----",
     "password=", "Bearer aaaaaaaaaa "],
)  # fmt: skip
def test_no_text_takes_long(unit):
    text, redactor = unit * (1_000_000 // len(unit)), Redactor()
    began = time.perf_counter()
    redactor.text(text)
    assert time.perf_counter() - began < 5.0


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
