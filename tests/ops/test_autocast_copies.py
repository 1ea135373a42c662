"""Copies of weights for autocast, made together: the same numbers by fewer operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blipfast.ops import autocast_copies, use_backend
from blipfast.ops.autocast_copies import cast_together, copy_in_use, keeping_copies
from blipfast.ops.linear_layers import Linear


class Casts(TorchDispatchMode):
    """Counts casts one by one, and those made together."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_to_copy" in str(func) or "_foreach_copy_" in str(func):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(5, 7), Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        held = cast_together(self.first, self.second)
        out = self.second(self.first(x))
        del held
        return out


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(autocast_copies, "_DEVICES", ("cpu",))
    with use_backend(linear="torch", feed_forward="torch"):
        yield


def both_ways(model: nn.Module, x: Tensor, times: int = 1) -> tuple[list[Tensor], Counter[str]]:
    with Casts() as casts:
        with torch.autocast("cpu", torch.bfloat16), keeping_copies():
            out = sum(model(x) for _ in range(times))
        grads = torch.autograd.grad(out.float().square().sum(), [x, *model.parameters()])
    return [out, *grads], casts.seen


def test_the_same_outputs_and_gradients_by_fewer_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Pair(), torch.randn(3, 5, requires_grad=True)
    ours, casts = both_ways(model, x)
    again, twice = both_ways(model, x, times=2)
    monkeypatch.setattr(autocast_copies, "_DEVICES", ())
    plain, one_by_one = both_ways(model, x)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)
    assert casts["aten._foreach_copy_.default"] == 2  # there and back
    assert sum(casts.values()) <= sum(one_by_one.values()) - 6  # of eight: four, there and back
    assert twice["aten._foreach_copy_.default"] == 2  # the second use finds the first's
    assert again[0].shape == ours[0].shape


def test_a_copy_lives_while_it_is_held_and_the_weight_is_the_same() -> None:
    layer = Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        held = cast_together(layer)
        assert copy_in_use(layer.weight, torch.bfloat16) is held[0]
        assert copy_in_use(layer.weight, torch.float16) is None
        with torch.no_grad():
            layer.weight.add_(1)
        assert copy_in_use(layer.weight, torch.bfloat16) is None
        assert copy_in_use(layer.bias, torch.bfloat16) is held[1]
        renewed = cast_together(layer)
        assert torch.equal(renewed[-1], layer.weight.bfloat16())
        del held, renewed
        assert copy_in_use(layer.bias, torch.bfloat16) is None


def test_copies_without_gradients_do_not_serve_those_with() -> None:
    layer, frozen = Linear(4, 4), Linear(4, 4).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            held = cast_together(layer, frozen)
            assert len(held) == 4
            assert copy_in_use(layer.weight, torch.bfloat16) is not None
        assert copy_in_use(layer.weight, torch.bfloat16) is None
        assert copy_in_use(frozen.weight, torch.bfloat16) is not None
        assert cast_together(layer)[0].requires_grad


def test_what_it_leaves_alone() -> None:
    assert cast_together(Linear(2, 2)) == []  # no autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_together(nn.Identity(), Linear(2, 2).double()) == []
        assert len(cast_together(Linear(2, 2, bias=False))) == 1
