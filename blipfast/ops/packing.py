"""Ragged sequences without padding.

`Packing` says where `N` sequences lie in one packed `(T, ...)` tensor, in the terms of
flash-attention's varlen interface (`cu_seqlens`, `max_seqlen`). It is built once per batch and
used by every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blipfast.errors import ShapeError

Index = Sequence[int] | Tensor  # a tensor where the device knows first


class lazy:
    """An attribute computed when first asked for.

    `functools.cached_property` without its lock, which torch.compile cannot trace before Python
    3.12.
    """

    def __init__(self, compute: Any) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        value = self.compute(instance)
        instance.__dict__[self.name] = value
        return value


class host_made(lazy):
    """A lazy index tensor of a layout with a `host`, where it is made, to be copied as a whole:
    on a GPU each small operation is a launch, and a copy of a list waits for all before it."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None or instance.host is instance or torch.compiler.is_compiling():
            return super().__get__(instance, owner)
        value = getattr(instance.host, self.name)
        value = value if value is None else from_host(value, instance.device)
        instance.__dict__[self.name] = value
        return value


def from_host(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)`, for which nobody waits."""
    if device.type != "cuda" or not tensor.is_cpu:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Packing:
    """The layout of `N` sequences packed one after the other.

    lengths: tokens of each sequence, on the host, so that no kernel launch waits for the device.
    device: where the index tensors live.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
        if any(length < 0 for length in lengths):
            raise ShapeError(f"lengths must not be negative, got {list(lengths)}")
        return cls(tuple(int(length) for length in lengths), torch.device(device))

    @classmethod
    def from_mask(cls, attention_mask: Tensor, device: torch.device | None = None) -> Packing:
        """From a right-padded mask `(N, L)`, 1 for a token and 0 for padding.

        device: of the index tensors, if another than the mask's.
        Raises ShapeError when the mask is not two-dimensional or a token follows padding.
        """
        if attention_mask.dim() != 2:
            raise ShapeError(f"attention_mask must be (N, L), got {tuple(attention_mask.shape)}")
        mask = attention_mask.cpu().bool()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ShapeError("attention_mask must be right-padded: a 1 follows a 0")
        return cls.from_lengths(mask.sum(1).tolist(), device or attention_mask.device)

    def prepare(self) -> Packing:
        """Computes all index tensors now, as for a compiled model, which then takes them as they
        are; otherwise they are made when first asked for. Returns self.
        """
        for name in ("uniform", "first_tokens", "lengths_tensor", "slots"):
            getattr(self, name)  # and what these are made from
        return self

    @lazy
    def host(self) -> Packing:
        """The same layout on the CPU, where its index tensors are made."""
        return self if self.device.type == "cpu" else Packing(self.lengths, torch.device("cpu"))

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_rows(self) -> int:
        """Rows of the padded tensor."""
        return self.num_sequences

    @property
    def any_empty(self) -> bool:
        return 0 in self.lengths

    @property
    def num_following(self) -> int | Tensor:
        """How many tokens follow another of their sequence, which a language model learns."""
        return self.total - self.num_sequences

    @property
    def in_sequences(self) -> Tensor | None:
        """`(T,)` bool, True for a token of a sequence; None: all are."""
        return None

    @lazy
    def total(self) -> int:
        return sum(self.lengths)

    @lazy
    def max_seqlen(self) -> int:
        return max(self.lengths) if self.lengths else 0

    @lazy
    def uniform(self) -> bool:
        """All sequences have the same length, so that padding is a mere view."""
        return self.total == self.max_seqlen * self.num_sequences

    @host_made
    def lengths_tensor(self) -> Tensor:
        """`(N,)` int64."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.device)

    @host_made
    def cu_seqlens(self) -> Tensor:
        """`(N + 1,)` int32: sequence `n` is tokens `cu_seqlens[n]:cu_seqlens[n + 1]`."""
        zero = self.lengths_tensor.new_zeros(1)
        return torch.cat([zero, self.lengths_tensor.cumsum(0)]).to(torch.int32)

    @host_made
    def sequence_ids(self) -> Tensor:
        """`(T,)` int64: the sequence each token belongs to."""
        sequences = torch.arange(self.num_rows, device=self.device)
        return sequences.repeat_interleave(self.lengths_tensor, output_size=self.total)

    @host_made
    def positions(self) -> Tensor:
        """`(T,)` int64: the place of each token within its sequence."""
        starts = self.cu_seqlens[:-1].to(torch.int64)[self.sequence_ids]
        return torch.arange(self.total, device=self.device) - starts

    @host_made
    def first_tokens(self) -> Tensor:
        """`(N,)` int64: the packed index of each sequence's first token."""
        return self.cu_seqlens[:-1].to(torch.int64)

    @host_made
    def all_but_last(self) -> Tensor:
        """`(T - N,)` int64: the packed tokens that another one of their sequence follows."""
        last = (self.first_tokens + self.lengths_tensor - 1)[self.lengths_tensor > 0]
        kept = torch.ones(self.total, dtype=torch.bool, device=self.device)
        return kept.index_fill_(0, last, False).nonzero().squeeze(1)

    @host_made
    def mask(self) -> Tensor:
        """`(N, max_seqlen)` bool, True for a token."""
        columns = torch.arange(self.max_seqlen, device=self.device)
        return columns[None, :] < self.lengths_tensor[:, None]

    def _slots(self, width: int) -> Tensor:
        return self.sequence_ids * width + self.positions

    @host_made
    def slots(self) -> Tensor:
        """`(T,)` int64: each token's row in the padded `(N * max_seqlen, ...)` tensor."""
        return self._slots(self.max_seqlen)

    def pad(self, packed: Tensor) -> Tensor:
        """`(T, ...)` to `(N, max_seqlen, ...)`, zeros where there is no token."""
        shape = (self.num_rows, self.max_seqlen, *packed.shape[1:])
        if self.uniform:
            return packed.reshape(shape)
        return scatter_rows(packed, self.slots, shape[0] * shape[1]).reshape(shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """`(N, L, ...)` with `L >= max_seqlen` to `(T, ...)`."""
        if padded.shape[:1] != (self.num_rows,) or padded.shape[1] < self.max_seqlen:
            raise ShapeError(
                f"expected ({self.num_rows}, >= {self.max_seqlen}, ...) to unpad, "
                f"got {tuple(padded.shape)}"
            )
        rows = padded.flatten(0, 1)
        if self.uniform and padded.shape[1] == self.max_seqlen:
            return rows
        slots = self.slots if padded.shape[1] == self.max_seqlen else self._slots(padded.shape[1])
        return gather_rows(rows, slots)

    def select(self, index: Index) -> tuple[Packing, Tensor]:
        """The packing of the sequences in `index` and the `(T',)` token index that gathers them."""
        index = index.tolist() if isinstance(index, Tensor) else index
        chosen = Packing.from_lengths([self.lengths[i] for i in index], self.device)
        starts = self.host.first_tokens[torch.tensor(index, dtype=torch.int64, device="cpu")]
        tokens = starts[chosen.host.sequence_ids] + chosen.host.positions
        return chosen, from_host(tokens, self.device)

    def first_only(self) -> Packing:
        """The packing of each sequence's first token alone."""
        return Packing.from_lengths([1] * self.num_sequences, self.device)

    def without_last(self) -> tuple[Packing, Tensor]:
        """The packing without each sequence's last token, and the token index that gathers it."""
        shorter = Packing.from_lengths([n - 1 for n in self.lengths], self.device)
        return shorter, self.all_but_last

    def __add__(self, other: Packing) -> Packing:
        """The packing of `torch.cat([a, b])`."""
        return Packing(self.lengths + other.lengths, self.device)


@dataclass(frozen=True)
class SharedPrefixes:
    """Causal texts whose common prefixes exist once, as nodes.

    texts: the packing of the whole texts, `T` tokens. nodes: `(T,)` int64, each token's node among
    `U`. first: `(U,)` int64, a token of each node.
    """

    texts: Packing
    nodes: Tensor
    first: Tensor

    @property
    def positions(self) -> Tensor:
        """`(U,)` int64: each node's place in its texts."""
        return self.texts.positions[self.first]


class _GatherRows(torch.autograd.Function):
    """Rows at distinct indices, so that the backward is a plain copy, without atomics."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return scatter_rows(grad, index, ctx.num_rows), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, num_rows: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        out = rows.new_zeros((num_rows, *rows.shape[1:]))
        return out.index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return gather_rows(grad, index), None, None


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]` for an `index` without repeats, with a backward that copies."""
    if torch.compiler.is_compiling():  # torch 2.11 would lose the gradient of such a function
        return rows.index_select(0, index)
    return _GatherRows.apply(rows, index)


def scatter_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Zeros `(num_rows, ...)` with `rows` at `index` (no repeats): the inverse of `gather_rows`."""
    if torch.compiler.is_compiling():
        return rows.new_zeros((num_rows, *rows.shape[1:])).index_copy(0, index, rows)
    return _ScatterRows.apply(rows, index, num_rows)
