"""Kernels compiled for other people's cards: no spills, shared memory that fits, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
ROOT = Path(__file__).parents[2]
# Register counts move with Triton's compiler; see constraints.txt for the version they hold for.
CARDS = ["80", "90", "100", "gfx942"]


def compile_for(card: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--arch", card, "--json", "-"]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def check(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads(result.stdout)
    assert rows
    for row in rows:
        assert not row["faults"], row
        assert row["registers"] > 0, row
        assert 0 < row["occupancy"] <= 1, row
    assert any(row["tensor_core"] for row in rows)


@pytest.mark.parametrize("card", CARDS)
def test_a_few_configurations(card: str) -> None:
    check(compile_for(card, "--quick"))


def wide_products(card: str, only: str, kernel: str, config: str) -> dict[bool, int]:
    """Of a kernel with these tiles, with dropout and without."""
    return {
        "dropout" in row["case"]: row["wide_products"]
        for row in json.loads(compile_for(card, "--quick", "--only", only).stdout)
        if row["kernel"] == kernel and row["config"].startswith(config)
    }


@pytest.mark.parametrize("card", ["80", "90"])
def test_one_draw_of_dropout_serves_four_weights(card: str) -> None:
    """The compiler sees that they share it: a thread has 32 weights of a tile of 64 x 64."""
    only = "cross_attention bf16 d=64 rows="
    products = wide_products(card, only, "forward", "m=64 n=64 d=64 warps=4")
    rounds, products_of_a_round = 7, 2
    draws = (products[True] - products[False]) / (rounds * products_of_a_round)
    assert 32 / 4 - 2 <= draws <= 32 / 4 + 1


@pytest.mark.parametrize("card", ["80", "90", "100"])
def test_one_draw_of_dropout_serves_four_elements(card: str) -> None:
    """Of neighbours in a row: a thread has 16 of a tile of 2 x 1024."""
    products = wide_products(card, "add_layer_norm", "normalize", "r=2 d=1024 warps=4")
    assert 3 * 9 < products[True] - products[False] <= 4 * 14


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_every_configuration(card: str) -> None:
    check(compile_for(card))


def test_a_kernel_that_spills_is_found() -> None:
    """Tiles far too large for the registers, so that the check is seen to fail."""
    result = compile_for("80", "--quick", "--only", "rows=56", "--keys", "256")
    assert result.returncode == 1
    assert "spills" in result.stderr


def test_the_bundle_holds_what_a_launch_looks_for(tmp_path: Path) -> None:
    """The build target, twice: what is there is found by the key of a launch, not compiled anew."""
    build, out = tmp_path / "build", tmp_path / "aot"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}",
        f"-DBLIPFAST_AOT_DIR={out}", "-DBLIPFAST_AOT_ARCHS=90;gfx942",
        "-DBLIPFAST_AOT_OPTIONS=--quick", f"-DBLIPFAST_OUTPUT_DIR={tmp_path}",
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PATH": path}
    said = []
    for command in (configure, *[["cmake", "--build", str(build), "--target", "aot"]] * 2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    kernels = len([*out.glob("*/*.cubin"), *out.glob("*/*.hsaco")])
    assert kernels > 20
    assert f"{kernels} kernels in {out}, {kernels} of them compiled now" in said[1]
    assert f"{kernels} kernels in {out}, 0 of them compiled now" in said[2]
