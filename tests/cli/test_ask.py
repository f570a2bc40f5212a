"""`metis ask`: decisions beside the answer, pipes, JSON lines, a conversation, and what Ctrl-C leaves."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from metis_agent.cli import app
from metis_agent.cli.ask import Conversation, Screen
from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.gates.reference import NeverGate
from tests.fakes import call, calling, model

AGENT = '''
from langchain_core.messages import AIMessage
from metis_agent.agent import create_metis_agent
from tests.fakes import call, calling, model

def lookup(word: str) -> str:
    """Look a word up."""
    return "\\x1b[31mnine " + word

def make(gate):
    def reply(messages):
        humans = [message.text for message in messages if message.type == "human"]
        if humans[-1] == "break":
            raise OSError("the service is down")
        if messages[-1].type == "tool":
            return "It is nine."
        if humans[-1] == "how many?":
            return str(len(humans))
        return calling(call("lookup", word="lives"))
    return create_metis_agent(model(reply), [lookup], gate=gate)
'''


@pytest.fixture
def agent(tmp_path: Path) -> str:
    (tmp_path / "my_agent.py").write_text(AGENT)
    return f"{tmp_path / 'my_agent.py'}:make"


def ask(*arguments: str, input: str = "") -> Result:
    result = CliRunner().invoke(app, ["ask", *arguments], input=input)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_answer_alone_goes_to_standard_output(agent: str) -> None:
    result = ask("how many lives?", "--agent", agent)
    assert result.stdout == "It is nine.\n"
    assert "gate ModelGate: may call lookup" in result.stderr
    assert "lookup(word='lives') ok" in result.stderr
    assert "1 tool call," in result.stderr


def test_a_tool_cannot_write_to_the_terminal(agent: str) -> None:
    assert "nine lives" in (shown := ask("how many lives?", "--agent", agent).stderr)
    assert "\x1b[31m" not in shown


def test_json_is_one_line_an_answer(agent: str) -> None:
    line = json.loads(ask("how many lives?", "--agent", agent, "--json").stdout)
    assert line["answer"] == "It is nine."
    assert [decision["allowed"] for decision in line["decisions"]] == [["lookup"], ["lookup"]]
    assert line["outcomes"][0]["content"] == "\x1b[31mnine lives"


def test_each_line_of_a_pipe_is_a_question_of_one_conversation(agent: str) -> None:
    result = ask("--agent", agent, input="how many lives?\n\nhow many?\n")
    assert result.stdout == "It is nine.\n2\n"


def test_a_gate_by_name_is_enforced(agent: str) -> None:
    line = json.loads(ask("how many lives?", "--agent", agent, "--gate", "never", "--json").stdout)
    assert {outcome["status"] for outcome in line["outcomes"]} == {"blocked"}
    assert line["decisions"][0]["gate"] == "NeverGate"


def test_a_service_that_is_down_is_one_error_with_its_cause(agent: str) -> None:
    with pytest.raises(InfrastructureError, match="OSError: the service is down"):
        ask("break", "--agent", agent)


def test_a_gate_that_is_not_there_is_refused(agent: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-gate"):
        ask("hi", "--agent", agent, "--gate", str(tmp_path / "no-gate"))
    with pytest.raises(ConfigurationError, match="give one of them"):
        ask("hi", "--agent", agent, "--model", "openai:gpt-5")


def test_a_stopped_turn_leaves_the_conversation_as_it_was() -> None:
    from metis_agent.agent import create_metis_agent

    def stop(messages: list[object]) -> str:
        raise KeyboardInterrupt

    asked = model("one", stop, lambda messages: str(len(messages)))
    talk = Conversation(create_metis_agent(asked, []), Screen(as_json=True))
    talk.ask("first")
    with pytest.raises(KeyboardInterrupt):
        talk.ask("second")
    assert talk.ask("third") == "3"  # first, its answer, third


def test_in_a_terminal_it_streams_and_survives_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from metis_agent.agent import create_metis_agent
    from metis_agent.cli import ask as module

    def stop(messages: list[object]) -> str:
        raise KeyboardInterrupt

    lines = iter(["first", "", "second", "third"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def nine(word: str) -> str:
        """Look up."""
        return word

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    screen = Screen()
    script = model(calling(call("nine", word="a"), text="Let me look."), "one", stop, "three")
    module._converse(Conversation(create_metis_agent(script, [nine]), screen), screen, tiny=False)
    shown = capsys.readouterr()
    assert shown.out == "Let me look.\none\nthree\n"
    assert "Stopped" in shown.err


def test_the_packaged_model_answers_at_once() -> None:
    line = json.loads(ask("What is 4821 * 7310?", "--json").stdout)
    assert (line["answer"], [outcome["tool"] for outcome in line["outcomes"]]) == ("35241510", ["python"])
    direct = json.loads(ask("What is the capital of France?", "--gate", "never", "--json").stdout)
    assert (direct["answer"], direct["outcomes"]) == ("Paris", [])


def test_a_gate_that_answers_from_a_draft_shows_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    from metis_agent.agent import create_metis_agent

    talk = Conversation(create_metis_agent(model("drafted"), [], gate=NeverGate()), Screen())
    assert talk.ask("hi") == "drafted"
    assert capsys.readouterr().out == "drafted\n"
