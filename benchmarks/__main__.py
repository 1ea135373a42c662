"""Times every code beside its baseline, and writes JSON and a page of plots.

python -m benchmarks                          # everything, about half an hour on two CPU cores
python -m benchmarks --only rerank caption    # some of it
python -m benchmarks --out results            # elsewhere than benchmarks/results
python -m benchmarks --device cuda --dtype bf16               # what a GPU can show
python -m benchmarks --op all --device cuda --dtype bf16      # every operator on a GPU
python -m benchmarks --op cross_attention --backend torch     # one operator, one backend
python -m benchmarks --op all --sweep         # time, memory and share of the roof over sizes
TRITON_INTERPRET=1 python -m benchmarks --op all --small      # the kernels without a GPU, tiny
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_ops import OPTIONS_VAR
from benchmarks.op_cases import CASES
from benchmarks.report import Row, write_page
from benchmarks.sweep_page import write_sweep_page
from benchmarks.workloads import DEVICE_VAR
from blipfast.ops._products import bf16_products

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument(
        "--op", nargs="+", choices=["all", *CASES], metavar="OP", help=", ".join(CASES)
    )
    parser.add_argument("--backend", default="all", help="names separated by commas")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of operators"
    )
    parser.add_argument("--small", action="store_true", help="tiny operators, for the interpreter")
    parser.add_argument("--sweep", action="store_true", help="operators over sizes, with plots")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch; --small runs the kernels in the interpreter")
    if arguments.sweep and not arguments.op:
        arguments.op = ["all"]
    everything = [n for n in NAMES if n != "loader" or arguments.device == "cpu"]
    only = ["ops"] if arguments.op else arguments.only or everything
    op = list(CASES) if "all" in (arguments.op or ["all"]) else arguments.op
    names = ("backend", "device", "dtype", "small", "sweep")
    options = {"op": op, **{name: getattr(arguments, name) for name in names}}
    os.environ |= {OPTIONS_VAR: json.dumps(options), DEVICE_VAR: arguments.device}
    parts, status = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for name in only:  # each in a process of its own, so that none inherits a heap
            raw = Path(folder) / f"{name}.json"
            status |= run_file(HERE / f"bench_{name}.py", raw)
            if raw.exists():
                parts.append(json.loads(raw.read_text()))
    if not parts:
        return status or 1
    results = digest(parts, arguments.device)
    results["command"] += " --sweep" * arguments.sweep
    arguments.out.mkdir(parents=True, exist_ok=True)
    kind = "-sweep" * arguments.sweep + "-interpreted" * arguments.small
    path = arguments.out / f"{slug(results['machine']['name'])}{kind}.json"
    if path.exists() and only != everything:
        before = json.loads(path.read_text())
        results["rows"] = merged(before["rows"], results["rows"])
        results["notes"] = before.get("notes", [])
    path.write_text(json.dumps(results, indent=1) + "\n")
    page = (write_sweep_page if arguments.sweep else write_page)(results, path.with_suffix(""))
    print(f"\n{path}\n{page}")
    return status


def run_file(path: Path, raw: Path) -> int:
    """Times what one file compares, into pytest-benchmark's JSON; returns pytest's status."""
    command = [
        *(sys.executable, "-P", "-m", "pytest", "-q", "--import-mode=importlib"),
        *("-p", "no:cacheprovider", f"--benchmark-json={raw}", "--benchmark-quiet", str(path)),
    ]
    # pytest-benchmark measures nothing where it believes to be one of xdist's workers.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    # Huge pages for the heap, where the system offers them: faults vary from run to run.
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return subprocess.run(command, cwd=HERE.parent, env=environment, check=False).returncode


def digest(parts: list[dict[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """What a reader needs of pytest-benchmark's outputs, and what machine and versions it is of."""
    raw = parts[0]
    rows = [
        Row(
            group=entry["group"],
            code=entry["extra_info"]["code"],
            median=entry["stats"]["median"],
            fastest=entry["stats"]["min"],
            slowest=entry["stats"]["max"],
            rounds=entry["stats"]["rounds"],
            extra={k: v for k, v in entry["extra_info"].items() if k != "code"},
        )
        for part in parts
        for entry in part["benchmarks"]
    ]
    names = ("blipfast", "torch", "transformers", "triton")
    return {
        "command": "python -m benchmarks",
        "date": raw["datetime"][:10],
        "machine": cuda_machine() if device == "cuda" else cpu_machine(raw["machine_info"]),
        "versions": {name: version(name) for name in names if find_spec(name)},
        "rows": [row.to_dict() for row in rows],
    }


def cpu_machine(info: dict[str, Any]) -> dict[str, str]:
    threads = f"{torch.get_num_threads()} threads"
    cpu = info.get("cpu", {})
    name = cpu.get("brand_raw", platform.processor())
    # In a cloud the name is often that of the maker alone.
    name += f", family {cpu['family']} model {cpu['model']}" if "model" in cpu else ""
    bf16 = {"amx": "AMX", "avx512": "AVX-512", None: "float32"}[bf16_products()]
    isa = torch.backends.cpu.get_cpu_capability()
    return {"name": name, "details": f"{threads}, {isa}, bf16 products by {bf16}"}


def cuda_machine() -> dict[str, str]:
    card = torch.cuda.get_device_properties(0)
    details = f"{card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return {"name": card.name, "details": details}


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows measured now replace those of the same groups."""
    groups = {row["group"] for row in new}
    return [row for row in old if row["group"] not in groups] + new


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-") or "cpu"


if __name__ == "__main__":
    sys.exit(main())
