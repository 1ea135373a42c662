"""Fixtures of the operators' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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
