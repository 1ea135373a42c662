"""The cross-entropy kernel against the formula in float64."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from blipfast.kernels import _runtime
from blipfast.kernels import linear_cross_entropy as kernels
from place import DEVICE, IMPL, INTERPRETED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blipfast.ops.linear_ce import linear_cross_entropy


class MemoryCounter(TorchDispatchMode):
    """The most bytes that tensors made within a block held at once, contents or none."""

    def __enter__(self) -> Any:
        self.now = self.peak = 0
        self.known: set[int] = set()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and key(tensor) not in self.known | given:
                self._take(tensor)
        return result

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size, name = storage.nbytes(), key(tensor)
        self.known.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)

        def free() -> None:
            self.known.discard(name)
            self.now -= size

        weakref.finalize(storage, free)


def key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 7), (13, 2500)] if INTERPRETED else [(1, 7), (13, 2500), (600, 30_524)]


def make(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    tensors = [torch.randn(tokens, 16), torch.randn(vocabulary, 16), torch.randn(vocabulary)]
    labels = torch.randint(vocabulary, (tokens,))
    labels[1::3] = -100
    return [t.to(dtype) for t in tensors], labels


def evaluate(tensors: list[Tensor], labels: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = linear_cross_entropy(*leaves, labels, **options)
    weights = torch.linspace(0.5, 2, len(labels)) if loss.dim() else torch.tensor(1.3)
    return [loss, *torch.autograd.grad(loss, leaves, weights.to(loss.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("tokens", "vocabulary"), SIZES)
def test_losses_and_gradients(
    tokens: int,
    vocabulary: int,
    reduction: Any,
    smoothing: float,
    dtype: torch.dtype,
    assert_no_worse,
) -> None:
    tensors, labels = make(tokens, vocabulary, dtype)
    options: Any = {"reduction": reduction, "label_smoothing": smoothing}
    ours = evaluate(tensors, labels, **options, impl=IMPL)
    plain = evaluate(tensors, labels, **options, impl="reference")
    exact = evaluate([t.double() for t in tensors], labels, **options, impl="reference")
    if reduction != "none":  # whether the errors of tokens cancel in a sum is luck
        options["reduction"] = "none"
        rows, exact_rows = (
            evaluate(given, labels, **options, impl="reference")[0]
            for given in (tensors, [t.double() for t in tensors])
        )
        apart = (rows.double() - exact_rows).abs().sum()
        apart = apart / (labels >= 0).sum() if reduction == "mean" else apart
        plain[0] = (exact[0] + apart).to(ours[0].dtype)
    for name, *values in zip(["loss", "dh", "dw", "db"], ours, plain, exact, strict=True):
        assert_no_worse(*values, name, terms=vocabulary)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_the_gradients_that_are_needed(needs: tuple[bool, ...]) -> None:
    tensors, labels = make(13, 2500, torch.float32)
    wanted = evaluate(tensors, labels, impl="reference")[1:]
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    linear_cross_entropy(*leaves, labels, impl=IMPL).backward(torch.tensor(1.3))
    for leaf, need, expected in zip(leaves, needs, wanted, strict=True):
        assert (leaf.grad is not None) == need
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected, atol=1e-5, rtol=1e-5)


def test_without_a_bias() -> None:
    (hidden, weight, _), labels = make(13, 2500, torch.float32)
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    ours, plain = (
        torch.autograd.grad(
            linear_cross_entropy(*leaves, None, labels, label_smoothing=0.1, impl=impl), leaves
        )
        for impl in (IMPL, "reference")
    )
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [None, torch.randn(2500, device="cpu")], ids=["plain", "bias"])
def test_a_label_out_of_range_gives_nan(bias: Tensor | None) -> None:
    tensors, _ = make(3, 2500, torch.float32)
    bias = None if bias is None else bias.to(DEVICE)
    losses = kernels.losses(*tensors[:2], bias, torch.tensor([2500, -1, 2499]), 0.1, -100)
    assert losses.isnan().tolist() == [True, True, False]


def test_large_logits_of_later_pieces_raise_the_peak() -> None:
    (hidden, weight, _), labels = make(40, 2500, torch.float32)
    pieces = list(kernels._in_own_memory(40, *weight.shape))
    assert len(pieces) > 1
    bias = torch.zeros(2500)
    for place, (start, stop) in enumerate(pieces):
        bias[start:stop] = 200.0 * place - 300
    tensors = [hidden, weight, bias]
    ours = evaluate(tensors, labels, label_smoothing=0.1, impl=IMPL)
    exact = evaluate([t.double() for t in tensors], labels, label_smoothing=0.1, impl="reference")
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_a_bias_is_added_before_anything_is_rounded() -> None:
    """Products of whole numbers are exact in bf16, and their sums with this bias are not."""
    hidden, weight = (torch.randint(-2, 3, (n, 16)).bfloat16() for n in (4, 30))
    bias, labels = (8 * torch.randn(30)).bfloat16(), torch.arange(4)
    exact = torch.nn.functional.cross_entropy(
        (hidden.double() @ weight.double().T) + bias.double(), labels, reduction="none"
    )
    losses = kernels.losses(hidden, weight, bias, labels, 0.0, -100)
    torch.testing.assert_close(losses.double(), exact, atol=1e-5, rtol=1e-5)


def test_gradients_are_written_over_their_piece_alone() -> None:
    wide = torch.full((4, 40), float("nan"), dtype=torch.bfloat16)
    product, start, vocabulary = wide[:, :25], 16, 60
    product.copy_(4 * torch.randn(4, 25))
    bias, lse = (8 * torch.randn(vocabulary)).bfloat16(), 9 + torch.rand(4)
    labels, grad = torch.tensor([17, 59, -100, 40]), torch.tensor([1.0, 0.5, 3.0, -2.0])
    columns = start + torch.arange(25)
    z = product.double() + bias.double()[columns]
    expected = (z - lse.double()[:, None]).exp() - 0.1 / vocabulary
    expected -= 0.9 * (labels[:, None] == columns)
    expected *= (grad * (labels != -100))[:, None]
    _runtime.launch(
        kernels.kernels.logit_gradients,
        (4,),
        [product, bias, labels, lse, grad, (40, 1), (4, vocabulary, 25), start, -100, 0.1],
        HAS_BIAS=True,
        BLOCK_V=16,
        num_warps=4,
    )
    torch.testing.assert_close(product.double(), expected, atol=1e-6, rtol=2.0**-8)
    assert wide[:, 25:].isnan().all()


@pytest.mark.parametrize(("vocabulary", "width"), [(7, 3), (2500, 16), (30_524, 768)])
@pytest.mark.parametrize("tokens", [0, 1, 98, 1_125, 5_000, 60_000])
def test_pieces_cover_the_vocabulary_and_lie_where_nothing_is_yet(
    tokens: int, vocabulary: int, width: int
) -> None:
    within, later = kernels._within_gradient(tokens, vocabulary, width)
    for pieces in (within + later, list(kernels._in_own_memory(tokens, vocabulary, width))):
        assert [start for start, _ in pieces[1:]] == [stop for _, stop in pieces[:-1]]
        assert pieces[0][0] == 0
        assert pieces[-1][1] == vocabulary
    for start, stop in within:
        assert tokens * kernels._row(stop - start) <= (vocabulary - stop) * width
    assert kernels._elements(tokens, later) <= tokens * (width + 127)


def test_no_memory_but_the_gradients_and_twice_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on tensors without contents at the size of a batch of 90."""
    taken = MemoryCounter()
    monkeypatch.setattr(_runtime, "recorder", lambda *_: None)
    # On a GPU it adds in place; elsewhere in float32 throughout.
    monkeypatch.setattr(kernels, "_add_product", lambda *_: None)
    hidden = torch.empty(1_125, 768, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(30_524, 768, dtype=torch.bfloat16, device="meta")
    bias, labels = weight[:, 0].clone(), torch.empty(1_125, dtype=torch.int64, device="meta")
    grad = torch.empty(1_125, device="meta")
    with taken:
        _, lse = kernels.run_forward(hidden, weight, bias, labels, 0.1, -100)
    assert taken.peak < 48 * 2**20
    with taken:
        arguments = (grad, hidden, weight, bias, labels, lse, 0.1, -100, [True] * 3)
        gradients = kernels.run_backward(*arguments)
    assert [g.shape for g in gradients] == [hidden.shape, weight.shape, bias.shape]
    assert taken.peak < 50 * 2**20


def test_nothing_and_ignored_rows() -> None:
    tensors, labels = make(4, 9, torch.float32)
    for some in (labels[:0], torch.full_like(labels, -100)):
        given = [tensors[0][: len(some)], *tensors[1:]]
        results = evaluate(given, some, impl=IMPL)
        assert all((x == 0).all() for x in results)


@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(3, 0, 4), (3, 300, 0), (0, 5, 0)])
def test_empty_dimensions(tokens: int, vocabulary: int, width: int) -> None:
    """Without a vocabulary no label is within it; without a width the bias is all there is."""
    hidden, weight = (torch.randn(n, width, requires_grad=True) for n in (tokens, vocabulary))
    bias, labels = torch.randn(vocabulary, requires_grad=True), torch.arange(tokens)
    losses = kernels.losses(hidden, weight, bias, labels, 0.1, -100)
    gradients = torch.autograd.grad(losses.sum(), (hidden, weight, bias))
    assert [g.shape for g in gradients] == [hidden.shape, weight.shape, bias.shape]
    if not vocabulary:
        assert losses.isnan().all()
        return
    given = (hidden, weight, bias, labels)
    expected = linear_cross_entropy(*given, label_smoothing=0.1, reduction="none", impl="reference")
    torch.testing.assert_close(losses, expected)
    exact = torch.autograd.grad(expected.sum(), (hidden, weight, bias))
    torch.testing.assert_close(gradients, exact)


def test_opcheck_and_compile() -> None:
    tensors, labels = make(5, 11, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    arguments = (*leaves, labels, 0.1, -100)
    ops = torch.ops.blipfast
    torch.library.opcheck(ops.triton_linear_cross_entropy, arguments)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves, labels, impl=IMPL), leaves),
        torch.autograd.grad(linear_cross_entropy(*leaves, labels, impl="reference"), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
