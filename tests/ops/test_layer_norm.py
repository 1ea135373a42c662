"""Dropout, residual and LayerNorm in one call, as a CPU runs it; the kernels' checks are apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.errors import BackendError, ShapeError
from blipfast.ops import LayerNorm, add_layer_norm, add_layer_norm_reference, use_backend


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [
        torch.randn(shape),
        torch.randn(shape),
        torch.randn(shape[-1]),
        torch.randn(shape[-1]),
    ]
    return [x.to(dtype).requires_grad_() for x in tensors]


def plain(residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> Any:
    h = residual if branch is None else residual + branch
    return h, F.layer_norm(h, weight.shape, weight, bias)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (2, 3, 16), (7,)], ids=str)
@pytest.mark.parametrize("has_branch", [True, False], ids=["branch", "alone"])
def test_is_the_formula(shape: tuple[int, ...], has_branch: bool, impl: str) -> None:
    residual, branch, *weights = inputs(*shape)
    given = [residual, branch if has_branch else None, *weights]
    leaves = [x for x in given if x is not None]
    results = []
    for run in (lambda *x: add_layer_norm(*x, impl=impl), plain):
        h, y = run(*given)
        total = h.sin().sum() + y.square().sum()
        results.append([h, y, *torch.autograd.grad(total, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_those_of_differences() -> None:
    assert torch.autograd.gradcheck(lambda *x: add_layer_norm(*x, eps=1e-3), inputs(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_worse_than_plain_pytorch(dtype: torch.dtype, assert_no_worse) -> None:
    given = inputs(9, 96, dtype=dtype)
    exact = add_layer_norm_reference(*(x.double() for x in given))
    for name, *values in zip("hy", add_layer_norm(*given), plain(*given), exact, strict=True):
        assert_no_worse(*values, name)


def test_the_wider_dtype_comes_out_under_autocast_too() -> None:
    residual, branch, *weights = inputs(4, 8, dtype=torch.float32)
    low = residual.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert [x.dtype for x in add_layer_norm(low, branch.bfloat16(), *weights)] == [
            low.dtype
        ] * 2
        assert [x.dtype for x in add_layer_norm(low, None, *weights)] == [low.dtype] * 2
        mixed = add_layer_norm(residual, branch.bfloat16(), *weights)
        assert [x.dtype for x in mixed] == [torch.float32] * 2


def test_dropout_is_of_the_branch() -> None:
    torch.manual_seed(0)
    residual, branch = torch.zeros(200, 64), torch.ones(200, 64)
    h, y = add_layer_norm(residual, branch, torch.ones(64), torch.zeros(64), dropout_p=0.25)
    assert set(h.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((h == 0).float().mean() - 0.25) < 0.02
    torch.testing.assert_close(y, F.layer_norm(h, (64,)))


def test_the_module_is_pytorchs_and_drops_in_training_alone() -> None:
    torch.manual_seed(0)
    ours, theirs = LayerNorm(12, eps=1e-3), nn.LayerNorm(12, eps=1e-3)
    theirs.weight.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.LayerNorm)
    x, y = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.add(x, y)[1], theirs(x + y))
    assert not torch.equal(ours.add(x, y, 0.5)[0], x + y)
    assert torch.equal(ours.eval().add(x, y, 0.5)[0], x + y)


def test_is_compiled_without_a_break() -> None:
    given = inputs(4, 8, dtype=torch.float32)
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*given), add_layer_norm(*given), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch": torch.zeros(3, 8)}, "branch"),
        ({"weight": torch.zeros(7)}, r"must be \(8,\)"),
        ({"bias": torch.zeros(8, 1)}, r"must be \(8,\)"),
        ({"residual": torch.zeros(())}, "residual is"),
        ({"residual": torch.zeros(2, 0), "weight": torch.zeros(0), "bias": torch.zeros(0)}, "is"),
        ({"bias": torch.zeros(8, dtype=torch.float64)}, "float64"),
        ({"branch": torch.zeros(2, 8, device="meta")}, "on meta"),
        ({"dropout_p": 1.0}, "dropout_p=1.0"),
        ({"dropout_p": -0.1}, "dropout_p=-0.1"),
        ({"dropout_p": float("nan")}, "dropout_p=nan"),
    ],
    ids=str,
)
def test_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"residual": torch.zeros(2, 8), "branch": None}
    given |= {"weight": torch.ones(8), "bias": torch.zeros(8)} | change
    with pytest.raises(ShapeError, match=message):
        add_layer_norm(**given)


def test_kernels_that_cannot_run_say_why() -> None:
    given = inputs(2, 8, dtype=torch.float32)
    with pytest.raises(BackendError, match="GPU"), use_backend(add_layer_norm="triton"):
        add_layer_norm(*given)
