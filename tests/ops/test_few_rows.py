"""Linear layers of few rows: every path against float64, and the C++ operator by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.ops import _native
from blipfast.ops.few_rows import few_rows_linear, few_rows_linears, reads_few_rows_in_place

needs_operator = pytest.mark.skipif(
    not (_native.amx() or _native.avx512_bf16()),
    reason="needs the C++ operators (make native) and a processor with AMX or AVX-512 for bf16; "
    f"here: {_native.status()}",
)


def _rounding(dtype: torch.dtype) -> float:
    """Of a sum; where products are exact to the dtype, its order alone makes a few units."""
    return torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 8)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("amx", ["0", "1", "no operators"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [192, 452, 40])  # whole blocks, a remainder, less than one
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (4, 3), (5, 4), (49, 1), (64, 1), (13, 5)])
def test_few_rows_linear(
    dtype: torch.dtype,
    outputs: int,
    shape: tuple[int, int],
    amx: str,
    gelu: bool,
    processor: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one row, of few and of many: as exact as PyTorch's in the same dtype."""
    monkeypatch.setenv(_native.AMX_ENV_VAR, amx)
    if amx == "no operators":  # as where there was no compiler
        monkeypatch.setattr(_native, "amx", lambda: False)
        monkeypatch.setattr(_native, "avx512_bf16", lambda: False)
    torch.manual_seed(0)
    x = torch.randn(*shape, 96).to(dtype)
    weight, bias = torch.randn(outputs, 96).to(dtype), torch.randn(outputs).to(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    plain = F.linear(x, weight, bias)
    if gelu:
        exact, plain = F.gelu(exact), F.gelu(plain)
    out = few_rows_linear(x, weight, bias, gelu=gelu)
    assert out.shape == exact.shape
    assert out.is_contiguous()
    rounding = _rounding(dtype) * exact.abs().max()
    assert (out.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding


@pytest.mark.parametrize("amx", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "rows"), [(64, 12), (40, 1), (100, 33), (16, 65)])
def test_few_rows_linears(
    dtype: torch.dtype, outputs: int, rows: int, amx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_native.AMX_ENV_VAR, amx)
    torch.manual_seed(0)
    x, weight = torch.randn(3, rows, 96).to(dtype), torch.randn(3, outputs, 96).to(dtype)
    bias = torch.randn(3, outputs).to(dtype)
    out = few_rows_linears(x, weight, bias)
    exact = torch.stack([F.linear(*(t[h].double() for t in (x, weight, bias))) for h in range(3)])
    plain = torch.stack([F.linear(x[h], weight[h], bias[h]) for h in range(3)])
    rounding = _rounding(dtype) * exact.abs().max()
    assert (out.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding


def _codes(dtype: torch.dtype) -> list[bool]:
    """What the operator's `amx` may be here."""
    amx = [True] if dtype == torch.bfloat16 and _native.amx() else []
    return amx + [False] * _native.avx512_bf16()


def _operator(x: Tensor, weight: Tensor, bias: Tensor, amx: bool, gelu: bool = False) -> Tensor:
    return torch.ops.blipfast_native.few_rows_linear(x, weight, bias, gelu, amx)


@needs_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 33, 48, 49, 64])
@pytest.mark.parametrize(("width", "outputs"), [(32, 1), (96, 33), (768, 40), (3072, 24)])
def test_operator(dtype: torch.dtype, rows: int, width: int, outputs: int) -> None:
    """Any number of rows, outputs that fill no tile, and layers side by side."""
    torch.manual_seed(rows)
    for layers in ((), (3,)):
        x, weight = torch.randn(*layers, rows, width), torch.randn(*layers, outputs, width)
        inputs = x.to(dtype), weight.to(dtype), torch.randn(*layers, outputs).to(dtype)
        a, w, b = (t.double() for t in inputs)
        exact = a @ w.mT + b.unsqueeze(-2)
        # Sums of so many terms in float32, whatever their order, and one rounding to the dtype.
        terms = (a.abs() @ w.abs().mT + b.abs().unsqueeze(-2)) * torch.finfo(torch.float32).eps
        bound = terms * width**0.5 + exact.abs() * torch.finfo(dtype).eps
        for amx in _codes(dtype):
            out = _operator(*inputs, amx)
            assert out.dtype == dtype
            assert ((out.double() - exact).abs() <= bound).all()


@needs_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((12, 96), (300, 96), (300,)))
    before = torch.get_num_threads()
    for amx in _codes(dtype):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_operator(x, weight, bias, amx, gelu=True))
        torch.set_num_threads(before)
        assert all(torch.equal(found[0], other) for other in found[1:])


@needs_operator
def test_nan_and_infinity_stay_in_their_row() -> None:
    x, weight, bias = torch.randn(3, 32), torch.randn(5, 32), torch.zeros(5)
    x[1, 4], x[2, 4] = float("nan"), float("inf")
    for dtype in (torch.float32, torch.bfloat16):
        for amx in _codes(dtype):
            out = _operator(x.to(dtype), weight.to(dtype), bias.to(dtype), amx)
            assert out[0].isfinite().all()
            assert out[1].isnan().all()
            assert out[2].isinf().all()


@needs_operator
def test_operator_refuses_what_it_cannot_read() -> None:
    x, weight, bias = torch.randn(3, 32), torch.randn(5, 32), torch.zeros(5)
    amx = not _native.avx512_bf16()
    x, weight, bias = (t.bfloat16() for t in (x, weight, bias))
    for bad, message in [
        ((x.repeat(30, 1), weight, bias), "1 to 64 rows"),
        ((x[:0], weight, bias), "1 to 64 rows"),
        ((x[:, :31].contiguous(), weight[:, :31].contiguous(), bias), "32 divides"),
        ((x, weight[:, ::2], bias), "contiguous"),
        ((x, weight.float(), bias), "all bfloat16 or all float32"),
        ((x.double(), weight.double(), bias.double()), "all bfloat16 or all float32"),
        ((x, weight, bias[:4].contiguous()), "the bias has 4"),
        ((x[None], weight, bias), "one layer or all of several"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            _operator(*bad, amx)
    with pytest.raises(RuntimeError, match="no AMX"):
        _operator(x.float(), weight.float(), bias.float(), True)


@needs_operator
def test_opcheck() -> None:
    x, weight, bias = (torch.randn(s).bfloat16() for s in ((3, 32), (5, 32), (5,)))
    for amx in _codes(torch.bfloat16):
        torch.library.opcheck(
            torch.ops.blipfast_native.few_rows_linear.default, (x, weight, bias, True, amx)
        )


def test_autocast_and_gradients_are_left_to_others() -> None:
    """What reads in place knows neither autocast nor two dtypes."""
    x, weight = torch.randn(3, 32).bfloat16(), torch.randn(5, 32)
    assert not reads_few_rows_in_place(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not reads_few_rows_in_place(x, weight.bfloat16())
