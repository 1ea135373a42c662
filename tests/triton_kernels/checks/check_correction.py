"""The correction of the interpreter's bfloat16, on which the other checks rest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _everything(a, b, product, total, rounded, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    square = i[:, None] * SIZE + i[None, :]
    x, y = tl.load(a + square), tl.load(b + square)
    tl.store(product + square, tl.dot(x, y))
    tl.store(total + square, x + y)
    tl.store(rounded + square, (x.to(tl.float32) * 1.1).to(tl.bfloat16))


def test_bfloat16_is_computed_as_torch_does() -> None:
    a, b = torch.randn(2, 16, 16).to(torch.bfloat16)
    product, (total, rounded) = torch.empty(16, 16), torch.empty(2, 16, 16, dtype=torch.bfloat16)
    _everything[(1,)](a, b, product, total, rounded, SIZE=16)
    torch.testing.assert_close(product, a.float() @ b.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(total, a + b)
    assert torch.equal(rounded, (a.float() * 1.1).to(torch.bfloat16))


def test_rounding_is_to_nearest_even_and_keeps_nan() -> None:
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, float("nan")])
    x = torch.cat([x, torch.tensor([float("inf"), 0.0, 3.3e38])])
    out = torch.empty(8, dtype=torch.bfloat16)

    @triton.jit
    def cast(source, target):
        i = tl.arange(0, 8)
        tl.store(target + i, tl.load(source + i).to(tl.bfloat16))

    cast[(1,)](x, out)
    torch.testing.assert_close(out, x.to(torch.bfloat16), equal_nan=True, atol=0, rtol=0)
