"""Every example runs: the loop in one file learns, and notebooks print the figures that are kept in them."""

import runpy
from pathlib import Path

import nbformat
import pytest
import torch

from metis_agent.hdpo.contrast import contrasts, decision_loss
from tests.notebooks import EXAMPLES, pictures, printed, run_notebook, same

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.allow_hosts(["127.0.0.1", "localhost"])
@pytest.mark.timeout(900)
# The kernel's own sockets and event loops, when it goes.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_shows(path: Path, tmp_path: Path) -> None:
    kept = nbformat.read(path, as_version=4)
    fresh = run_notebook(path, tmp_path)
    for number, (before, after) in enumerate(zip(kept.cells, fresh.cells, strict=True)):
        tags = before.metadata.get("tags", [])
        if before.cell_type != "code" or "varies" in tags:
            continue
        tolerance = 0.15 if "rough" in tags else 0.002
        assert same(printed(before), printed(after), tolerance), (number, printed(before), printed(after))
        assert pictures(before) == pictures(after), number


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert all(cell.execution_count for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)
    assert path.stat().st_size < 400_000


def test_numbers_are_compared_as_numbers() -> None:
    assert same("accuracy 0.900, 3 calls", "accuracy 0.901, 3 calls", 0.002)
    assert not same("accuracy 0.900, 3 calls", "accuracy 0.950, 3 calls", 0.002)
    assert not same("accuracy 0.9", "recall 0.9", 0.002)
    assert not same("1 2", "1", 0.15)


def test_there_are_seven() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07"]


def test_the_loop_in_one_file_learns_when_not_to_call(capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / "hdpo_loop.py"
    assert len(path.read_text().splitlines()) <= 150
    before, after = runpy.run_path(str(path))["main"]()
    assert before["redundant"] >= 0.9
    assert after["redundant"] <= 0.1
    assert after["necessary"] >= 0.95
    assert after["accuracy"] >= before["accuracy"] - 0.02
    assert f"redundant  {before['redundant']:.2f} -> {after['redundant']:.2f}" in capsys.readouterr().out


def test_the_loops_contrast_is_the_trainers() -> None:
    loop = runpy.run_path(str(EXAMPLES / "hdpo_loop.py"))
    J, called = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)), torch.arange(30).view(5, 6) % 2 == 0
    log_probs = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    Delta = contrasts(J, called, torch.ones_like(called))
    expected = decision_loss(log_probs[:, 1], Delta, margin=loop["ODDS"]).mean()
    torch.testing.assert_close(loop["hinge"](J, called, log_probs), expected)
