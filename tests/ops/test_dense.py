"""Dense attention, by each of its backends, against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blipfast.errors import BackendError, ShapeError
from blipfast.ops import _native
from blipfast.ops.dense import backends, dense_attention, dense_self_attention

LOW = [torch.float32, torch.bfloat16]
needs_native = pytest.mark.skipif(
    not _native.avx512_bf16(), reason="needs the C++ operators and AVX-512 for bf16"
)

# (B, H, L, S, head_dim), valid keys of each entry, causal
CASES = {
    "one": ((1, 1, 1, 1, 32), None, False),
    "vit": ((2, 3, 197, 197, 64), None, False),
    "image keys": ((3, 2, 41, 197, 64), None, False),
    "two blocks of keys": ((1, 2, 5, 600, 32), None, False),
    "text": ((4, 2, 14, 14, 64), (14, 9, 1, 5), False),
    "no keys": ((3, 2, 9, 33, 96), (0, 33, 17), False),
    "causal": ((2, 2, 30, 30, 64), None, True),
    "causal and padded": ((2, 2, 70, 70, 128), (70, 33), True),
    "more keys than queries": ((1, 2, 3, 20, 32), None, True),
    "odd heads": ((2, 2, 7, 7, 16), (4, 0), False),  # not for the C++ operator
}


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    is_causal: bool,
    kept: Tensor | None = None,
) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    seen = (seen.tril() if is_causal else seen)[None]
    if key_lengths is not None:
        seen = seen & (torch.arange(k.shape[2]) < key_lengths[:, None])[:, None]
    scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1) * seen[:, None]
    return (probs if kept is None else probs * kept) @ v


def new_inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v and a gradient of the output, laid out as projections give them."""
    torch.manual_seed(seed)
    b, h, length, keys, dim = shape
    sizes = (length, keys, keys, length)
    return [torch.randn(b, n, h, dim).to(dtype).transpose(1, 2) for n in sizes]


def with_gradients(run, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = run(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def assert_no_worse(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Our error is at most twice that of the plain formula in the same dtype, plus rounding."""
    for name, a, b, c in zip(("out", "q", "k", "v"), ours, plain, exact, strict=True):
        assert a.shape == c.shape
        eps = torch.finfo(a.dtype).eps
        bound = 2 * (b.double() - c).abs().max() + 4 * eps * c.abs().max() + 2e-6
        error = (a.double() - c).abs().max()
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", ["auto", "native", "torch"])
@pytest.mark.parametrize("dtype", [*LOW, torch.float16, torch.float64])
def test_equals_the_formula(dtype: torch.dtype, impl: str, case: str, processor: str) -> None:
    """A row without keys gives 0, not NaN."""
    shape, lengths, is_causal = CASES[case]
    key_lengths = None if lengths is None else torch.tensor(lengths)
    q, k, v, grad = new_inputs(shape, dtype)
    if impl == "native" and not backends.can_run("native", q):
        with pytest.raises(BackendError, match="native"):
            dense_attention(q, k, v, impl=impl)
        return
    options = {"key_lengths": key_lengths, "is_causal": is_causal}
    ours = with_gradients(lambda *x: dense_attention(*x, **options, impl=impl), q, k, v, grad)
    if impl == "native":
        assert torch.equal(dense_attention(q, k, v, **options, impl=impl), ours[0])
    plain = with_gradients(lambda *x: formula(*x, key_lengths, is_causal), q, k, v, grad)
    high = [x.double() for x in (q, k, v, grad)]
    exact = with_gradients(lambda *x: formula(*x, key_lengths, is_causal), *high)
    assert_no_worse(ours, plain, exact)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", LOW)
def test_random_shapes_and_strides(dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    b, h, length, keys = (int(torch.randint(1, n, (), generator=draw)) for n in (4, 5, 150, 150))
    shape = (b, h, length, keys, 32 * int(torch.randint(1, 5, (), generator=draw)))
    lengths = torch.randint(0, keys + 1, (b,), generator=draw)
    q, k, v, grad = new_inputs(shape, dtype, seed)
    exact = with_gradients(
        lambda *x: formula(*x, lengths, False), *(x.double() for x in (q, k, v, grad))
    )
    plain = with_gradients(lambda *x: formula(*x, lengths, False), q, k, v, grad)
    # By heads, every other element of a wider tensor, and a gradient that is one number.
    wide = torch.zeros(*v.shape[:3], 2 * v.shape[3], dtype=dtype)
    wide[..., ::2] = v
    layouts = (q.contiguous(), k, wide[..., ::2], grad)
    run = lambda *x: dense_attention(*x, key_lengths=lengths)  # noqa: E731
    assert_no_worse(with_gradients(run, *layouts), plain, exact)
    one = torch.ones((), dtype=dtype).expand(grad.shape)
    ours = with_gradients(run, *layouts[:3], one)
    for a, c in zip(ours, with_gradients(run, *layouts[:3], one.contiguous()), strict=True):
        assert torch.equal(a, c)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_self_attention_is_attention(head_dim: int, dtype: torch.dtype, impl: str) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, 21, 3, 2, head_dim).to(dtype).requires_grad_()
    lengths, grad = torch.tensor([21, 4, 0]), torch.randn(3, 21, 2, head_dim).to(dtype)
    ours = dense_self_attention(qkv, key_lengths=lengths, impl=impl)
    plain = dense_attention(*qkv.permute(2, 0, 3, 1, 4), key_lengths=lengths, impl=impl)
    assert torch.equal(ours, plain.transpose(1, 2))
    (ours_grad,) = torch.autograd.grad(ours, qkv, grad)
    (plain_grad,) = torch.autograd.grad(plain, qkv, grad.transpose(1, 2))
    assert torch.equal(ours_grad, plain_grad)
    if head_dim == 64 and impl == "auto" and _native.avx512_bf16():
        assert ours_grad.is_contiguous()  # written as one tensor


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("dtype", LOW)
def test_dropout_drops_weights(dtype: torch.dtype, impl: str) -> None:
    """With values of one, an output is the share of a row that was kept, with the mean one."""
    torch.manual_seed(0)
    q, k = (torch.randn(4, 3, 50, 32, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.ones(4, 3, 50, 32, dtype=dtype, requires_grad=True)
    lengths = torch.tensor([50, 20, 50, 50])
    out = dense_attention(q, k, v, key_lengths=lengths, dropout_p=0.2, impl=impl)
    assert out.dtype == dtype
    assert abs(out.float().mean().item() - 1) < 0.02
    assert out.float().std() > 0.02
    out.float().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v) if x.grad is not None)
    assert v.grad is not None
    assert v.grad[1, :, 20:].count_nonzero() == 0


@needs_native
@pytest.mark.parametrize("dtype", LOW)
def test_both_directions_drop_the_same_weights(dtype: torch.dtype) -> None:
    """Values that are the unit matrix show the weights, and so what was dropped."""
    q, k, v, grad = new_inputs((2, 3, 70, 160, 160), dtype)
    unit = torch.eye(160, dtype=dtype).expand(2, 3, 160, 160)

    def run(*x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return dense_attention(*x, dropout_p=0.25, impl="native")

    with torch.no_grad():
        kept = (run(q, k, unit) != 0) / 0.75
    assert abs(kept.mean().item() - 1) < 0.01
    assert (kept[0, 0] != kept[0, 1]).float().mean() > 0.3  # heads draw apart
    ours = with_gradients(run, q, k, v, grad)
    plain = with_gradients(lambda *x: formula(*x, None, False, kept.to(dtype)), q, k, v, grad)
    high = [x.double() for x in (q, k, v, grad)]
    exact = with_gradients(lambda *x: formula(*x, None, False, kept.double()), *high)
    assert_no_worse(ours, plain, exact)


@needs_native
@pytest.mark.parametrize("dtype", LOW)
def test_dropped_weights_are_independent(dtype: torch.dtype) -> None:
    """Scores of zero and values that are the unit matrix: each output is one draw."""
    zeros = torch.zeros(8, 4, 64, 64, dtype=dtype)
    unit = torch.eye(64, dtype=dtype).expand(8, 4, 64, 64)
    torch.manual_seed(1)
    kept = (dense_attention(zeros, zeros, unit, dropout_p=0.5, impl="native") != 0).double() - 0.5
    again = dense_attention(zeros, zeros, unit, dropout_p=0.5, impl="native") != 0
    for lag in (1, 2, 16, 32, 64, 128, 4096):  # columns, rows, heads
        flat = kept.flatten()
        assert abs((flat[lag:] * flat[:-lag]).mean() * 4) < 5 / math.sqrt(flat.numel())
    assert abs((kept * (again.double() - 0.5)).mean() * 4) < 5 / math.sqrt(kept.numel())


@needs_native
@pytest.mark.parametrize("dtype", LOW)
def test_threads_do_not_matter(dtype: torch.dtype) -> None:
    q, k, v, grad = new_inputs((2, 5, 90, 77, 64), dtype)

    def run(*x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dense_attention(*x, dropout_p=0.1, impl="native")

    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(with_gradients(run, q, k, v, grad))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", LOW)
def test_keeps_no_weights(dtype: torch.dtype) -> None:
    """For the backward stay q, k, v and one number a query."""
    sizes: list[int] = []
    inputs = [x.requires_grad_() for x in new_inputs((2, 3, 100, 300, 64), dtype)[:3]]
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: (sizes.append(x.numel()), x)[1], lambda x: x
    )
    with hooks:
        dense_attention(*inputs, dropout_p=0.1, impl="native")
    assert sum(sizes) == sum(x.numel() for x in inputs) + 2 * 3 * 100


@needs_native
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(value: float, dtype: torch.dtype) -> None:
    q, k, v, _ = new_inputs((1, 2, 20, 40, 32), dtype)
    clean = dense_attention(q, k, v, impl="native")
    q[0, 1, 7, 3] = value
    out = dense_attention(q, k, v, impl="native")
    assert out[0, 1, 7].isnan().all()
    out[0, 1, 7] = clean[0, 1, 7]
    assert torch.equal(out, clean)


@needs_native
@pytest.mark.parametrize("dtype", LOW)
def test_large_scores(dtype: torch.dtype) -> None:
    """Weights that are one or nothing, with gradients that are finite."""
    q, k, v, grad = new_inputs((1, 2, 20, 40, 32), dtype)
    ours = with_gradients(lambda *x: dense_attention(*x, impl="native"), 1e4 * q, k, v, grad)
    high = [x.double() for x in (1e4 * q, k, v, grad)]
    exact = with_gradients(lambda *x: formula(*x, None, False), *high)
    assert all(torch.isfinite(x).all() for x in ours)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 32), (2, 2, 0, 5, 32), (2, 2, 5, 0, 32)])
@pytest.mark.parametrize("dtype", LOW)
def test_nothing_to_look_at(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v, grad = new_inputs(shape, dtype)
    ours = with_gradients(lambda *x: dense_attention(*x), q, k, v, grad)
    assert all((x == 0).all() for x in ours)


def test_bad_input() -> None:
    q, k, v, _ = new_inputs((2, 3, 5, 7, 32), torch.float32)
    for bad in ((q[0], k, v), (q, k, v[:, :, :3]), (q[:, :2], k, v), (q[..., :16], k, v)):
        with pytest.raises(ShapeError, match=r"\(2, 3"):
            dense_attention(*bad)
    with pytest.raises(ShapeError, match=r"bfloat16"):
        dense_attention(q, k.bfloat16(), v)
    with pytest.raises(ShapeError, match=r"key_lengths must be \(2,\)"):
        dense_attention(q, k, v, key_lengths=torch.ones(3))
    with pytest.raises(ShapeError, match=r"qkv must be"):
        dense_self_attention(torch.zeros(2, 5, 2, 3, 32))
    with pytest.raises(BackendError, match="16"):
        dense_attention(q[..., :16], k[..., :16], v[..., :16], impl="native")


@needs_native
def test_the_operators_check_what_they_are_given() -> None:
    """Whoever calls them directly reads nothing out of bounds."""
    q, k, v, grad = new_inputs((2, 3, 5, 7, 32), torch.float32)
    ops, lengths = torch.ops.blipfast_native, torch.tensor([7, 2])
    attend, differentiate = ops.attention_out, ops.attention_backward_out
    rest = (None, None, False, 0.0, 0)
    lse = attend(q, k, v, lengths, *rest, torch.empty_like(q))
    calls = [
        lambda: attend(q, k[:1], v[:1], None, *rest, q),
        lambda: attend(q, k, v[:, :, :4], None, *rest, q),
        lambda: attend(q, k, v, None, *rest, k),
        lambda: attend(q, k, v, None, None, None, False, 1.0, 0, q),
        lambda: attend(q, k, v, lengths[:1], *rest, q),
        lambda: attend(q, k, v, lengths.int(), *rest, q),
        lambda: attend(q.double(), k.double(), v.double(), None, *rest, q.double()),
        lambda: differentiate(grad, q, k, v, lse[:1], None, *rest, q, k, v),
        lambda: differentiate(grad, q, k, v, lse.double(), None, *rest, q, k, v),
        lambda: differentiate(grad[:, :, :3], q, k, v, lse, None, *rest, q, k, v),
        lambda: differentiate(grad, q, k, v, lse, None, *rest, k, k, v),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="attention: "):
            call()
    outside = attend(q, k, v, torch.tensor([99, -3]), *rest, torch.empty_like(q))
    assert outside[0].isfinite().all()  # clamped to the keys that there are
    assert (outside[1] == -math.inf).all()
