"""`blipfast info`: what is here, and which backend every operator takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from blipfast.cli._parsing import DTYPES, make_parser, parse

_EXAMPLES = """\
  blipfast info
  blipfast info --dtype bf16
  BLIPFAST_BACKEND=cross_attention=reference blipfast info --json"""


def main(argv: Sequence[str]) -> int:
    parser = make_parser(
        "info",
        "Versions, processor, cards, optional packages, and for each operator the backend that "
        "would run and why.",
        _EXAMPLES,
    )
    from typing import Literal

    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda or auto")
    parser.add_argument(
        "--dtype", type=Literal["fp32", "bf16", "fp16"], default="fp32", help="of the tensors"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    values = parse(parser, argv)
    return _run(**values)


def _run(device: str, dtype: str, json: bool) -> int:
    import torch

    from blipfast import __version__
    from blipfast.environment import detect
    from blipfast.ops._dispatch import explain
    from blipfast.train.recipes import pick_device

    where = pick_device(device)
    backends = explain(where, getattr(torch, DTYPES[dtype]))
    environment = detect()
    if json:
        _print_json(__version__, environment, backends)
    else:
        _print_tables(__version__, environment, backends, f"{where}, {dtype}")
    return 0


def _print_json(version: str, environment: Any, backends: dict[str, Any]) -> None:
    rows = {op: {"backend": name, "why": why} for op, (name, why) in backends.items()}
    print(
        json.dumps(
            {"blipfast": version, **dataclasses.asdict(environment), "backends": rows}, indent=2
        )
    )


def _print_tables(version: str, environment: Any, backends: dict[str, Any], where: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    machine = Table("here", "what", title=f"blipfast {version}", title_justify="left")
    machine.add_row("Python", f"{environment.python} on {environment.system}")
    for name, found in environment.required.items():
        machine.add_row(name, found or "not installed")
    machine.add_row("CPU", ", ".join(f"{k} {v}" for k, v in environment.cpu.items()))
    for card in environment.cuda:
        machine.add_row("CUDA", ", ".join(f"{k} {v}" for k, v in card.items()))
    if not environment.cuda:
        machine.add_row("CUDA", "no card that torch can use")
    machine.add_row("native", escape(environment.native))
    packages = Table("package", "version", "usable", "for", title="optional", title_justify="left")
    for name, one in environment.optional.items():
        packages.add_row(name, one.version or "", "yes" if one.usable else "no", escape(one.note))
    chosen = Table("operator", "backend", "why", title=f"backends ({where})", title_justify="left")
    for op, (backend, why) in backends.items():
        chosen.add_row(op, backend, escape(why))
    for table in (machine, packages, chosen):
        console.print(table)
