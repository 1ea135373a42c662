"""Compile every Triton kernel ahead of time, without a GPU, and look at the machine code.

    python -m benchmarks.aot --arch 80 90 100 gfx942            # the table in benchmarks/results/
    python -m benchmarks.aot --arch 90 --quick --json -         # a part of it, to standard output

The launchers themselves are called, on tensors without storage, with their launches recorded: what
is compiled is exactly what they would start. The exit status is 1 when a kernel spills registers,
needs more shared memory than there is, or multiplies matrices without tensor cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# Kernels under the interpreter cannot be compiled; this must come before Triton is imported.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from blipfast.kernels import _runtime
from blipfast.kernels.tiles import nth_candidate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.aot_cases import CASES
from benchmarks.machine_code import amd_registers_and_spills, nvidia_code, nvidia_registers

RESULTS = Path(__file__).parent / "results"
_OPTIONS = ("num_warps", "num_stages", "num_ctas")
# Shared memory a block may take and a multiprocessor has, in bytes; registers and threads of one.
_NVIDIA = {
    "80": (163 << 10, 164 << 10),
    "90": (227 << 10, 228 << 10),
    "100": (227 << 10, 228 << 10),
}
_REGISTERS, _THREADS = 65536, 2048
_WIDE = r"IMAD\.(?:WIDE|HI)|v_mul_hi_u32|v_mad_u64_u32"
_TENSOR_CORE = {"80": "HMMA", "90": "HGMMA|HMMA", "100": "UTC[A-Z]*MMA|HMMA", "gfx942": "mfma"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch, as far as the compiler cares."""

    kernel: Any
    label: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]


# Spills that are known and not yet mended, by card and kernel; one more is a fault.
KNOWN_SPILLS: dict[tuple[str, str], int] = {}


@dataclasses.dataclass
class Row:
    """One compiled kernel of the table."""

    arch: str
    case: str
    kernel: str
    config: str
    registers: int
    spills: int
    shared: int
    tensor_core: int
    wide_products: int  # of two 32-bit numbers, in whole: draws of dropout, and addresses
    occupancy: float
    faults: list[str]


def _specialize(value: Any, name: str, path: tuple[int, ...], kernel: Any, launch: Launch) -> Any:
    """The type of an argument by Triton's rules; notes constants and divisibility by 16."""
    if isinstance(value, tuple):
        parts = enumerate(value)
        return tuple(_specialize(v, name, (*path, i), kernel, launch) for i, v in parts)
    plain = name not in (kernel.do_not_specialize or ())
    if (
        value is None
        or isinstance(value, (bool, str))
        or (plain and type(value) is int and value == 1)
    ):
        launch.constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        launch.attributes[path] = [["tt.divisibility", 16]]
        return "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[1]]
    if isinstance(value, float):
        return "fp32"
    if plain and value % 16 == 0:
        launch.attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def record(label: str, run: Callable[[], Any], keys: int | None = None) -> list[Launch]:
    """The launches that `run` would make."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: Any, args: Sequence[Any], meta: dict[str, Any]) -> None:
        meta = meta if keys is None else {**meta, "BLOCK_N": keys}
        options = {k: meta[k] for k in _OPTIONS if k in meta}
        launch = Launch(kernel, label, {}, {}, {}, options)
        values = [*args, *(meta[name] for name in kernel.arg_names[len(args) :])]
        for i, (name, value) in enumerate(zip(kernel.arg_names, values, strict=True)):
            if kernel.params[i].is_constexpr:
                launch.constants[(i,)] = value
                launch.signature[name] = "constexpr"
            else:
                launch.signature[name] = _specialize(value, name, (i,), kernel, launch)
        launches.append(launch)

    _runtime.recorder = note
    try:
        run()
    finally:
        _runtime.recorder = None
    return launches


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compile for `arch` ("80", "90", "100" or "gfx…")."""
    nvidia = not arch.startswith("gfx")
    target = GPUTarget("cuda", int(arch), 32) if nvidia else GPUTarget("hip", arch, 64)
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=target, options=dict(launch.options))


def read_all(launches: Sequence[Launch], kernels: Sequence[Any], arch: str) -> list[Row]:
    """What the compiler made of the launches."""
    if arch.startswith("gfx"):
        code = [compiled.asm["amdgcn"] for compiled in kernels]
    else:
        code = nvidia_code(arch, kernels)
    return [_read(*found, arch) for found in zip(launches, kernels, code, strict=True)]


def _read(launch: Launch, compiled: Any, code: str, arch: str) -> Row:
    nvidia = not arch.startswith("gfx")
    config = " ".join(
        f"{name.lower().removeprefix('block_')}={launch.constants[(i,)]}"
        for i, name in enumerate(launch.kernel.arg_names)
        if name.startswith("BLOCK_")
    )
    config += f" warps={launch.options['num_warps']} stages={launch.options['num_stages']}"
    if nvidia:
        registers = nvidia_registers(compiled)
        spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    else:
        registers, spills = amd_registers_and_spills(code)
    tensor_core = len(re.findall(_TENSOR_CORE[arch], code))
    row = Row(
        arch=arch if not nvidia else f"sm_{arch}",
        case=launch.label,
        kernel=launch.kernel.__name__,
        config=config,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        tensor_core=tensor_core,
        wide_products=len(re.findall(_WIDE, code)),
        occupancy=_occupancy(arch, registers, compiled.metadata.shared, launch.options),
        faults=[],
    )
    limit = _NVIDIA[arch][0] if nvidia else 64 << 10
    if spills > KNOWN_SPILLS.get((row.arch, row.kernel), 0):
        row.faults.append(f"{spills} spills")
    if row.shared > limit:
        row.faults.append(f"{row.shared} bytes of shared memory of {limit}")
    if _has_dots(compiled) and not tensor_core:
        row.faults.append("no tensor-core instructions")
    return row


def _has_dots(compiled: Any) -> bool:
    """Products that tensor cores should do: all but those asked for in full float32."""
    dots = re.findall(r"tt\.dot .*", compiled.asm["ttir"])
    return any("xf32> *" not in dot or "inputPrecision = tf32" in dot for dot in dots)


def _occupancy(arch: str, registers: int, shared: int, options: dict[str, int]) -> float:
    """Share of the threads that a multiprocessor can hold."""
    if arch.startswith("gfx"):
        return min(8, 512 // max(8, -(-registers // 8) * 8)) / 8
    threads = 32 * options["num_warps"]
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = _NVIDIA[arch][1] // (shared + 1024)
    return min(by_registers, by_shared, _THREADS // threads) * threads / _THREADS


_CANDIDATES = 3  # at most, that a launcher may choose between


def compile_all(
    archs: Sequence[str], quick: bool, only: str = "", keys: int | None = None
) -> list[Row]:
    """Every distinct kernel and configuration, once for each architecture.

    quick: of each kernel the tiles alone that are taken without tuning.
    """
    rows = []
    for arch in archs:
        _runtime.forced_target = "hip" if arch.startswith("gfx") else int(arch)
        seen, wanted = set(), []
        for cases in CASES:
            for label, run in cases(quick):
                if only not in label:
                    continue
                launches = []
                for place in range(1 if quick else _CANDIDATES):
                    with nth_candidate(place):
                        launches += record(label, run, keys)
                for launch in launches:
                    constants = tuple(sorted(launch.constants.items(), key=str))
                    types = str((launch.signature, launch.attributes, constants, launch.options))
                    if (launch.kernel.__name__, types) not in seen:
                        seen.add((launch.kernel.__name__, types))
                        wanted.append(launch)
        rows += read_all(wanted, [compile_launch(launch, arch) for launch in wanted], arch)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        f"Triton {triton.__version__}, compiled without a GPU by `python -m benchmarks.aot`.",
        "Occupancy: share of a multiprocessor's threads, from registers and shared memory. Wide",
        "products are those of 32 by 32 bits to 64: dropout's draws, 14 each, and addresses.",
        "",
        "| arch | case | kernel | configuration | registers | spills | shared, bytes "
        "| tensor-core instr. | wide products | occupancy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.arch} | {r.case} | {r.kernel} | {r.config} | {r.registers} | {r.spills} "
            f"| {r.shared} | {r.tensor_core} | {r.wide_products} | {r.occupancy:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100", "gfx942"])
    parser.add_argument("--quick", action="store_true", help="a few configurations only")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", metavar="FILE", help="write rows here ('-': standard output)")
    parser.add_argument("--keys", type=int, help="BLOCK_N of every kernel, to see what it does")
    args = parser.parse_args()
    rows = compile_all(args.arch, args.quick, args.only, args.keys)
    records = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
    if args.json == "-":
        print(records)
    elif args.json:
        _write(Path(args.json), records)
    else:
        RESULTS.mkdir(exist_ok=True)
        for arch in args.arch:
            name = arch if arch.startswith("gfx") else f"sm_{arch}"
            _write(RESULTS / f"aot-{name}.md", table([r for r in rows if r.arch == name]))
    faulty = [row for row in rows if row.faults]
    for row in faulty:
        print(row.arch, row.case, row.kernel, row.config, *row.faults, sep="; ", file=sys.stderr)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
