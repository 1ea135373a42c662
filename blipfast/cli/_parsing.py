"""Typed arguments by jsonargparse: dataclasses, YAML, dotted overrides, errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from blipfast.errors import ConfigError

T = TypeVar("T")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # short names to torch's


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's types and defaults, with examples left as they are written."""


def make_parser(
    command: str, description: str, examples: str = "", usage: str | None = None
) -> ArgumentParser:
    """A parser whose help ends with examples, and which also reads `--config FILE.yaml`.

    usage: instead of a list of all options.
    """
    parser = ArgumentParser(
        prog=f"blipfast {command}",
        usage=usage,
        description=description,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,  # a misspelt option must not pass for a longer one
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of the options below; later options on the command line win",
    )
    return parser


def add_dataclass(
    parser: ArgumentParser, cls: type, helps: Mapping[str, str] | None = None
) -> None:
    """One option for each field of `cls` and of the dataclasses in it, dotted.

    A field's help is its metadata "help", or what `helps` says.
    """
    parser.add_class_arguments(cls, nested_key=None)
    for group in parser._action_groups:
        if group.title and group.title.startswith("<class"):
            group.title = group.title.split("'")[1].rpartition(".")[2]
    texts = {**dict(_helps(cls, "")), **(helps or {})}
    for action in parser._actions:
        if action.dest in texts:
            action.help = texts[action.dest]


def _helps(cls: type, prefix: str) -> Any:
    hints = get_type_hints(cls)
    for one in dataclasses.fields(cls):
        kind = hints[one.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _helps(kind, f"{prefix}{one.name}.")
        elif "help" in one.metadata:
            yield f"{prefix}{one.name}", one.metadata["help"]


def parse(
    parser: ArgumentParser, argv: Sequence[str], named: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """The arguments by name, dataclasses built. Raises ConfigError that names the key.

    named: configurations that `--config` knows by name, unless a file has that name.
    """
    try:
        values = parser.parse_args(_with_paths(list(argv), named or {}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the older name of `instantiate` warns
            build = getattr(parser, "instantiate", None) or parser.instantiate_classes
            built = build(values)
    except argparse.ArgumentError as error:
        raise ConfigError(_in_words(str(error), parser)) from error
    return {key: value for key, value in vars(built).items() if key != "config"}


def parse_as(
    cls: type[T],
    parser: ArgumentParser,
    argv: Sequence[str],
    named: Mapping[str, Path] | None = None,
) -> T:
    """As `parse`, for a parser that has just the fields of `cls`."""
    return cls(**parse(parser, argv, named))


def _with_paths(argv: list[str], named: Mapping[str, Path]) -> list[str]:
    """`--config NAME` with the path of the packaged configuration of that name."""
    out, expects = [], False
    for word in argv:
        flag, equals, value = word.partition("=")
        if expects:
            word = _path_of(word, named)
        elif flag == "--config" and equals:
            word = f"--config={_path_of(value, named)}"
        expects = word == "--config"
        out.append(word)
    return out


def _path_of(value: str, named: Mapping[str, Path]) -> str:
    if not named or Path(value).is_file():
        return value
    if value in named:
        return str(named[value])
    if not Path(value).suffix and not Path(value).exists():
        raise ConfigError(f"--config {value}: neither a file nor one of {', '.join(named)}")
    return value


def _in_words(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message in one line, with the full name of the key and what may be meant."""
    known = [action.dest for action in parser._actions]
    group = re.match(r"Group '([^']+)' does not accept option '([^']+)'", message)
    single = re.match(r"Option '([^']+)' is not accepted", message)
    unknown = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
    if group or single:
        key = ".".join(group.groups()) if group else single.group(1)  # type: ignore[union-attr]
        return f"unknown key {key}{_hint(key, known)}"
    if unknown:
        words = unknown.group(1).split()
        keys = [word.split("=")[0] for word in words if word.startswith("-")]
        hint = _hint(keys[0].lstrip("-"), known) if keys else ""
        return f"unknown arguments: {' '.join(words)}{hint}"
    wrong = re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    if wrong:
        return f"{wrong.group(1)}: {_reason(wrong.group(2))}"
    return " ".join(message.split())


def _reason(text: str) -> str:
    given = re.search(r"Given value: (.*)", text, re.DOTALL)
    kinds = re.search(r"Subtypes: \[(.*?)\]\n", text, re.DOTALL)
    if given and kinds:
        text = f"expected {kinds.group(1).replace(', ', ' or ')}, got {given.group(1)}"
    text = re.sub(r"<class '([\w.]+)'>", lambda m: m.group(1).split(".")[-1], text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = text.replace("NoneType", "null").replace("Expected a ", "expected ")
    return re.sub(r"\. Got value: ", ", got ", " ".join(text.split()))


def _hint(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    if not near:  # a right name in the wrong group, or a nested key without its group
        near = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    return f"; did you mean {near[0]}?" if near else ""
