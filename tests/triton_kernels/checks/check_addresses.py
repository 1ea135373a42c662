"""That wrong addresses are seen in the interpreter, on which the other checks rest."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from addresses import OutOfBoundsError, RaceError
from place import INTERPRETED


@triton.jit
def _copy(source, target, first, size, SIZE: tl.constexpr):
    i = first + tl.arange(0, SIZE)
    tl.store(target + i, tl.load(source + i, mask=(i >= 0) & (i < size)), mask=i < size)


@triton.jit
def _copy_one(source, target, place):
    tl.store(target, tl.load(source + place))


@triton.jit
def _shift(source, target, by, STEP: tl.constexpr):
    program = tl.program_id(0)
    x = tl.load(source + program)
    tl.store(target + (program + by) // STEP, x)


@triton.jit
def _add_to_one(source, total):
    tl.atomic_add(total, tl.load(source + tl.program_id(0)))


def copied(first: int, size: int) -> torch.Tensor:
    memory = torch.arange(64.0)  # the tensors lie within it, so that nothing else is touched
    _copy[(1,)](memory[16:24], memory[32:40], first, size, SIZE=8)
    return memory[32:40]


def test_what_a_mask_leaves_out_is_not_touched() -> None:
    assert torch.equal(copied(0, 8), torch.arange(16.0, 24.0))
    assert torch.equal(copied(3, 8)[3:], torch.arange(19.0, 24.0))


if INTERPRETED:  # a card would read what is not ours

    @pytest.mark.parametrize(
        ("first", "size", "words"),
        [(1, 9, "1 of 8 elements are read .* 0 bytes beyond"), (-2, 6, "2 of 8 .* written .* 8 ")],
    )
    def test_what_it_does_not_is_an_error(first: int, size: int, words: str) -> None:
        with pytest.raises(Exception, match=words) as found:
            copied(first, size)
        assert OutOfBoundsError.__name__ in repr(found.value)

    @pytest.mark.parametrize("place", [-1, 8, 2**40])
    def test_a_single_element(place: int) -> None:
        memory = torch.arange(64.0)
        with pytest.raises(Exception, match="1 of 1 elements are read"):
            _copy_one[(1,)](memory[16:24], memory[40:41], place)

    def test_columns_between_the_rows_of_a_view_belong_to_it() -> None:
        memory = torch.arange(64.0).view(8, 8)
        _copy_one[(1,)](memory[:, :2], memory[7:, 7:], 5)
        assert memory[7, 7] == 5

    def test_programs_that_write_the_same() -> None:
        source, target = torch.arange(8.0), torch.zeros(8)
        _shift[(8,)](source, target, 0, STEP=1)
        assert torch.equal(source, target)
        with pytest.raises(Exception, match="written by program 1 and written by program 0") as e:
            _shift[(8,)](source, target, 0, STEP=2)
        assert RaceError.__name__ in repr(e.value)

    def test_a_program_that_writes_what_another_reads() -> None:
        memory = torch.arange(9.0)
        _shift[(8,)](memory, memory, 0, STEP=1)  # each its own
        with pytest.raises(Exception, match="read by program 1 and written by program 0"):
            _shift[(8,)](memory, memory, 1, STEP=1)
        with pytest.raises(Exception, match="written by program 1 and read by program 0"):
            _shift[(8,)](memory[1:], memory, 0, STEP=1)

    def test_atomic_sums_are_refused() -> None:
        with pytest.raises(Exception, match="an atomic operation"):
            _add_to_one[(8,)](torch.arange(8.0), torch.zeros(1))
