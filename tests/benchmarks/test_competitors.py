"""What the operators are compared with computes the same (`blipfast[competitors]`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import competitors
from benchmarks.op_cases import CASES, Setting, assert_same, codes_of

CPU = torch.device("cpu")


def head(bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 32, requires_grad=True), torch.randn(40, 32)
    return hidden, weight, torch.randn(40) if bias else None, torch.arange(9)


def test_cut_cross_entropy_is_compared_where_it_computes_the_same() -> None:
    hidden, weight, bias, labels = head(bias=False)
    found = competitors.linear_cross_entropy(hidden, weight, bias, labels, 0.0)
    assert list(found) == ["cut-cross-entropy"]
    expected = F.cross_entropy(F.linear(hidden, weight), labels)
    torch.testing.assert_close(found["cut-cross-entropy"](), expected, atol=1e-4, rtol=1e-4)
    # It knows neither a bias nor label smoothing.
    assert not competitors.linear_cross_entropy(hidden, weight, bias, labels, 0.1)
    assert not competitors.linear_cross_entropy(*head(bias=True), 0.0)


def test_liger_kernel_in_the_interpreter() -> None:
    """As the benchmark of tiny operators, which compares before it times."""
    program = (
        "import torch; from benchmarks.op_cases import *\n"
        "s = Setting(torch.device('cpu'), torch.float32, small=True)\n"
        "for case in CASES['linear_cross_entropy'](s):\n"
        "    assert_same(case, case.code('liger-kernel')(), case.run('eager')(), torch.float32)\n"
        "    print(case.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 2


def test_nothing_is_compared_that_cannot_run() -> None:
    query = torch.randn(4, 32)
    assert competitors.in_batch_contrast(query, query, torch.tensor(0.07)) == {}
    assert competitors.layer_norms(query) == {}
    assert competitors.compiled(lambda: query, small=True) == {}


@pytest.mark.parametrize("wanted", ["all", "torch"])
def test_codes_of_a_case(wanted: str) -> None:
    (case, plain) = CASES["linear_cross_entropy"](Setting(CPU, torch.float32, small=True))
    codes = codes_of("linear_cross_entropy", plain, torch.empty(0), wanted)
    assert codes[-1] == plain.baseline == "eager"
    assert ("cut-cross-entropy" in codes) == (wanted == "all")
    assert "cut-cross-entropy" not in codes_of("linear_cross_entropy", case, torch.empty(0), "all")
    assert_same(plain, plain.code("torch")(), plain.run("eager")(), torch.float32)


def test_torch_compile_of_a_baseline() -> None:
    x = torch.randn(8, requires_grad=True)
    found = competitors.compiled(lambda: (x * x).sum(), small=False)
    (gradient,) = torch.autograd.grad(found["compiled"](), x)
    torch.testing.assert_close(gradient, 2 * x.detach())
