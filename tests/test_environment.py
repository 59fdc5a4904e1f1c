"""The files that say what is installed agree with each other, and the project carries its licence and citations."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rattler import MatchSpec

from dynattn import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
METADATA = PROJECT["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = [Requirement(line) for line in CONSTRAINTS.splitlines()]
PYTHONS = [f"3.{minor}" for minor in range(30)]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def direct() -> list[Requirement]:
    """Every requirement of pyproject.toml, all extras, the project itself left out."""
    lists = [METADATA["dependencies"], *METADATA["optional-dependencies"].values()]
    requirements = [Requirement(text) for texts in lists for text in texts]
    return [requirement for requirement in requirements if requirement.name != METADATA["name"]]


# -------------------------------------------------------------------------------------------------------------- pins


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run"])
def test_no_addresses(name):
    assert "://" not in (ROOT / name).read_text()


def test_constraints_pin_one_version_of_each_package():
    names = [normal(pin.name) for pin in PINS]
    assert names == sorted(set(names))
    for pin in PINS:
        assert not pin.extras  # pip takes none in a constraint
        assert [specifier.operator for specifier in pin.specifier] == ["=="]


@pytest.mark.parametrize("requirement", direct(), ids=str)
def test_every_direct_dependency_is_pinned(requirement):
    (pin,) = (pin for pin in PINS if normal(pin.name) == normal(requirement.name))
    (version,) = (specifier.version for specifier in pin.specifier)
    assert pin.marker is None, "pinned on some machines only"
    assert version in requirement.specifier


def test_all_extras_are_in_all():
    extras = METADATA["optional-dependencies"]
    (everything,) = extras["all"]
    assert Requirement(everything).extras == set(extras) - {"all"}
    assert PROJECT["dependency-groups"]["dev"] == ["dynattn[all]"]


def test_uv_has_the_same_pins():
    pins = PROJECT["tool"]["uv"]["constraint-dependencies"]
    assert {Requirement(pin).name for pin in pins} == {"torch", "torchvision", "timm", "numpy", "numba"}
    assert set(pins) <= set(CONSTRAINTS.splitlines())


# ------------------------------------------------------------------------------------------------------------- conda


def test_environment_yml_is_pyproject_for_conda():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    specs = {spec.name.normalized: spec for spec in map(MatchSpec, conda)}
    assert environment["name"] == METADATA["name"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[all]"]}
    assert set(specs) == {"python", "pip"}

    allowed = SpecifierSet(str(specs["python"].version))
    classified = [text.rpartition(" ")[2] for text in METADATA["classifiers"] if "Python :: 3." in text]
    assert [python for python in PYTHONS if python in allowed] == classified
    assert all(python in SpecifierSet(METADATA["requires-python"]) for python in classified)
    assert Version(classified[0]) == Version(METADATA["requires-python"].removeprefix(">="))


# ------------------------------------------------------------------------------------------------ what goes with it


def test_no_lock_file_is_tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [name for name in listed.stdout.splitlines() if name.endswith(".lock")]


def test_ci_runs_make_test_and_what_is_slow():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-2:] == ["make test", ".venv/bin/pytest -n 2 -m slow"]  # pytest's summary is the last that it prints
    assert "set -euo pipefail" in lines
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n\nCopyright (c) 2026 the dynattn authors\n")
    assert METADATA["license"] == "MIT" and METADATA["license-files"] == ["LICENSE"]


def test_citation_names_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"].startswith("dynattn") and citation["authors"] == [{"name": "the dynattn authors"}]
    assert (str(citation["version"]), citation["license"]) == (__version__, METADATA["license"])
    first_authors = [paper["authors"][0]["family-names"] for paper in citation["references"]]
    assert first_authors == ["Xia", "Zhu", "BaoLong", "Ren", "Liu", "Zhang"]
    for paper in citation["references"]:
        assert paper["title"] and paper["type"] and 2022 <= paper["year"] <= 2024
        assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])
