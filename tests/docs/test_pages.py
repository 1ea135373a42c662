"""Every code block of the documentation and the README is run, or at least held to the project."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml

from blipfast.capfilt.bootstrap import BootstrapConfig, packaged_bootstraps
from blipfast.cli import COMMANDS, main
from blipfast.cli._parsing import add_dataclass, make_parser, parse_as
from blipfast.train.config import TrainConfig, packaged_configs

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs" / "pages").glob("*.md")), ROOT / "README.md"]
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
FOREIGN = ("the original", "LAVIS")  # packages that are not installed: their code is only parsed


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    code: str
    where: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        indent = len(found["indent"])
        code = "\n".join(line[indent:] for line in found["body"].splitlines()) + "\n"
        language, _, rest = found["info"].strip().partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        line = text[: found.start()].count("\n") + 1
        yield Block(language, title[1] if title else "", code, f"{page.name}, line {line}")


def commands(code: str) -> list[list[str]]:
    """The words of each command, comments and continued lines dealt with."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words: list[str], where: str) -> None:
    """Runs a command as far as it can be run here."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "blipfast":
        check_blipfast(rest, where)
    elif program == "torchrun":
        check_torchrun(rest, where)
    elif program == "python":
        done = subprocess.run(
            [sys.executable, *rest], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{where}: {done.stderr[-2000:]}"
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), where
    elif program == "pip":
        check_pip(rest, where)
    else:
        pytest.fail(f"{where}: no way to check {program!r}")


def check_blipfast(rest: list[str], where: str) -> None:
    assert rest[0] in COMMANDS, where
    if "…" in rest or rest[0] == "serve":  # a page that runs until it is stopped: tests/serve
        parse_only(rest, where)
        return
    if rest[0] == "train" and "--dry_run" not in rest:
        rest = [*rest, "--dry_run", "true"]
    assert main(rest) == 0, f"{where}: {' '.join(rest)}"


def parse_only(rest: list[str], where: str) -> None:
    from blipfast.serve.app import ServeConfig

    assert rest[0] == "serve", where
    parser = make_parser("serve", "")
    add_dataclass(parser, ServeConfig)
    parse_as(ServeConfig, parser, rest[1:])


def check_torchrun(rest: list[str], where: str) -> None:
    """Its own options by its own parser; the script's by a dry run on this process."""
    from torch.distributed.run import parse_args

    parsed = parse_args([word.replace("HOST", "localhost") for word in rest])
    script = Path(parsed.training_script)
    if script.is_file():
        name = {"pretrain.py": "pretrain"}[script.name]
        check_blipfast(["train", "--config", name, *parsed.training_script_args], where)
    else:
        assert parsed.training_script == "blipfast.cli", where
        check_blipfast(parsed.training_script_args, where)


def check_pip(rest: list[str], where: str) -> None:
    extras = metadata("blipfast").get_all("Provides-Extra")
    assert rest[0] == "install", where
    for word in rest[1:]:
        found = re.fullmatch(r"blipfast(?:\[(\w+)\])?", word)
        assert found, where
        assert found[1] is None or found[1] in extras, where


def check_yaml(block: Block, tmp_path: Path) -> None:
    """Settings are those that the command line takes; an unknown key is an error."""
    file = tmp_path / "settings.yaml"
    file.write_text(block.code)
    cls, named, first = {
        "train": (TrainConfig, packaged_configs(), []),
        "bootstrap": (BootstrapConfig, packaged_bootstraps(), ["--config", "paper"]),
    }[block.title]
    parser = make_parser("check", "")
    add_dataclass(parser, cls)
    parse_as(cls, parser, [*first, "--config", str(file)], named)
    assert yaml.safe_load(block.code)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path, here: Path, tmp_path: Path) -> None:
    names: dict = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python" and block.title in FOREIGN:
            compile(block.code, block.where, "exec")
        elif block.language == "python":
            exec(compile(block.code, block.where, "exec"), names)
        elif block.language in ("bash", ""):
            for words in commands(block.code):
                check_command(words, block.where)
        elif block.language == "yaml":
            check_yaml(block, tmp_path)
        else:
            pytest.fail(f"{block.where}: nothing checks blocks of {block.language!r}")


def test_no_block_escapes() -> None:
    """The parser sees as many fences as there are, and every page has some text of its own."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^ *```", text, re.MULTILINE)
        assert len(fences) == 2 * len(list(blocks(page))), page
    assert sum(len(list(blocks(page))) for page in PAGES) > 30


def test_a_wrong_block_is_noticed(here: Path) -> None:
    """So that the checks are seen to fail."""
    for command, message in (
        ("blipfast caption photos/ --checkpoint nowhere", ""),
        ("blipfast trian --config pretrain", ""),
        ("make everything", ""),
        ("pip install 'blipfast[nothing]'", ""),
        ("curl example.org", "no way to check"),
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
            check_command(commands(command)[0], "here")
