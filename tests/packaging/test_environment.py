"""What `detect` finds, and the packages on the index that are not what their name says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import load_file

from blipfast import environment
from blipfast.environment import Package, check, detect

ROOT = Path(__file__).resolve().parents[2]


def fake(tmp_path: Path, name: str, version: str, files: list[str]) -> None:
    """An installed distribution `name` with the given files."""
    info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")


def listed(name: str) -> Package:
    return next(package for package in environment.OPTIONAL if package.distribution == name)


def test_detect_names_this_machine() -> None:
    found = detect()
    assert found.required["torch"]
    assert found.required["transformers"]
    assert found.cpu["isa"]
    assert set(found.optional) == {package.distribution for package in environment.OPTIONAL}
    text = "\n".join(found.lines())
    assert "native CPU operators" in text
    assert "torch" in text


def test_a_package_that_is_there() -> None:
    found = check(Package("numpy", "numpy", "1.0", "arrays"))
    assert found.usable
    assert found.note == "arrays"


def test_a_package_that_is_too_old() -> None:
    found = check(Package("numpy", "numpy", "999", "arrays"))
    assert not found.usable
    assert "999 or newer" in found.note


def test_a_package_that_is_absent() -> None:
    found = check(Package("no-such-thing-here", "no_such_thing", "1", "nothing", "gpu"))
    assert (found.usable, found.version) == (False, None)
    assert "pip install 'blipfast[gpu]'" in found.note


def test_the_wrong_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "apex", "0.9.10", ["apex/__init__.py", "apex/models.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    found = check(listed("apex"))
    assert not found.usable
    assert "not NVIDIA's apex" in found.note


def test_the_right_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "apex", "0.1", ["apex/__init__.py", "apex/normalization/__init__.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert check(listed("apex")).usable


def test_the_empty_dali(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "nvidia-dali", "2.2.0", ["nvidia_dali/__init__.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(environment, "_spec", lambda module: None)  # the real one may be there
    found = check(listed("nvidia-dali"))
    assert not found.usable
    assert "nvidia-dali-cuda130" in found.note


def test_the_floors_agree_with_the_extras() -> None:
    """A floor stands in the table for those who look, in pyproject.toml for pip: never two."""
    extras = load_file(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    compared = 0
    for package in environment.OPTIONAL:
        for requirement in extras.get(package.extra or "", []):
            match = re.match(r"([\w.-]+)(?:\[\w+\])?(?:>=|==)([\w.]+)", requirement)
            if match and match[1] == package.distribution:
                assert match[2].startswith(package.floor), requirement
                compared += 1
    assert compared >= 8


def test_every_extra_of_the_table_exists() -> None:
    project = load_file(ROOT / "pyproject.toml")["project"]
    named = {package.extra for package in environment.OPTIONAL if package.extra}
    assert named <= set(project["optional-dependencies"])
