"""The kernels of dropout, residual and LayerNorm against the formula in float64."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from blipfast.kernels.add_layer_norm import add_layer_norm as kernel
from blipfast.kernels.tiles import nth_candidate
from place import IMPL, INTERPRETED
from torch import Tensor

from blipfast.errors import BackendError
from blipfast.models.config import VisionConfig
from blipfast.models.vit import Block
from blipfast.ops import use_backend
from blipfast.ops.hard_negatives import philox
from blipfast.ops.layer_norm import add_layer_norm, backends

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (2, 5, 48), (9, 96), (4, 768), (2, 3000)]
if not INTERPRETED:  # BLIP's own sizes
    SHAPES += [(4_870, 768), (90, 197, 768), (16, 577, 1024), (5, 4096)]
NAMES = ["h", "y", "d_residual", "d_branch", "d_weight", "d_bias"]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, branch: torch.dtype | None, weights: torch.dtype
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Inputs, and gradients of both outputs."""
    residual = (3 * torch.randn(shape) + 1).to(dtype)
    added = None if branch is None else torch.randn(shape).to(branch)
    parameters = [(1 + torch.randn(shape[-1]) / 4).to(weights), torch.randn(shape[-1]).to(weights)]
    wide = residual.dtype if added is None else torch.promote_types(dtype, added.dtype)
    return [residual, added, *parameters], [torch.randn(shape).to(wide) for _ in range(2)]


def run(inputs: list[Tensor | None], grads: list[Tensor], impl: str) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = add_layer_norm(*leaves, eps=1e-6, impl=impl)  # type: ignore[arg-type]
    given = [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)]
    wanted = [x for x in leaves if x is not None]
    return [*outputs, *torch.autograd.grad(outputs, wanted, given)]


def double(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in inputs]


def check(inputs: Any, grads: list[Tensor], assert_no_worse: Any, what: str = "") -> None:
    ours, plain = run(inputs, grads, IMPL), run(inputs, grads, "torch")
    exact = run(double(inputs), grads, "reference")
    names = [name for name in NAMES if name != "d_branch" or inputs[1] is not None]
    for name, *values in zip(names, ours, plain, exact, strict=True):
        terms = inputs[0][..., 0].numel() if name in ("d_weight", "d_bias") else 1
        assert_no_worse(*values, f"{name}{what}", terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_branch", [True, False], ids=["branch", "alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(
    shape: Any, has_branch: bool, dtype: torch.dtype, assert_no_worse
) -> None:
    check(*make(shape, dtype, dtype if has_branch else None, dtype), assert_no_worse)


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32], ids=str)
def test_under_autocast(residual: torch.dtype, assert_no_worse) -> None:
    """bf16 branches, float32 weights; the ViT's residuals are bf16, those of texts float32."""
    check(*make((6, 40), residual, torch.bfloat16, torch.float32), assert_no_worse)


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes(seed: int, assert_no_worse) -> None:
    draw = random.Random(seed)
    shape = (draw.choice([1, 2, draw.randint(3, 1100)]), draw.choice([1, 2, 31, 64, 200, 257]))
    dtypes = [draw.choice(DTYPES) for _ in range(2)]
    inputs, grads = make(shape, dtypes[0], draw.choice([None, dtypes[1]]), draw.choice(DTYPES))
    if inputs[2].dtype != inputs[0].dtype:  # PyTorch's own layer takes no other mixture
        inputs[2:] = [x.to(inputs[0].dtype) for x in inputs[2:]]
    ours, exact = run(inputs, grads, IMPL), run(double(inputs), grads, "reference")
    plain = run(inputs, grads, "reference")
    for i, values in enumerate(zip(ours, plain, exact, strict=True)):
        assert_no_worse(*values, f"{i} of {shape} in {dtypes}", terms=shape[0])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_tile(place: int, assert_no_worse) -> None:
    with nth_candidate(place):
        check(*make((23, 300), torch.float32, torch.float32, torch.float32), assert_no_worse)


def test_any_strides() -> None:
    inputs, grads = make((3, 4, 16), torch.float32, torch.float32, torch.float32)
    dense = run(inputs, grads, IMPL)

    def spread(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]

    def rows_apart(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], 2 * x.shape[1], x.shape[2]), float("nan"))
        wide[:, : x.shape[1]] = x
        return wide[:, : x.shape[1]]

    for stride in (spread, rows_apart):
        others = [*map(stride, inputs[:2]), *inputs[2:]]
        for a, b in zip(run(others, [*map(stride, grads)], IMPL), dense, strict=True):
            assert torch.equal(a, b)
    weights = [torch.stack([x, x.new_full(x.shape, float("nan"))], 1)[:, 0] for x in inputs[2:]]
    for a, b in zip(run([*inputs[:2], *weights], grads, IMPL), dense, strict=True):
        assert torch.equal(a, b)
    first = [inputs[0][:, :1], inputs[1][:, :1], *inputs[2:]]  # a CLS token of each image
    assert torch.equal(run(first, [g[:, :1] for g in grads], IMPL)[1], dense[1][:, :1])
    one = torch.ones(1, 1, 1).expand(3, 4, 16)
    expanded = run(inputs, [one, one], IMPL)
    for a, b in zip(expanded, run(inputs, [one.contiguous()] * 2, IMPL), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [0, 1], ids=["the sum alone", "the norm alone"])
@pytest.mark.parametrize("has_branch", [True, False], ids=["branch", "alone"])
def test_one_output_is_used(wanted: int, has_branch: bool) -> None:
    branch = torch.float32 if has_branch else None
    inputs, grads = make((3, 12), torch.float32, branch, torch.float32)
    results = []
    for impl in (IMPL, "reference"):
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        out = add_layer_norm(*leaves, impl=impl)[wanted]  # type: ignore[arg-type]
        given = [x for x in leaves if x is not None]
        found = torch.autograd.grad(out, given, grads[0], allow_unused=True)
        results.append(
            [torch.zeros_like(x) if g is None else g for x, g in zip(given, found, strict=True)]
        )
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


def test_a_residual_that_goes_on_gets_all_of_its_gradient() -> None:
    """As in a pre-LN block: the sum that comes back stands for the residual."""
    inputs, grads = make((5, 24), torch.float32, None, torch.float32)
    gradients = []
    for impl in (IMPL, "reference"):
        x = inputs[0].detach().requires_grad_()
        same, y = add_layer_norm(2 * x, None, *inputs[2:], impl=impl)
        out = same.square() + y.sin() + same
        gradients.append(torch.autograd.grad(out, x, grads[0])[0])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first_only", [False, True])
def test_in_a_block_of_the_vit(first_only: bool) -> None:
    config = VisionConfig(image_size=32, hidden_size=32, num_layers=1, num_heads=2)
    block, x = Block(config), torch.randn(2, 5, 32).requires_grad_()
    results = []
    for impl in (IMPL, "torch"):
        with use_backend(add_layer_norm=impl):
            out = block(x, first_only)
            results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *block.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def kept(rows: int, width: int, p: float, seed: int) -> Tensor:
    """What dropout keeps, by the formula in the kernel's docstring."""
    row, column = torch.arange(rows)[:, None], torch.arange(width)[None]
    words = torch.stack(philox(column & ~3, row, 0, 0, seed=seed, rounds=7))
    word = words.gather(0, (column & 3).expand(1, rows, width))[0]
    return word >= int(float(np.float32(p)) * 2**32)


@pytest.mark.parametrize("place", [0, 1])
def test_dropout_drops_what_philox_says(place: int) -> None:
    p, seed, (rows, width) = 0.3, 987654321987654321, (11, 50)
    inputs, grads = make((rows, width), torch.float32, torch.float32, torch.float32)
    exact = double(inputs)
    exact[1] = exact[1] * kept(rows, width, p, seed) / (1 - p)
    expected = run(exact, grads, "reference")
    expected[3] = expected[3] * kept(rows, width, p, seed) / (1 - p)
    leaves = [x.detach().requires_grad_() for x in inputs]
    options: dict[str, Any] = {"eps": 1e-6, "dropout_p": p}
    with nth_candidate(place):
        outputs = kernel(*leaves, **options, seed=torch.tensor([seed]))
        found = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    for name, ours, value in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(ours.double(), value, atol=2e-5, rtol=2e-5, msg=name)
    with pytest.raises(ValueError, match="seed"):
        kernel(*leaves, **options)


def test_dropout_draws_from_the_generator() -> None:
    inputs, _ = make((8, 64), torch.float32, torch.float32, torch.float32)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(add_layer_norm(*inputs, dropout_p=0.5, impl=IMPL)[0])  # type: ignore[arg-type]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    share = (outs[0] == inputs[0]).float().mean()
    assert 0.35 < share < 0.65


def test_nothing_at_all() -> None:
    inputs, grads = make((0, 8), torch.float32, torch.float32, torch.float32)
    results = run(inputs, grads, IMPL)
    assert [tuple(x.shape) for x in results] == [(0, 8)] * 4 + [(8,)] * 2
    assert not any(x.any() for x in results)


def test_not_a_number_stays_in_its_row() -> None:
    inputs, _ = make((3, 8), torch.float32, torch.float32, torch.float32)
    inputs[0][1, 2] = float("nan")
    _, y = add_layer_norm(*inputs, impl=IMPL)  # type: ignore[arg-type]
    assert y.isnan().all(1).tolist() == [False, True, False]


def test_refused() -> None:
    wide = torch.zeros(1, 4097)
    with pytest.raises(BackendError, match="4096"):
        add_layer_norm(wide, None, wide[0], wide[0], impl=IMPL)
    if INTERPRETED:
        assert backends.choose(torch.zeros(2, 8))[0] == "torch"


def test_opcheck_and_compile() -> None:
    inputs, grads = make((4, 16), torch.float32, torch.bfloat16, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    seed = torch.tensor([5])
    ops = torch.ops.blipfast
    torch.library.opcheck(ops.triton_add_layer_norm, (*leaves, seed, 1e-5, 0.25))
    alone = (leaves[0], None, *leaves[2:], None, 1e-5, 0.0)
    torch.library.opcheck(ops.triton_add_layer_norm, alone)

    def both(*x: Any) -> tuple[Tensor, Tensor]:
        return add_layer_norm(*x, impl=IMPL)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for given in (leaves, [leaves[0], None, *leaves[2:]]):
        wanted = [x for x in given if x is not None]
        results = [f(*given) for f in (compiled, both)]
        gradients = [torch.autograd.grad(out, wanted, grads) for out in results]
        for a, b in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
            torch.testing.assert_close(a, b)
