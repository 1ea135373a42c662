"""Linear cross-entropy: parity with PyTorch's two functions, pieces, dtypes, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import blipfast.ops._linear_ce_pieces as pieces
from blipfast.errors import ShapeError
from blipfast.ops.linear_ce import linear_cross_entropy

ROWS = [1, 5, 1000]  # rows of a piece: many pieces, a ragged last one, PyTorch's own path


@pytest.fixture(params=ROWS)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(pieces, "_CPU_LOGITS", request.param * VOCABULARY)
    return int(request.param)


VOCABULARY, WIDTH = 37, 12


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [normal(tokens, WIDTH), normal(VOCABULARY, WIDTH), normal(VOCABULARY)]


def some_labels(tokens: int) -> Tensor:
    labels = torch.arange(tokens) * 7 % VOCABULARY
    labels[1::3] = -100
    return labels


def plain(h, w, b, labels, label_smoothing=0.0, reduction="mean"):  # type: ignore[no-untyped-def]
    logits = F.linear(h, w, b).to(torch.promote_types(h.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)


def run(function, tensors, labels, grad=None, **options):  # type: ignore[no-untyped-def]
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves, labels, **options)
    loss.backward(torch.full_like(loss, 1.7) if grad is None else grad.to(loss.dtype))
    return [loss.detach(), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_parity_in_float64(
    rows: int, tokens: int, smoothing: float, reduction: str, impl: str
) -> None:
    tensors, labels = inputs(tokens), some_labels(tokens)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    grad = torch.linspace(-1, 2, tokens) if reduction == "none" else None
    ours = run(linear_cross_entropy, tensors, labels, grad, impl=impl, **options)
    expected = run(plain, tensors, labels, grad, **options)
    for name, a, b in zip(["loss", "hidden", "weight", "bias"], ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_only_the_gradients_that_are_needed(rows: int, reduction: str) -> None:
    tensors, labels = inputs(13), some_labels(13)
    expected = run(plain, tensors, labels, reduction=reduction)
    for wanted in range(3):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        loss = linear_cross_entropy(*leaves, labels, reduction=reduction, impl="torch")  # type: ignore[arg-type]
        loss.backward(torch.full_like(loss, 1.7))
        for i, leaf in enumerate(leaves):
            if i == wanted:
                torch.testing.assert_close(leaf.grad, expected[i + 1])
            else:
                assert leaf.grad is None
    with torch.no_grad():
        value = linear_cross_entropy(*tensors, labels, reduction=reduction, impl="torch")  # type: ignore[arg-type]
    torch.testing.assert_close(value, expected[0])
    assert not value.requires_grad


def test_without_bias(rows: int) -> None:
    hidden, weight, _ = inputs(9)
    labels = some_labels(9)
    ours = run(linear_cross_entropy, [hidden, weight, None], labels, label_smoothing=0.1)
    expected = run(plain, [hidden, weight, None], labels, label_smoothing=0.1)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_no_label_at_all(rows: int, impl: str, reduction: str) -> None:
    for tokens in (0, 4):
        labels = torch.full((tokens,), -100)
        results = run(linear_cross_entropy, inputs(tokens), labels, reduction=reduction, impl=impl)
        assert results[0].shape == ((tokens,) if reduction == "none" else ())
        assert all((t == 0).all() for t in results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(rows: int, reduction: str) -> None:
    tensors = [t[:8].requires_grad_() for t in inputs(6)]
    labels = torch.tensor([1, -100, 0, 7, 7, 2])

    def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(
            h,
            w,
            b,
            labels,
            label_smoothing=0.1,
            reduction=reduction,  # type: ignore[arg-type]
        )

    assert torch.autograd.gradcheck(function, tensors)


def test_second_backward_gives_the_same(rows: int) -> None:
    leaves = [t.requires_grad_() for t in inputs(13)]
    loss = linear_cross_entropy(*leaves, some_labels(13))
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    (loss * 3).backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * gradient)


def test_second_derivative_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_CPU_LOGITS", 1)
    for reduction in ("sum", "none"):
        leaves = [t.requires_grad_() for t in inputs(5)]
        loss = linear_cross_entropy(*leaves, some_labels(5), reduction=reduction).sum()  # type: ignore[arg-type]
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)


@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck(monkeypatch: pytest.MonkeyPatch, need: tuple[bool, bool, bool]) -> None:
    monkeypatch.setattr(pieces, "_CPU_LOGITS", 2 * VOCABULARY)
    tensors = [t.requires_grad_(n) for t, n in zip(inputs(5, torch.float32), need, strict=True)]
    arguments = (*tensors, some_labels(5), 0.1, -100)
    torch.library.opcheck(
        torch.ops.blipfast.linear_cross_entropy.default, (*arguments, True, *need)
    )
    torch.library.opcheck(torch.ops.blipfast.linear_cross_entropy_rows.default, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(rows: int, reduction: str) -> None:
    leaves, labels = [t.requires_grad_() for t in inputs(13)], some_labels(13)

    def step(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, b, labels, reduction=reduction, impl="torch").sum()  # type: ignore[arg-type]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(step(*leaves), leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_at_most_twice_plain_pytorch(rows: int, dtype: torch.dtype) -> None:
    tensors, labels = inputs(29, dtype), some_labels(29)
    exact = run(plain, [t.double() for t in tensors], labels, label_smoothing=0.1)
    simple = run(plain, tensors, labels, label_smoothing=0.1)
    ours = run(linear_cross_entropy, tensors, labels, label_smoothing=0.1, impl="torch")
    for ours_, simple_, exact_ in zip(ours, simple, exact, strict=True):
        assert ours_.dtype == simple_.dtype
        rounding = exact_.abs().max() * torch.finfo(ours_.dtype).eps
        error = (ours_ - exact_).abs().max()
        assert error <= 2 * (simple_ - exact_).abs().max() + rounding


def test_autocast_equals_casting(rows: int) -> None:
    tensors, labels = inputs(13, torch.float32), some_labels(13)
    low = run(
        lambda h, w, b, y: linear_cross_entropy(h.bfloat16(), w.bfloat16(), b.bfloat16(), y),
        tensors,
        labels,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = run(linear_cross_entropy, tensors, labels)
    for a, b in zip(auto, low, strict=True):
        assert torch.equal(a, b)


def test_never_reads_uninitialised_memory(rows: int) -> None:
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        for reduction in ("mean", "none"):
            results = run(linear_cross_entropy, inputs(13), some_labels(13), reduction=reduction)
            assert all(t.isfinite().all() for t in results)
    finally:
        torch.use_deterministic_algorithms(False)


def test_extreme_logits_stay_finite(rows: int) -> None:
    tensors, labels = [t.float() * 300 for t in inputs(9)], some_labels(9)
    ours = run(linear_cross_entropy, tensors, labels)
    expected = run(plain, tensors, labels)
    assert ours[0].isfinite()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.zeros(5, 3)}, r"\(T, D\)"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.zeros(5)}, "labels must be int64"),
        ({"labels": torch.tensor([0, 1, 9, 0, 0])}, "from 0 to 9, but the weight has 9 rows"),
        ({"labels": torch.tensor([0, 1, -1, 0, 0])}, "from -1"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"weight": torch.zeros(9, 4, dtype=torch.float64)}, "weight is torch.float64"),
        ({"weight": torch.zeros(9, 4, device="meta")}, "weight is on meta"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"reduction": "average"}, "'average'"),
    ],
)
@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch, limit: int, change: dict[str, object], words: str
) -> None:
    monkeypatch.setattr(pieces, "_CPU_LOGITS", limit)
    arguments = {
        "hidden": torch.zeros(5, 4),
        "weight": torch.zeros(9, 4),
        "bias": torch.zeros(9),
        "labels": torch.zeros(5, dtype=torch.int64),
    }
    with pytest.raises(ShapeError, match=words):
        linear_cross_entropy(**{**arguments, **change})  # type: ignore[arg-type]
