"""Contrastive softmax: parity with the formula, gradients, dtypes, positives, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import blipfast.ops._contrastive_stream as stream
from blipfast.errors import BackendError, ShapeError
from blipfast.ops._dispatch import use_backend
from blipfast.ops.contrastive import contrastive_softmax, contrastive_softmax_reference


def features(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 8 keys, so that small inputs cross several boundaries."""
    monkeypatch.setattr(stream, "_MIN_CHUNK", 8)
    monkeypatch.setattr(stream, "_CPU_SCORES", 1)


def run(function, query, keys, temperature, grad, **options):  # type: ignore[no-untyped-def]
    inputs = [query, *keys, temperature]
    inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    loss = function(inputs[0], inputs[1:-1], inputs[-1], **options)
    loss.backward(grad.to(loss.dtype))
    return [loss.detach(), *(t.grad for t in inputs)]


SHAPES = [(1, 1, 4), (1, 7, 4), (3, 8, 5), (5, 21, 16), (9, 64, 33), (17, 17, 8)]


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("positives", ["row", "offset", "ids"])
@pytest.mark.parametrize(("size", "total", "width"), SHAPES)
def test_parity_in_float64(
    size: int, total: int, width: int, positives: str, with_teacher: bool
) -> None:
    query = features(size, width).requires_grad_()
    first = total // 3
    keys = [features(first, width, seed=1), features(total - first, width, seed=2)]
    keys = [key.requires_grad_() for key in keys]
    temperature = torch.tensor(0.11, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(size) % 4, torch.arange(total).flip(0) % 6
    options = {
        "positives": {"row": None, "offset": total - size, "ids": ids}[positives],
        "teacher_query": features(size, width, seed=3) if with_teacher else None,
        "alpha": 0.4,
    }
    grad = torch.linspace(-1, 2, size, dtype=torch.float64)
    ours = run(contrastive_softmax, query, keys, temperature, grad, impl="torch", **options)
    plain = run(contrastive_softmax_reference, query, keys, temperature, grad, **options)
    for name, a, b in zip(["loss", "query", "keys", "queue", "T"], ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("with_ids", [False, True])
def test_reference_against_a_loop_over_the_formula(with_ids: bool) -> None:
    query, teacher, keys = features(3, 6), features(3, 6, seed=1), features(5, 6, seed=2)
    query_ids, key_ids = torch.tensor([4, 1, 9]), torch.tensor([1, 4, 4, 7, 1])
    positives = (query_ids, key_ids) if with_ids else 2
    loss = contrastive_softmax_reference(
        query,
        keys,
        torch.tensor(0.2),
        teacher_query=teacher,
        alpha=0.3,
        positives=positives,
    )
    for i in range(3):
        s = torch.stack([query[i].dot(keys[j]) / 0.2 for j in range(5)])
        soft = torch.stack([teacher[i].dot(keys[j]) / 0.2 for j in range(5)]).exp()
        equal = [bool(query_ids[i] == key_ids[j]) if with_ids else j == i + 2 for j in range(5)]
        expected = torch.zeros((), dtype=torch.float64)
        for j in range(5):
            target = 0.3 * soft[j] / soft.sum() + 0.7 * equal[j] / max(1, sum(equal))
            expected -= target * (s[j] - s.exp().sum().log())
        torch.testing.assert_close(loss[i], expected, rtol=1e-6, atol=1e-6)


def test_equals_cross_entropy_without_a_teacher() -> None:
    query, keys = features(6, 8), features(20, 8, seed=1)
    loss = contrastive_softmax(query, keys, torch.tensor(0.07, dtype=torch.float64), positives=3)
    expected = F.cross_entropy(query @ keys.T / 0.07, torch.arange(6) + 3, reduction="none")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("with_ids", [False, True])
def test_gradcheck(with_ids: bool) -> None:
    query, keys = features(3, 4).requires_grad_(), features(11, 4, seed=1).requires_grad_()
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    ids = (torch.tensor([0, 1, 5]), torch.arange(11) % 3)
    positives = ids if with_ids else None

    def function(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        # The soft targets are constants of the loss although they depend on keys and temperature,
        # which numerical differences cannot know: check with hard targets.
        return contrastive_softmax(q, k, t, positives=positives, impl="torch")

    assert torch.autograd.gradcheck(function, (query, keys, temperature))


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
def test_opcheck(with_ids: bool, with_teacher: bool) -> None:
    query = features(3, 4, dtype=torch.float32).requires_grad_()
    keys = [
        features(3, 4, dtype=torch.float32, seed=1).requires_grad_(),
        features(9, 4, dtype=torch.float32, seed=2),
    ]
    temperature = torch.tensor(0.1, requires_grad=True)
    teacher = features(3, 4, dtype=torch.float32, seed=3) if with_teacher else None
    ids = (torch.arange(3), torch.arange(12)) if with_ids else (None, None)
    arguments = (query, keys, temperature, teacher, torch.tensor(0.4), *ids, 0, "torch")
    torch.library.opcheck(torch.ops.blipfast.contrastive_softmax.default, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_at_most_twice_plain_pytorch(dtype: torch.dtype) -> None:
    query, teacher = features(24, 64, dtype=dtype), features(24, 64, dtype=dtype, seed=1)
    keys = features(150, 64, dtype=dtype, seed=2)
    temperature = torch.tensor(0.07)
    grad = torch.ones(24) / 24

    def plain(q, k, t, *, teacher_query, alpha):  # type: ignore[no-untyped-def]
        log_p = torch.log_softmax(q @ k[0].T / t, 1)
        with torch.no_grad():
            soft = torch.softmax(teacher_query @ k[0].T / t, 1)
            targets = alpha * soft + (1 - alpha) * torch.eye(*log_p.shape, dtype=q.dtype)
        return -(targets * log_p).sum(1)

    def leaf(tensor: Tensor, to: torch.dtype) -> Tensor:
        return tensor.to(to).requires_grad_()

    results = {}
    for name, function, to in [
        ("exact", contrastive_softmax_reference, torch.float64),
        ("plain", plain, dtype),
        ("ours", contrastive_softmax, dtype),
    ]:
        scale = leaf(temperature, torch.float32 if name == "ours" else to)
        results[name] = run(
            function,
            leaf(query, to),
            [leaf(keys, to)],
            scale,
            grad,
            teacher_query=teacher.to(to),
            alpha=0.4,
        )
    for ours, simple, exact in zip(*(results[n] for n in ("ours", "plain", "exact")), strict=True):
        error, allowed = (ours - exact).abs().max(), (simple - exact).abs().max()
        rounding = exact.abs().max() * torch.finfo(dtype).eps
        assert error <= 2 * allowed + rounding
    assert results["ours"][0].dtype == torch.float32
    assert results["ours"][1].dtype == dtype


def test_autocast_does_not_lower_the_precision() -> None:
    query, keys = features(8, 16, dtype=torch.float32), features(40, 16, dtype=torch.float32)
    expected = contrastive_softmax(query, keys, torch.tensor(0.01))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_softmax(query, keys, torch.tensor(0.01)), expected)


def test_blocks_that_need_no_gradient_may_change_before_backward() -> None:
    query, queue = features(4, 8).requires_grad_(), features(30, 8, seed=1)
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with use_backend(contrastive_softmax="torch"):
        contrastive_softmax(query, [features(4, 8, seed=2), queue], temperature).sum().backward()
        expected, query.grad = query.grad, None
        loss = contrastive_softmax(query, [features(4, 8, seed=2), queue], temperature).sum()
    queue.fill_(float("nan"))
    loss.backward()
    assert torch.equal(query.grad, expected)


def test_teacher_and_alpha_get_no_gradient() -> None:
    query, teacher = features(4, 8).requires_grad_(), features(4, 8, seed=1).requires_grad_()
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    keys, temperature = features(9, 8), torch.tensor(0.1, dtype=torch.float64)
    for impl in ("torch", "reference"):
        loss = contrastive_softmax(
            query, keys, temperature, teacher_query=teacher, alpha=alpha, impl=impl
        )
        loss.sum().backward()
    assert teacher.grad is None
    assert alpha.grad is None


def test_never_reads_uninitialised_memory() -> None:
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        query, keys = features(5, 8).requires_grad_(), features(29, 8, seed=1).requires_grad_()
        temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        contrastive_softmax(query, keys, temperature, impl="torch").sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.grad.isfinite().all() for t in (query, keys, temperature))


def test_extreme_scores_stay_finite() -> None:
    query = features(4, 8, dtype=torch.float32) * 50
    keys = features(30, 8, dtype=torch.float32, seed=1) * 50
    loss = contrastive_softmax(query, keys, torch.tensor(0.001))
    torch.testing.assert_close(
        loss, contrastive_softmax_reference(query, keys, torch.tensor(0.001)), rtol=1e-5, atol=1.0
    )
    assert loss.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_useless_temperature(temperature: float, impl: str) -> None:
    query, keys = features(4, 8), features(9, 8, seed=1)
    loss = contrastive_softmax(query, keys, torch.tensor(temperature), impl=impl)
    if temperature == float("inf"):  # all keys are alike
        torch.testing.assert_close(loss, torch.full((4,), 9.0, dtype=torch.float64).log())
    else:
        assert loss.isnan().all()


def test_no_query_gives_no_loss() -> None:
    for impl in ("torch", "reference"):
        assert contrastive_softmax(
            features(0, 8), features(9, 8), torch.tensor(0.1), impl=impl
        ).shape == (0,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": torch.zeros(9, 7)}, "the width of query"),
        ({"keys": [torch.zeros(9, 8), torch.zeros(8)]}, r"keys\[1\]"),
        ({"keys": torch.zeros(0, 8)}, "no keys"),
        ({"keys": []}, "no keys"),
        ({"keys": torch.zeros(3, 8)}, "positives are keys 0 to 3, but there are 3"),
        ({"positives": 6}, "positives are keys 6 to 9"),
        ({"positives": -1}, "positives are keys -1"),
        ({"positives": (torch.arange(4), torch.arange(8))}, "8 key ids"),
        ({"positives": (torch.arange(3), torch.arange(9))}, "3 query ids"),
        ({"temperature": torch.ones(2)}, "one element"),
        ({"teacher_query": torch.zeros(3, 8)}, "teacher_query"),
        ({"query": torch.zeros(4, 8, dtype=torch.int64)}, "float"),
        ({"query": torch.zeros(8)}, r"\(B, D\)"),
        ({"keys": torch.zeros(9, 8, device="meta")}, "meta"),
    ],
)
def test_bad_input(change: dict[str, object], words: str) -> None:
    inputs = {"query": torch.zeros(4, 8), "keys": torch.zeros(9, 8), "temperature": torch.ones(())}
    with pytest.raises(ShapeError, match=words):
        contrastive_softmax(**{**inputs, **change})  # type: ignore[arg-type]


def test_compiles_in_one_graph() -> None:
    query, keys = features(4, 8).requires_grad_(), [features(4, 8, seed=1), features(9, 8)]
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def step(q: Tensor, k: list[Tensor], t: Tensor) -> Tensor:
        return contrastive_softmax(q, k, t, teacher_query=q.detach(), alpha=0.3, impl="torch")

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (step, compiled):
        loss = function(query, keys, temperature).sum()
        gradients.append(torch.autograd.grad(loss, (query, temperature)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        contrastive_softmax(torch.ones(1, 2), torch.ones(1, 2), torch.ones(()), impl="cuda")
