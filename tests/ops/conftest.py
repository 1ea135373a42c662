"""Fixtures of the operators' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from blipfast.ops import _native, _products


@pytest.fixture(params=["amx", "avx512", "neither"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What the choice between libraries takes the processor for; each choice runs on all."""
    name = str(request.param)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: name == "amx")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: name != "neither")
    monkeypatch.setattr(_products, "mkl_lacks_avx512", lambda: name == "avx512")
    if name == "neither":
        monkeypatch.setattr(_native, "avx512_bf16", lambda: False)
    _products.bf16_products.cache_clear()
    yield name
    _products.bf16_products.cache_clear()


@pytest.fixture
def assert_no_worse() -> Callable[[Tensor, Tensor, Tensor, str], None]:
    """Our error is at most twice that of the plain formula in the same dtype, plus rounding."""

    def check(ours: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
        eps = torch.finfo(ours.dtype).eps
        bound = 2 * (plain.double() - exact).abs().max() + 8 * eps * exact.abs().max()
        error = (ours.double() - exact).abs().max()
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"

    return check
