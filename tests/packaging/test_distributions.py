"""What somebody gets who installs: every file that the code opens, and nothing of ours that is no business of theirs.

Whether it *works* in a clean environment takes minutes: `make wheel-test`, see `clean_rooms`.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import metis_agent
from tests.packaging.clean_rooms import ROOMS, USES
from tests.packaging.distributions import (
    ROOT,
    build,
    names_in_sdist,
    names_in_wheel,
    strays,
    wanted_in_wheel,
)

pytest.importorskip("hatchling")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, BUILD = PYPROJECT["project"], PYPROJECT["build-system"]["requires"]
OPENED = {
    "metis_agent/py.typed",
    "metis_agent/hdpo/configs/laptop.yaml",
    "metis_agent/hdpo/configs/accelerate/fsdp.yaml",
    "metis_agent/report/page.html",
    "metis_agent/report/page.css",
    "metis_agent/report/page.js",
    "metis_agent/hdpo/rubrics/answer.md",
    "metis_agent/hdpo/rubrics/strategy.md",
    "metis_agent/worlds/almanac/weights/model.safetensors",
    "metis_agent/worlds/almanac/weights/tokenizer.json",
    "metis_agent/worlds/almanac/weights/chat_template.jinja",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    sdist, wheel = build(ROOT, tmp_path_factory.mktemp("dist"), "sdist", "wheel")
    return sdist, wheel


def test_the_wheel_holds_the_package_whole_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = names_in_wheel(built[1])
    package = {name for name in names if name.startswith("metis_agent/")}
    assert package >= OPENED
    assert package == wanted_in_wheel(ROOT / "metis_agent")
    information = f"langgraph_metis-{metis_agent.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"metis_agent", information}
    assert f"{information}/licenses/LICENSE" in names
    assert strays(names) == []
    assert built[1].stat().st_size < 20_000_000


def test_the_sdist_can_be_tested_and_built(built: tuple[Path, Path], tmp_path: Path) -> None:
    names = names_in_sdist(built[0])
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "tests/test_layers.py"} <= names
    assert {name for name in names if name.startswith("metis_agent/")} == wanted_in_wheel(ROOT / "metis_agent")
    assert strays(names) == []
    with tarfile.open(built[0]) as file:
        file.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    (again,) = build(source, tmp_path / "dist", "wheel")
    assert _contents(again) == _contents(built[1])


def test_the_metadata_says_what_the_project_says(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as file:
        text = file.read(f"langgraph_metis-{metis_agent.__version__}.dist-info/METADATA").decode()
        points = file.read(f"langgraph_metis-{metis_agent.__version__}.dist-info/entry_points.txt").decode()
    said = Parser().parsestr(text)
    assert (said["Name"], said["Version"], said["License-Expression"]) == (
        "langgraph-metis", metis_agent.__version__, "Apache-2.0",
    )  # fmt: skip
    assert set(said.get_all("Provides-Extra") or ()) == set(PROJECT["optional-dependencies"])
    assert "metis = metis_agent.cli:main" in points
    assert (ROOT / "README.md").read_text().strip() in text


def test_the_lock_holds_every_requirement_within_its_range_and_nothing_but_versions() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    locked = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line) for line in lines)
    here = {
        canonicalize_name(found.name): next(iter(found.specifier)).version
        for found in locked
        if found.marker is None or found.marker.evaluate()
    }
    wanted = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values(), BUILD, ["editables", "pip", "torch"]]
    for requirement in map(Requirement, chain(*wanted)):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(here[canonicalize_name(requirement.name)]), requirement


def test_all_means_every_extra_that_users_have() -> None:
    extras = PROJECT["optional-dependencies"]
    everything = set(re.findall(r"[\w-]+", extras["all"][0].partition("[")[2]))
    assert everything == set(extras) - {"all", "docs", "dev"}


def test_every_extra_has_a_clean_room_and_a_use() -> None:
    assert set(ROOMS) == {"", *PROJECT["optional-dependencies"]}
    assert {path.stem for path in USES.glob("*.py")} == {name or "runtime" for name in ROOMS}


def _contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as file:
        return {name: hashlib.sha256(file.read(name)).hexdigest() for name in file.namelist()}
