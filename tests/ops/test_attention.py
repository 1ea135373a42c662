"""Self- and cross-attention over packed text against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blipfast.errors import BackendError, ShapeError
from blipfast.ops._dispatch import use_backend
from blipfast.ops.attention import (
    CrossPlan,
    cross_attention,
    cross_attention_reference,
    varlen_attention,
    varlen_attention_reference,
)
from blipfast.ops.packing import Packing

LENGTHS = [[3], [1, 1], [5, 2, 7, 1], [4, 0, 6], [30, 9, 14, 22, 11]]


def gradients(outputs: Tensor, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((outputs * weights).sum(), inputs))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_varlen_attention_equals_the_formula(lengths: list[int], causal: bool) -> None:
    torch.manual_seed(0)
    packing = Packing.from_lengths(lengths)
    qkv = torch.randn(packing.total, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(packing.total, 2, 8, dtype=torch.float64)
    ours = varlen_attention(qkv, packing, causal=causal)
    exact = varlen_attention_reference(qkv, packing, causal)
    torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)
    for a, b in zip(gradients(ours, [qkv], weights), gradients(exact, [qkv], weights), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("lengths", "kv_index", "num_kv"),
    [
        ([3], [0], 1),
        ([5, 2, 7, 1], [0, 0, 0, 0], 1),  # one image for many texts
        ([5, 2, 7, 1], [2, 0, 2, 1], 4),  # shuffled, and an image nobody looks at
        ([4, 0, 6], [1, 1, 0], 2),  # an empty text
        ([2, 2, 2, 2], [0, 0, 1, 1], 2),  # beams: a mere view
        ([9, 9, 9, 9, 1], [0, 0, 0, 0, 4], 5),  # one image far more looked at
    ],
)
@pytest.mark.parametrize("padded_keys", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_attention_equals_the_formula(
    lengths: list[int],
    kv_index: list[int],
    num_kv: int,
    padded_keys: bool,
    dtype: torch.dtype,
    assert_no_worse,
) -> None:
    torch.manual_seed(0)
    packing = Packing.from_lengths(lengths)
    kv_lengths = torch.arange(num_kv) % 5 + 2 if padded_keys else None
    plan = CrossPlan.build(packing, kv_index, num_kv, kv_lengths)
    low = [torch.randn(packing.total, 2, 8), *torch.randn(2, num_kv, 2, 7, 8)]
    low = [x.to(dtype).requires_grad_() for x in low]
    high = [x.detach().double().requires_grad_() for x in low]
    weights = torch.randn(packing.total, 2, 8).to(dtype)
    outs = (
        cross_attention(*low, plan),
        cross_attention_reference(*low, plan),
        cross_attention_reference(*high, plan),
    )
    assert_no_worse(*outs, "out")
    grads = (
        gradients(outs[0], low, weights),
        gradients(outs[1], low, weights),
        gradients(outs[2], high, weights.double()),
    )
    for name, ours, plain, exact in zip("qkv", *grads, strict=True):
        assert_no_worse(ours, plain, exact, f"d{name}")


def test_gradcheck_of_both_references() -> None:
    packing = Packing.from_lengths([2, 3])
    qkv = torch.randn(5, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: varlen_attention(x, packing, causal=True), (qkv,))
    plan = CrossPlan.build(packing, [1, 1], 2)
    q = torch.randn(5, 1, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k, v: cross_attention(q, k, v, plan), (q, k, v))


def test_padding_never_leaks_into_a_text() -> None:
    """Values that no text may see are poisoned."""
    packing = Packing.from_lengths([2, 5])
    plan = CrossPlan.build(packing, [0, 1], 2, torch.tensor([3, 6]))
    q, k, v = torch.randn(7, 2, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    clean = cross_attention(q, k, v, plan)
    k[0, :, 3:], v[0, :, 3:] = 1e4, 1e4
    torch.testing.assert_close(cross_attention(q, k, v, plan), clean)


def test_dropout_keeps_the_mean() -> None:
    packing = Packing.from_lengths([4, 4])
    plan = CrossPlan.build(packing, [0, 0], 1)
    q, k, v = torch.randn(8, 2, 8), torch.randn(1, 2, 64, 8), torch.ones(1, 2, 64, 8)
    torch.manual_seed(0)
    out = torch.stack([cross_attention(q, k, v, plan, dropout_p=0.5) for _ in range(50)])
    assert out.std() > 0.01
    assert abs(out.mean().item() - 1.0) < 0.05


def test_bad_input_is_named() -> None:
    packing = Packing.from_lengths([2, 3])
    with pytest.raises(ShapeError, match=r"\[0, 2\)"):
        CrossPlan.build(packing, [0, 2], 2)
    with pytest.raises(ShapeError, match="names 1 sets for 2 sequences"):
        CrossPlan.build(packing, [0], 2)
    with pytest.raises(ShapeError, match="kv_lengths"):
        CrossPlan.build(packing, [0, 1], 2, torch.ones(3))
    plan = CrossPlan.build(packing, [0, 1], 2)
    q, k = torch.randn(5, 2, 8), torch.randn(2, 2, 6, 8)
    with pytest.raises(ShapeError, match="2 heads of 8, but k 4 of 4"):
        cross_attention(q, *[torch.randn(2, 4, 6, 4)] * 2, plan)
    with pytest.raises(ShapeError, match="5 tokens and 2 key/value sets"):
        cross_attention(q[:4], k, k, plan)
    with pytest.raises(ShapeError, match="float32"):
        cross_attention(q, k.double(), k.double(), plan)
    with pytest.raises(ShapeError, match="qkv must be"):
        varlen_attention(q, packing)
    with pytest.raises(ShapeError, match="holds 4 tokens"):
        varlen_attention(torch.randn(4, 3, 2, 8), packing)


def test_backends_are_chosen_in_order_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    packing = Packing.from_lengths([2, 3])
    qkv = torch.randn(5, 3, 2, 8)
    exact = varlen_attention(qkv, packing, impl="reference")
    with use_backend(varlen_attention="reference"):
        assert torch.equal(varlen_attention(qkv, packing), exact)
    monkeypatch.setenv("BLIPFAST_BACKEND", "varlen_attention=reference")
    assert torch.equal(varlen_attention(qkv, packing), exact)
    with pytest.raises(BackendError, match="no backend 'fast'"):
        varlen_attention(qkv, packing, impl="fast")
    with pytest.raises(BackendError, match="no operator"), use_backend(attentoin="torch"):
        pass
    monkeypatch.setenv("BLIPFAST_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="op=backend"):
        varlen_attention(qkv, packing)


def test_prepared_plans_compile_into_one_graph_for_all_batches() -> None:
    """No graph break, and batches of other lengths do not compile again for ever."""

    def attend(qkv: Tensor, k: Tensor, v: Tensor, plan: CrossPlan) -> Tensor:
        q = varlen_attention(qkv, plan.packing, causal=True, impl="torch")
        return cross_attention(q, k, v, plan, impl="torch").square().sum()

    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    seen = []
    for lengths in ([3, 4, 2], [5, 1, 7], [2, 9, 4], [8, 3, 6], [1, 1, 9], [6, 2, 4]):
        plan = CrossPlan.build(Packing.from_lengths(lengths), [1, 0, 1], 2).prepare()
        qkv = torch.randn(sum(lengths), 3, 2, 8, requires_grad=True)
        k, v = torch.randn(2, 2, 2, 5, 8, requires_grad=True)
        leaves = [qkv, k, v]
        ours, plain = compiled(qkv, k, v, plan), attend(qkv, k, v, plan)
        torch.testing.assert_close(ours, plain)
        grads = zip(
            torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True
        )
        for a, b in grads:
            torch.testing.assert_close(a, b)
        seen.append(graphs["unique_graphs"])
    assert seen[-1] == seen[2], f"graphs after each batch: {seen}"
