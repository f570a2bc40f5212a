import json
import os
import sys

import pytest
import typer
from typer.testing import CliRunner

from metis_agent.cli import doctor as doctor_module
from metis_agent.cli.doctor import Check, doctor, examine
from metis_agent.errors import SandboxUnavailableError, StorageError
from metis_agent.tools import sandboxes
from metis_agent.tools.sandboxes import BackendReport
from metis_agent.tools.search.corpus import CorpusSearch

app = typer.Typer()
app.command()(doctor)


@pytest.fixture(autouse=True)
def no_sandbox_trials(monkeypatch):
    """Trying the sandboxes is their own tests' business."""
    reports = [
        BackendReport(backend="bubblewrap", works=False, problems=("not installed",)),
        BackendReport(backend="landlock", works=True),
    ]
    monkeypatch.setattr(sandboxes, "diagnose", lambda **_: reports)
    monkeypatch.setattr(
        doctor_module, "_python_images", lambda backend: Check(name="python images", status="ok", detail=backend)
    )


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def by_name(checks):
    return {check.name: check for check in checks}


def test_the_core_works_here(tmp_path):
    result = run("--json", "--store", str(tmp_path / "a" / "b"))
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["ok"] is True
    checks = {check["name"]: check for check in report["checks"]}
    assert {"python", "packages", "store", "text search", "python tool", "torch", "extra search"} <= set(checks)
    assert all(check["status"] == "ok" for check in checks.values() if check["core"])
    assert all(
        check["remedy"] for check in checks.values() if check["name"].startswith("extra ") and check["status"] != "ok"
    )
    assert checks["sandbox bubblewrap"]["status"] == "absent"
    assert checks["python tool"]["detail"] == "runs code in landlock"
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_images_are_searched_and_drawn(tmp_path, monkeypatch):
    assert by_name(examine(store=str(tmp_path)))["image search"].status == "ok"
    monkeypatch.undo()
    local = [report for report in sandboxes.diagnose() if report.works]
    if not local:
        pytest.skip("nothing contains code here")
    check = doctor_module._python_images(local[0].backend)
    assert (check.status, "images go in and come back" in check.detail) == ("ok", True)
    monkeypatch.setattr(doctor_module, "_DRAWS", "print('numpy')")
    check = doctor_module._python_images(local[0].backend)
    assert (check.status, check.remedy) == ("absent", "pip install 'langgraph-metis[images]' numpy matplotlib")
    assert "PIL is missing; matplotlib is missing" in check.detail


def test_a_table_for_people(tmp_path):
    result = run("--store", str(tmp_path))
    assert result.exit_code == 0
    assert "The core works." in result.stdout
    assert "absent" in result.stdout


def test_what_was_there_stays(tmp_path):
    (tmp_path / "kept").write_text("x")
    examine(store=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_store_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--store", str(tmp_path / "file" / "runs"))
    assert result.exit_code == 1
    assert "does not work" in result.stdout
    assert "--store" in by_name(examine(store=str(tmp_path / "file" / "runs")))["store"].remedy


def test_any_fsspec_place_may_be_the_store():
    assert by_name(examine(store="memory://doctor"))["store"].status == "ok"


def test_without_full_text_search(tmp_path, monkeypatch):
    def broken(documents):
        raise StorageError("no such module: fts5")

    monkeypatch.setattr(CorpusSearch, "build", broken)
    result = run("--json", "--store", str(tmp_path))
    check = {check["name"]: check for check in json.loads(result.stdout)["checks"]}["text search"]
    assert result.exit_code == 1
    assert (check["status"], check["detail"]) == ("broken", "StorageError: no such module: fts5")
    assert "FTS5" in check["remedy"]


def test_without_a_sandbox_the_agent_still_works(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sandboxes, "diagnose", lambda **_: [BackendReport(backend="landlock", works=False, problems=("old",))]
    )
    checks = by_name(examine(store=str(tmp_path)))
    assert checks["python tool"].status == "absent"
    assert "bubblewrap" in checks["python tool"].remedy
    assert run("--store", str(tmp_path)).exit_code == 0

    def breaks(**_):
        raise SandboxUnavailableError("worse")

    monkeypatch.setattr(sandboxes, "diagnose", breaks)
    assert by_name(examine(store=str(tmp_path)))["sandbox"].detail == "SandboxUnavailableError: worse"


def test_missing_and_old_packages_are_named(tmp_path, monkeypatch):
    versions = {"langgraph": "0.9", "pydantic": "missing", "ddgs": "missing"}
    real = doctor_module._version
    monkeypatch.setattr(doctor_module, "_version", lambda name: versions.get(name) or real(name))
    checks = by_name(examine(store=str(tmp_path)))
    assert checks["packages"].status == "broken"
    assert "pydantic is missing" in checks["packages"].detail
    assert "langgraph 0.9 is not" in checks["packages"].detail
    assert checks["extra search"] == Check(
        name="extra search",
        status="absent",
        detail="for search of the web: ddgs is missing",
        remedy="pip install 'langgraph-metis[search]'",
    )
    assert run("--store", str(tmp_path)).exit_code == 1


def test_a_namesake_is_named_and_how_to_part_with_it(tmp_path, monkeypatch):
    assert "metis-agent" not in by_name(examine(store=str(tmp_path)))
    theirs = tmp_path / "site-packages" / "metis_agent-2.0.dist-info"
    theirs.mkdir(parents=True)
    (theirs / "METADATA").write_text("Metadata-Version: 2.1\nName: metis-agent\nVersion: 2.0\n")
    monkeypatch.syspath_prepend(str(theirs.parent))
    check = by_name(examine(store=str(tmp_path)))["metis-agent"]
    assert (check.status, check.core) == ("broken", False)
    assert check.detail.startswith("metis-agent 2.0 is another project")
    assert "pip uninstall --yes metis-agent" in check.remedy
    assert run("--store", str(tmp_path)).exit_code == 0


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert by_name(examine(store=str(tmp_path)))["torch"].status == "absent"


def test_the_network_is_only_used_when_asked(tmp_path, monkeypatch):
    from metis_agent.tools.search import web

    class Search:
        def search(self, query, limit):
            raise TimeoutError("no network")

    monkeypatch.setattr(web, "web_search", lambda **_: Search())
    assert "web search" not in by_name(examine(store=str(tmp_path)))
    check = by_name(examine(store=str(tmp_path), online=True))["web search"]
    assert (check.status, check.core) == ("broken", False)
    assert "no network" in check.detail


def test_markup_in_a_finding_is_text(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sandboxes, "diagnose", lambda **_: [BackendReport(backend="x", works=False, problems=("[/nope]",))]
    )
    assert run("--store", str(tmp_path)).exit_code == 0
    assert os.listdir(tmp_path) == []
