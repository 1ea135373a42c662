"""`blipfast tune`: which tiles the Triton kernels should run with on this card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from blipfast.cli._parsing import DTYPES, make_parser, parse

_EXAMPLES = """\
  blipfast tune
  blipfast tune --dtypes "[bf16, fp16]" --device cuda:1
  TRITON_INTERPRET=1 blipfast tune --device cpu --small    # without a card, to see it work"""


def main(argv: Sequence[str]) -> int:
    parser = make_parser(
        "tune",
        "Times the few tiles that each kernel may run with, at BLIP's shapes, and keeps the "
        "fastest in a table that every later run on such a card reads (~/.cache/blipfast/tiles, or "
        "BLIPFAST_TILES). Some minutes; without it kernels run with what is best on paper.",
        _EXAMPLES,
    )
    parser.add_argument("--device", type=str, default="auto", help="cuda, cuda:N or auto")
    parser.add_argument(
        "--dtypes", type=list[Literal["fp32", "bf16", "fp16"]], default=["bf16"], help="of tensors"
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes, for the interpreter")
    return _run(**parse(parser, argv))


def _run(device: str, dtypes: list[str], small: bool) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from blipfast.ops import tuning
    from blipfast.train.recipes import pick_device

    where = pick_device(device)
    console = Console(highlight=False)
    found = []
    with console.status("tuning") as status:
        for one in tuning.tune(where, [getattr(torch, DTYPES[d]) for d in dtypes], small=small):
            found.append(one)
            status.update(f"tuning: {len(found)} kernels, {one.kernel}, {one.key}")
    table = Table("kernel", "sizes", "chosen", "of the first's time")
    for one in found:
        chosen = " ".join(f"{k.lower().removeprefix('block_')}={v}" for k, v in one.chosen.items())
        share = one.seconds[one.candidates.index(one.chosen)] / one.seconds[0]
        table.add_row(one.kernel, one.key, chosen, f"{share:.0%}")
    console.print(table)
    print(tuning.write(where, found))
    return 0
