"""The contrastive kernels against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blipfast.kernels import contrastive as kernels
from place import IMPL, INTERPRETED
from torch import Tensor

from blipfast.ops.contrastive import contrastive_softmax, contrastive_softmax_reference

# In bfloat16 and float16 the formula's own matmuls are of that type.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, [1], 8), (5, [5, 70], 32), (20, [30, 0, 133], 40), (70, [200], 64)]
if not INTERPRETED:  # BLIP's own sizes, and CLIP's
    SHAPES += [(90, [90, 57_600], 256), (1_024, [1_024], 256)]


def features(rows: int, blocks: list[int], width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    shapes = [rows, rows, *blocks]
    query, teacher, *keys = (F.normalize(torch.randn(n, width), dim=1) for n in shapes)
    return query, teacher, keys


def evaluate(fn: Any, query: Tensor, keys: list[Tensor], **options: Any) -> list[Tensor]:
    """Losses and the gradients of query, temperature and keys, under fixed random weights."""
    query = query.detach().requires_grad_()
    keys = [key.detach().requires_grad_() for key in keys]
    t = torch.tensor(0.2, dtype=torch.promote_types(query.dtype, torch.float32)).requires_grad_()
    loss = fn(query, keys, t, **options)
    weights = torch.linspace(-1, 2, len(query)).to(loss)
    return [loss, *torch.autograd.grad((loss * weights).sum(), [query, t, *keys])]


def plain(query: Tensor, keys: list[Tensor], t: Tensor, **options: Any) -> Tensor:
    """The formula with similarities of the inputs' own dtype, as autocast gives them."""
    all_keys = torch.cat(keys)
    log_p = torch.log_softmax((query @ all_keys.T).float() / t, dim=1)
    soft = torch.softmax((options["teacher_query"] @ all_keys.T).float() / t, dim=1).detach()
    same = options["positives"]
    if isinstance(same, int):
        same = torch.arange(len(query))[:, None] + same == torch.arange(len(all_keys))
    else:
        same = same[0][:, None] == same[1]
    same = same / same.sum(1, keepdim=True).clamp(min=1)
    return -((options["alpha"] * soft + (1 - options["alpha"]) * same) * log_p).sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(shape: Any, ids: bool, dtype: torch.dtype, assert_no_worse) -> None:
    query, teacher, keys = features(*shape)
    query, teacher, keys = query.to(dtype), teacher.to(dtype), [key.to(dtype) for key in keys]
    positives: Any = 0 if sum(map(len, keys)) == len(query) else sum(map(len, keys)) - len(query)
    if ids:
        positives = (torch.randint(4, (len(query),)), torch.randint(5, (sum(map(len, keys)),)))
    options = {"teacher_query": teacher, "alpha": 0.4, "positives": positives}
    ours = evaluate(contrastive_softmax, query, keys, **options, impl=IMPL)
    theirs = evaluate(plain, query, keys, **options)
    options["teacher_query"] = teacher.double()
    exact = evaluate(
        contrastive_softmax_reference, query.double(), [k.double() for k in keys], **options
    )
    for i, values in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_no_worse(*values, f"result {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_teacher(dtype: torch.dtype) -> None:
    query, _, keys = features(9, [9, 40], 32)
    query, keys = query.to(dtype), [key.to(dtype) for key in keys]
    ours = evaluate(contrastive_softmax, query, keys, impl=IMPL)
    exact = evaluate(contrastive_softmax_reference, query.double(), [k.double() for k in keys])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("processors", [1, 16])
def test_splits_do_not_matter(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, teacher, keys = features(10, [100, 33], 24)
    t = torch.tensor(0.05)
    monkeypatch.setattr(kernels, "_processors", lambda device: processors)
    lse, mean = kernels.softmax_mean(query, teacher, t, keys)
    scores = (torch.cat([query, teacher]) @ torch.cat(keys).T).double() / 0.05
    torch.testing.assert_close(lse.double(), scores.logsumexp(1), atol=1e-4, rtol=1e-5)
    exact = scores.softmax(1) @ torch.cat(keys).double()
    torch.testing.assert_close(mean.double(), exact, atol=1e-5, rtol=1e-5)


def test_any_strides_and_mixed_dtypes() -> None:
    query, teacher, (keys,) = features(6, [50], 32)
    t = torch.tensor(0.1)
    wide = torch.full((50, 64), float("nan"))
    wide[:, ::2] = keys
    options = {"teacher_query": teacher, "alpha": 0.3, "impl": IMPL}
    ours = contrastive_softmax(query, wide[:, ::2], t, **options)
    assert torch.equal(ours, contrastive_softmax(query, keys, t, **options))
    mixed = contrastive_softmax(query, [keys[:20].half(), keys[20:]], t, **options)
    exact = contrastive_softmax_reference(
        query, [keys[:20].half().float(), keys[20:]], t, teacher_query=teacher, alpha=0.3
    )
    torch.testing.assert_close(mixed, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_bad_temperature_gives_nan(value: float) -> None:
    query, _, keys = features(3, [8], 16)
    loss = contrastive_softmax(query, keys, torch.tensor(value), impl=IMPL)
    assert loss.isnan().all()


def test_large_similarities_do_not_overflow() -> None:
    query, teacher, keys = features(4, [40], 16)
    options = {"teacher_query": teacher * 100, "alpha": 0.4}
    t = torch.tensor(0.001)
    ours = contrastive_softmax(query * 100, keys, t, **options, impl=IMPL)
    exact = contrastive_softmax_reference(query * 100, keys, t, **options)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_opcheck_and_compile() -> None:
    query, teacher, keys = features(4, [4, 19], 16)
    t = torch.tensor(0.1)
    leaves = [query.requires_grad_(), t.requires_grad_(), keys[0].requires_grad_()]
    arguments = (query, keys, t, teacher, torch.tensor(0.4), None, None, 0, "triton")
    torch.library.opcheck(torch.ops.blipfast.contrastive_softmax, arguments)
    compiled = torch.compile(contrastive_softmax, fullgraph=True, backend="aot_eager")
    options = {"teacher_query": teacher, "alpha": 0.4, "impl": IMPL}
    for a, b in zip(
        torch.autograd.grad(compiled(query, keys, t, **options).sum(), leaves),
        torch.autograd.grad(contrastive_softmax(query, keys, t, **options).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
