"""Other people's packed attention: called as their signatures want it, and refused in words.

The kernels need CUDA. Here functions of the same signatures stand for them, which compute from the
formula what they were asked for; so layout, lengths, causality and dropout are seen to arrive.
"""

from __future__ import annotations

import inspect
import math
import sys
import types

import pytest
import torch
from torch import Tensor

from blipfast.errors import BackendError
from blipfast.ops import _varlen_libraries as libraries
from blipfast.ops import varlen_attention
from blipfast.ops.attention import varlen_attention_reference, varlen_backends
from blipfast.ops.packing import Packing

LENGTHS = [[3], [5, 2, 7, 1], [1, 1]]


def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, causal: bool) -> Tensor:
    """`(T, H, D)` each, one text after the other."""
    assert cu.dtype == torch.int32
    outputs = []
    for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) / math.sqrt(q.shape[-1])
        if causal:
            scores += torch.full_like(scores[0], -math.inf).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:stop]))
    return torch.cat(outputs)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Modules with the libraries' signatures; gives the dropout that they were called with."""
    asked: list[float] = []

    def flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert max_seqlen == int(cu_seqlens.diff().max())
        asked.append(dropout_p)
        return attend(*qkv.unbind(1), cu_seqlens, causal)

    class BlockDiagonalMask:
        def __init__(self, lengths, causal=False):
            self.lengths, self.causal = lengths, causal

        @classmethod
        def from_seqlens(cls, q_seqlen):
            return cls(list(q_seqlen))

        def make_causal(self):
            return BlockDiagonalMask(self.lengths, True)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert query.dim() == 4
        assert query.shape[0] == 1
        asked.append(p)
        cu = torch.tensor([0, *attn_bias.lengths]).cumsum(0).int()
        return attend(query[0], key[0], value[0], cu, attn_bias.causal)[None]

    flash = types.ModuleType("flash_attn")
    flash.flash_attn_varlen_qkvpacked_func = flash_attn_varlen_qkvpacked_func
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    ops.fmha = types.SimpleNamespace(
        attn_bias=types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    )
    xformers = types.ModuleType("xformers")
    xformers.ops = ops
    for name, module in (("flash_attn", flash), ("xformers", xformers), ("xformers.ops", ops)):
        monkeypatch.setitem(sys.modules, name, module)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        real = inspect.signature(REAL_VARLEN)
        real.bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)  # or TypeError
        assert max_q == max_k == int(cu_seq_q.diff().max())
        window = options["window_size"]
        assert window in ((-1, 0), (-1, -1))
        return attend(query, key, value, cu_seq_q, window == (-1, 0))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    libraries._found_missing.cache_clear()
    yield asked
    libraries._found_missing.cache_clear()


from torch.nn.attention.varlen import varlen_attn as REAL_VARLEN  # noqa: E402


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["flash_attn", "xformers", "torch_varlen"])
def test_what_they_are_asked_for(stand_ins, name, lengths, causal) -> None:
    packing = Packing.from_lengths(lengths)
    qkv = torch.randn(packing.total, 3, 2, 8, dtype=torch.float64)
    run = {**libraries.FIRST, **libraries.BY_NAME}[name][0]
    dropout_p = 0.0 if name == "torch_varlen" else 0.25
    found = run(qkv, packing, causal, dropout_p)
    torch.testing.assert_close(found, varlen_attention_reference(qkv, packing, causal))
    assert stand_ins == ([] if name == "torch_varlen" else [0.25])
    if name == "torch_varlen":
        with pytest.raises(BackendError, match="no dropout"):
            run(qkv, packing, causal, 0.25)


def test_they_are_refused_in_words(stand_ins, monkeypatch) -> None:
    packing = Packing.from_lengths([3])
    qkv = torch.randn(3, 3, 2, 8)
    for name in ("flash_attn", "xformers", "torch_varlen"):
        with pytest.raises(BackendError, match="needs CUDA, the tensor is on cpu"):
            varlen_attention(qkv, packing, impl=name)
    card = torch.empty(3, 3, 2, 8, device="meta")
    reason = libraries.FIRST["flash_attn"][1]
    monkeypatch.setattr(type(card), "device", torch.device("cuda"), raising=False)
    assert "takes fp16 and bf16" in reason(card)
    assert reason(card.half()) is None
    assert "multiple of 8" in reason(torch.empty(3, 3, 2, 12, device="meta").half())


def test_without_them_nothing_changes(monkeypatch) -> None:
    name, why = varlen_backends.choose(torch.randn(3, 3, 2, 8, requires_grad=True))
    assert name == "torch"
    assert "not flash_attn" in why
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails
    libraries._found_missing.cache_clear()
    card = torch.empty(3, 3, 2, 8, device="meta").half()
    monkeypatch.setattr(type(card), "device", torch.device("cuda"), raising=False)
    reason = libraries.FIRST["flash_attn"][1](card)
    assert reason == (
        "flash_attn cannot be imported (ModuleNotFoundError); pip install 'blipfast[gpu]'"
    )
    libraries._found_missing.cache_clear()
