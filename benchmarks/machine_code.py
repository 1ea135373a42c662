"""The machine code of compiled kernels, as text: what `aot.py` looks at."""

from __future__ import annotations

import bisect
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_NVDISASM_NAMES = {"80": "SM80", "90": "SM90a", "100": "SM100a"}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(.*)", re.MULTILINE)


def nvidia_registers(compiled: Any) -> int:
    """Of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    return int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]


def nvidia_code(arch: str, kernels: Sequence[Any]) -> list[str]:
    """Instructions of each kernel, in one call: the disassembler takes long to start."""
    if not kernels:
        return []
    code = [_instructions(compiled.asm["cubin"]) for compiled in kernels]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(code))
        file.flush()
        text = _run("nvdisasm", "-b", _NVDISASM_NAMES[arch], "-ndf", file.name)
    stops = list(accumulate(map(len, code)))
    lines: list[list[str]] = [[] for _ in code]
    for address, line in _INSTRUCTION.findall(text):
        lines[bisect.bisect_right(stops, int(address, 16))].append(line)
    if not all(lines):
        raise RuntimeError(f"nvdisasm found no instructions in some kernels for sm_{arch}")
    return ["\n".join(found) for found in lines]


def amd_registers_and_spills(text: str) -> tuple[int, int]:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]

    # Scalar registers spill into lanes of vector registers, not into memory.
    return number("vgpr_count"), number("vgpr_spill_count")


def _run(tool: str, *arguments: str) -> str:
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(elf: bytes) -> bytes:
    """The `.text` sections of an ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<3H", elf, 0x3A)
    # Name, type, flags, address, offset, length and what does not matter here.
    sections = [struct.unpack_from("<2I4Q", elf, table + i * size) for i in range(count)]
    found = b""
    for name, *_, offset, length in sections:
        if elf[sections[names][4] + name :].startswith(b".text."):
            found += elf[offset : offset + length]
    return found
