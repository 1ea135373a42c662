"""Packing: ragged sequences laid end to end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blipfast.errors import ShapeError
from blipfast.ops import packing as packing_module
from blipfast.ops.attention import CrossPlan
from blipfast.ops.packing import Packing, gather_rows, scatter_rows

lengths_lists = st.lists(st.integers(0, 7), min_size=1, max_size=6)


@given(lengths_lists, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_unpad_undoes_pad_at_any_width(lengths: list[int], extra: int) -> None:
    packing = Packing.from_lengths(lengths)
    packed = torch.randn(packing.total, 2)
    padded = packing.pad(packed)
    assert padded.shape == (len(lengths), packing.max_seqlen, 2)
    for row, length, part in zip(padded, lengths, packed.split(lengths), strict=True):
        assert torch.equal(row[:length], part)
        assert not row[length:].any()
    wider = torch.cat([padded, padded.new_full((len(lengths), extra, 2), torch.nan)], dim=1)
    assert torch.equal(packing.unpad(wider), packed)


@given(lengths_lists, st.data())
@settings(max_examples=60, deadline=None)
def test_select_gathers_whole_sequences(lengths: list[int], data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    packing = Packing.from_lengths(lengths)
    packed = torch.arange(packing.total)
    chosen, tokens = packing.select(index)
    parts = packed.split(lengths)
    expected = torch.cat([parts[i] for i in index]) if index else packed[:0]
    assert torch.equal(packed[tokens], expected)
    assert chosen.lengths == tuple(lengths[i] for i in index)


def test_layout_tensors_are_those_of_flash_attention() -> None:
    packing = Packing.from_lengths([2, 0, 3])
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packing.positions.tolist() == [0, 1, 0, 1, 2]
    assert packing.sequence_ids.tolist() == [0, 0, 2, 2, 2]
    assert (packing + Packing.from_lengths([4])).cu_seqlens.tolist() == [0, 2, 2, 5, 9]


def test_from_mask_needs_padding_on_the_right() -> None:
    assert Packing.from_mask(torch.tensor([[1, 1, 0], [1, 0, 0]])).lengths == (2, 1)
    with pytest.raises(ShapeError, match="right-padded"):
        Packing.from_mask(torch.tensor([[0, 1, 1]]))
    with pytest.raises(ShapeError, match=r"\(N, L\)"):
        Packing.from_mask(torch.ones(3))
    with pytest.raises(ShapeError, match="to unpad"):
        Packing.from_lengths([4]).unpad(torch.zeros(1, 3))


def test_gather_and_scatter_rows_differentiate() -> None:
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, index), (rows,))
    assert torch.autograd.gradcheck(
        lambda x: scatter_rows(x, index, 6), (rows[:3].detach().requires_grad_(),)
    )


def test_index_tensors_of_another_device_are_made_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is one copy of what the CPU's layout has, of the same shape and type."""
    copied = []
    original = packing_module.from_host

    def from_host(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert tensor.is_cpu
        copied.append(tensor)
        return original(tensor, device)

    monkeypatch.setattr(packing_module, "from_host", from_host)
    here, there = (Packing.from_lengths([3, 0, 2, 4], device) for device in ("cpu", "meta"))
    names = ["lengths_tensor", "cu_seqlens", "sequence_ids", "positions", "first_tokens", "mask"]
    for name in [*names, "slots", "all_but_last"]:
        copied.clear()
        expected, found = getattr(here, name), getattr(there, name)
        assert found.is_meta
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        (made,) = copied
        assert torch.equal(made, expected)
        assert getattr(there, name) is found
    assert here.all_but_last.tolist() == [0, 1, 3, 5, 6, 7]
    copied.clear()
    assert there.select([2, 0])[1].is_meta
    assert torch.equal(copied[-1], here.select([2, 0])[1])


def test_plans_of_another_device_too() -> None:
    for index in ([1, 0, 1, 0], [0, 0, 1, 1]):
        plans = [
            CrossPlan.build(Packing.from_lengths([3, 1, 2, 4], device), index, 2).prepare()
            for device in ("cpu", "meta")
        ]
        for name in ("order", "slots"):
            expected, found = (getattr(plan, name) for plan in plans)
            assert (expected is None) == (found is None)
            if found is not None:
                assert found.is_meta
                assert found.shape == expected.shape
