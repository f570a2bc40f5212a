"""The page in a real browser: it works, asks for nothing, can't be harmed, and is fit for everybody."""

import json
import os
import socket
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metis_agent.audit.page import audit_page
from metis_agent.audit.run import check_page
from metis_agent.recording import schema
from metis_agent.recording.store import TrajectoryStore
from metis_agent.report.facts import ReportInputs, gather
from metis_agent.report.page import page_of, write_report
from metis_agent.types import Trajectory
from tests.audit.recorded import look
from tests.audit.test_audit import HOSTILE as MARKUP
from tests.audit.test_audit import audited, judged, records
from tests.audit.test_audit import run as recorded
from tests.fakes import model as chat_model
from tests.report.browser import browser, complaints, needs_browser, requests, show
from tests.report.stores import AFTER, BEFORE, HOSTILE, hostile_runs, run, store
from tests.report.test_inputs import STEP, outcomes, write

pytestmark = [needs_browser, pytest.mark.enable_socket, pytest.mark.timeout(600)]
_socket = socket.socket


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """A page with everything in it."""
    from metis_agent.evaluation.gates import Scored, evaluate_gate

    table = outcomes()
    need = table.correct[:, 1:] * 0.6 + 0.2
    figures = evaluate_gate(Scored(direct_right=1 - need[:, 0], probabilities=need), table, 0.5, resamples=50)
    inputs = ReportInputs(
        store=store(folder / "after", AFTER), before=store(folder / "before", BEFORE),
        evaluation=write(folder / "figures.json", figures),
        history=write(folder / "history.json", [{**STEP, "step": step} for step in range(1, 9)]),
    )  # fmt: skip
    write_report(inputs, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Any]:
    # This runs before pytest-socket shuts the network for a test; the driver itself is reached by it.
    guarded, socket.socket = socket.socket, _true_socket()  # type: ignore[misc]
    try:
        with browser(folder / "profile") as found:
            yield found
    finally:
        socket.socket = guarded  # type: ignore[misc]


def _true_socket() -> type[socket.socket]:
    import pytest_socket

    return pytest_socket._true_socket  # type: ignore[no-any-return]


def texts(driver: Any, selector: str) -> list[str]:
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )
    return found


def choose(driver: Any, id_: str, value: str) -> None:
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('change'))",
        id_,
        value,
    )


def label(driver: Any, name: str) -> None:
    driver.execute_script("document.querySelector(`input[value=${arguments[0]}]`).click()", name)


def wait_for(driver: Any, selector: str, text: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda d: any(text in found for found in texts(d, selector)))


def test_it_loads_nothing_and_says_nothing_to_the_console(driver: Any, page: Path) -> None:
    show(driver, page)
    driver.execute_script("document.querySelector('#runs button').click()")
    wait_for(driver, "#run h4", "Trajectory")
    assert complaints(driver) == []
    assert requests(driver) == [page.as_uri()]


def test_filters_show_just_what_they_name(driver: Any, page: Path) -> None:
    show(driver, page)
    assert texts(driver, "#count") == ["6 of 37 runs"]
    for name, questions in (
        ("redundant", ["What is 3 + 3?"]), ("wrong_direct", ["Who founded Dadote?"]),
        ("missed", ["Who founded Dadote?"]), ("harmful", []), ("failed", ["What is 2 + 2?"]),
    ):  # fmt: skip
        label(driver, name)
        assert texts(driver, "#runs .line1") == questions
        assert texts(driver, f"#count-{name}") == [str(len(questions))]
    choose(driver, "store", "1")
    label(driver, "harmful")
    assert texts(driver, "#runs .line1") == ["What is 3 + 3?"]
    label(driver, "all")
    choose(driver, "tool", texts_index(driver, "#tool option", "python"))
    assert texts(driver, "#runs .line1") == ["What is 2 + 2?", "What is 3 + 3?"]
    choose(driver, "tool", "")
    choose(driver, "kind", texts_index(driver, "#kind option", "chat"))
    assert texts(driver, "#runs .line1") == ["Shall we dance?"]
    choose(driver, "kind", "")
    choose(driver, "branch", "1")
    assert texts(driver, "#count") == ["8 of 37 runs"]


def texts_index(driver: Any, selector: str, text: str) -> str:
    found: str = driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].find((e) => e.textContent === arguments[1]).value",
        selector,
        text,
    )
    return found


def test_search_and_the_keyboard(driver: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(driver, page)
    driver.find_element(By.ID, "search").send_keys("FOUNDED")
    wait_for(driver, "#count", "2 of 37")
    assert texts(driver, "#runs .line1") == ["Who founded Dadote?", "When was Dadote founded?"]
    driver.execute_script("document.querySelector('#runs button').focus()")
    driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    wait_for(driver, "#run h3", "When was Dadote founded?")
    assert driver.switch_to.active_element.get_attribute("id") == "run"
    said = texts(driver, "#run")[0]
    assert "print(1)\nprint(2)" in said
    assert "found" in said
    assert "Other runs of this question" in said
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert "When was Dadote" in driver.switch_to.active_element.text


def test_a_run_can_be_linked_to(driver: Any, page: Path) -> None:
    show(driver, page, "#run-1")
    wait_for(driver, "#run h3", "What is 3 + 3?")


def test_hostile_records_do_no_harm(driver: Any, folder: Path) -> None:
    runs = [replace(each, started_at=1e18) for each in hostile_runs()]  # no calendar goes so far
    write_report(ReportInputs(store=store(folder / "hostile", runs)), folder / "hostile.html")
    show(driver, folder / "hostile.html")
    for row, text in enumerate(HOSTILE):  # each of them opened
        driver.execute_script("document.querySelectorAll('#runs button')[arguments[0]].click()", row)
        wait_for(driver, "#run h3", text[:40] if text.isascii() and text.isprintable() else "")
        wait_for(driver, "#run h4", "Trajectory")
        driver.execute_script(
            "document.querySelectorAll('#run *').forEach((e) => e.dispatchEvent(new Event('mouseover')))"
        )
    sources = driver.execute_script("return [...document.images].map((e) => e.src.slice(0, 22))")
    assert set(sources) == {"data:image/png;base64,"}
    assert driver.execute_script("return window.hacked") is None
    assert (
        driver.execute_script("return document.querySelectorAll('script:not([type]), svg[onload], #run a').length") == 1
    )
    assert complaints(driver) == []
    assert [url for url in requests(driver) if not url.startswith("data:image/png")] == [
        (folder / "hostile.html").as_uri()
    ]


def odd_runs() -> list[Trajectory]:
    """What no run of ours has, and what somebody else's record may."""
    tool = run("q1", "4", "python")
    calls = [{"name": None, "args": None, "id": None}, {"name": ["x"], "args": "text", "id": 7}, {}, None, "call"]
    deep: Any = "end"
    for _ in range(120):
        deep = [deep, {"": deep}] if len(str(deep)) < 200 else [deep]
    messages: dict[str, Any] = {
        "no content": {"type": "ai", "data": {"content": None}},
        "numbers for content": {"type": "ai", "data": {"content": [1, None, True, [], {"type": 7}]}},
        "calls that are none": {"type": "ai", "data": {"content": "", "tool_calls": calls}},
        "an unknown kind": {"type": "elephant", "data": {"content": {"a": 1}}},
        "no data": {"type": "human"},
        "a name like a property": {"type": "ai", "data": {"content": "__proto__", "name": "constructor"}},
    }
    odd = {"__proto__": {"a": 1}, "constructor": None, "toString": 1}
    taken = [replace(each, arguments={"__proto__": deep, "": None}, seconds=1e300) for each in tool.outcomes]
    nameless = [replace(each, tool="", content="", call_id="") for each in tool.outcomes]
    fields: list[dict[str, Any]] = [
        *({"started_at": value} for value in (1e18, -1e18, 8.64e12 + 1, -62135596801.0, float("nan"), float("inf"))),
        *({"seconds": value} for value in (float("nan"), -1.0, 1e300, 10**400)),
        *({"metadata": value} for value in (odd, {"deep": deep})),
        *({"messages": (tool.messages[0], message)} for message in messages.values()),
        {"outcomes": tuple(taken)},
        {"outcomes": tuple(nameless)},
        {"answer": "", "outcomes": ()},
        {"error": "\ud83d" * 3},
    ]
    return [replace(tool, id=f"odd-{number}", **changed) for number, changed in enumerate(fields)]


def test_runs_of_odd_values_open(driver: Any, folder: Path) -> None:
    runs = tuple(odd_runs())
    write_report(ReportInputs(store=store(folder / "odd", runs)), folder / "odd.html")
    show(driver, folder / "odd.html")
    assert texts(driver, "#count") == [f"{len(runs)} of {len(runs)} runs"]
    for number in range(len(runs)):
        driver.execute_script("document.querySelectorAll('#runs button')[arguments[0]].click()", number)
        wait_for(driver, "#run h4", "Trajectory")
        assert complaints(driver) == [], number


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_it_is_accessible_and_fits(driver: Any, page: Path, width: int, dark: bool) -> None:
    axe = pytest.importorskip("axe_core_python.selenium")
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    show(driver, page, "#run-1")
    wait_for(driver, "#run h4", "Trajectory")
    driver.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert driver.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
    found = axe.Axe().run(driver)["violations"]
    assert [(it["id"], it["impact"], it["nodes"][0]["html"][:200]) for it in found] == []


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (375, True)], ids=["light", "dark, on a phone"])
def test_the_audits_pages(driver: Any, folder: Path, width: int, dark: bool) -> None:
    """The audit's page and the one to check by hand: accessible, on a phone too, and they ask for nothing."""
    axe = pytest.importorskip("axe_core_python.selenium")
    runs = [*records(), recorded("x", f"Order {MARKUP}?", look(MARKUP, MARKUP), answer=MARKUP, kind="")]
    said = chat_model(*[f"In {MARKUP}, it is."] * 99)
    to_check = audited(runs, chat=said, verdicts=judged(), self_reports=False)
    pages = {"audit": audit_page(audited(runs), f"Title {MARKUP}"), "check": check_page(to_check, 5)}
    for name, parts in pages.items():
        page = folder / f"{name}.html"
        page.write_text("".join(parts))
        device = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get("about:blank")
        complaints(driver), requests(driver)
        driver.get(page.as_uri())
        driver.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        assert driver.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0, (name, width)
        assert (complaints(driver), requests(driver)) == ([], [page.as_uri()]), name
        found = axe.Axe().run(driver)["violations"]
        assert [(it["id"], it["impact"], it["nodes"][0]["html"][:200]) for it in found] == [], (name, width)


def test_the_summary_is_painted_before_the_runs_are_read(driver: Any, folder: Path, page: Path) -> None:
    """As heavy as the page of a store of 100,000 runs, of which it carries 20,000: 12 MB of packed runs."""
    facts = gather(ReportInputs(store=str(page.parent / "after")))
    facts.archive.index()
    facts.archive.blocks.extend(b64encode(os.urandom(90_000)).decode() for _ in range(100))
    heavy = folder / "heavy.html"
    heavy.write_text("".join(page_of(facts, "Heavy")))
    assert heavy.stat().st_size > 12_000_000
    assert_painted_at_once(driver, heavy)


@pytest.mark.slow
def test_a_large_store_opens_at_once(driver: Any, folder: Path) -> None:
    count = 30_000  # `make bench-report` has 100,000
    kinds = [
        schema.dumps(run("q1", "4", *tools, branch=branch)).replace("/q1/0", "/q1/NUMBER") + "\n"
        for branch, tools in (("free", ("python",)), ("free", ()), ("direct", ()), ("tool", ("python",)))
    ]  # fmt: skip
    with TrajectoryStore(folder / "large") as kept:
        kept.append(run("q1", "4"))  # begins a shard, as the store names them
    lines = (
        kinds[number % 4]
        .replace('"q1"', f'"q{number // 4}"')
        .replace("NUMBER", str(number))
        .replace("2 + 2", f"2 + {number // 4}")
        for number in range(count)
    )
    (shard,) = (folder / "large").glob("*.jsonl")
    with shard.open("w") as file:
        file.writelines(lines)
    facts = write_report(ReportInputs(store=str(folder / "large")), folder / "large.html")
    assert (facts.after.runs, len(facts.archive)) == (count, 20_000)
    assert (folder / "large.html").stat().st_size < 20_000_000
    show(driver, folder / "large.html")
    assert texts(driver, "#count")[0].endswith("of 20,000 runs")
    assert complaints(driver) == []
    assert_painted_at_once(driver, folder / "large.html")


def assert_painted_at_once(driver: Any, page: Path) -> None:
    show(driver, page)
    painted, unpacked = driver.execute_script(
        "return [performance.getEntriesByName('first-contentful-paint')[0].startTime,"
        " performance.getEntriesByName('unpack')[0].startTime]"
    )
    # By the clock the machine may be busy; the work that stands between a reader and the page is what we answer for.
    assert painted < unpacked + 1000
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    try:
        driver.get(page.as_uri())
        metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        driver.execute_cdp_cmd("Performance.disable", {})
    worked = {metric["name"]: metric["value"] for metric in metrics}["TaskDuration"]
    assert 0 < worked < 2, json.dumps(metrics)
