"""Attention over packed text.

- `varlen_attention`: self-attention within each of `N` packed sequences, bidirectional or causal.
- `cross_attention`: each sequence looks at one of `B` key/value sets, named by `kv_index`. Many
  sequences may share a set (an image's captions, beams, answer candidates), which is projected,
  read and differentiated once. This is MED's image grounding (BLIP, section 3.1) as one operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.ops import _native, _native_attention, _triton, _varlen_libraries
from blipfast.ops._dispatch import Backends
from blipfast.ops.dense import dense_attention, dense_self_attention
from blipfast.ops.packing import Packing, gather_rows, host_made, lazy, scatter_rows
from blipfast.ops.seeded_dropout import new_seed

varlen_backends = Backends("varlen_attention")
cross_backends = Backends("cross_attention")


def varlen_attention(
    qkv: Tensor,
    packing: Packing,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """`softmax(q k^T / sqrt(head_dim)) v` within each packed sequence.

    qkv: `(T, 3, H, head_dim)`, any float dtype: one tensor, so that it is moved once where a
    backend wants padding. Returns `(T, H, head_dim)`.
    Raises ShapeError when the shape is another or does not fit `packing`.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ShapeError(f"qkv must be (T, 3, H, head_dim), got {tuple(qkv.shape)}")
    if qkv.shape[0] != packing.total:
        raise ShapeError(f"qkv holds {qkv.shape[0]} tokens, but the packing {packing.total}")
    if qkv.shape[0] == 0:
        return qkv[:, 0].clone()
    return varlen_backends(qkv, impl)(qkv, packing, causal, dropout_p)


# Above this, padded batches and matrix products are the better use of a CPU.
_SHORT = 32


def _packed_why_not(x: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "what is compiled takes SDPA"
    return _native_attention.why_not(x)


def _native_why_not(qkv: Tensor) -> str | None:
    packed = _packed_why_not(qkv)
    if packed is not None and torch.is_grad_enabled() and qkv.requires_grad:
        return f"the C++ operator has no backward here: {packed}"
    return _native.why_not(qkv)


@varlen_backends.register("native", _native_why_not)
def _varlen_native(qkv: Tensor, packing: Packing, causal: bool, dropout_p: float) -> Tensor:
    """A head of a text at a time, without padding; what it is not for goes to SDPA."""
    short = packing.max_seqlen <= _SHORT
    wants_grad = torch.is_grad_enabled() and qkv.requires_grad
    forward_only = short and dropout_p == 0.0 and not wants_grad
    both_ways = _packed_why_not(qkv) is None and (short or _native_attention.slower(qkv) is None)
    if both_ways and not (forward_only and qkv.dtype == torch.float32):
        options = _native_attention.Options(
            cu_seqlens=packing.cu_seqlens, is_causal=causal, dropout_p=dropout_p
        )
        return _native_attention.self_attention(qkv, options)
    if not forward_only:
        return _varlen_torch(qkv, packing, causal, dropout_p)
    run = torch.ops.blipfast_native.varlen_attention
    out: Tensor = run(qkv.contiguous(), packing.cu_seqlens, causal)
    return out


def _varlen_triton(qkv: Tensor, packing: Packing, causal: bool, dropout_p: float) -> Tensor:
    """A tile a text, without padding; dropout draws its seed from the device's generator."""
    from blipfast.kernels.varlen_attention import varlen_attention as kernel

    out: Tensor = kernel(
        qkv,
        packing.cu_seqlens,
        packing.max_seqlen,
        causal=causal,
        dropout_p=dropout_p,
        seed=new_seed(qkv.device) if dropout_p > 0 else None,
    )
    return out


_heads_that_fit = partial(_triton.no_wider, 128, "heads", "dimensions")

for _name, (_attend, _why_not) in _varlen_libraries.FIRST.items():
    varlen_backends.register(_name, _why_not)(_attend)
varlen_backends.register("triton", _heads_that_fit(_triton.why_not))(_varlen_triton)


@varlen_backends.register("torch")
def _varlen_torch(qkv: Tensor, packing: Packing, causal: bool, dropout_p: float) -> Tensor:
    """Pads to the longest sequence for SDPA: texts are short, and the linear layers stay packed."""
    # Under a causal mask no token sees the padding that follows it.
    lengths = None if causal or packing.uniform else packing.lengths_tensor
    padded = packing.pad(qkv)
    out = dense_self_attention(padded, key_lengths=lengths, dropout_p=dropout_p, is_causal=causal)
    return packing.unpad(out)


@varlen_backends.register("reference")
def varlen_attention_reference(
    qkv: Tensor, packing: Packing, causal: bool = False, dropout_p: float = 0.0
) -> Tensor:
    """One sequence after the other, from the formula."""
    outputs = []
    for qkv_n in qkv.split(list(packing.lengths)):
        q, k, v = qkv_n.unbind(1)  # (L, H, head_dim) each
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        if causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(ahead, -math.inf)
        probs = F.dropout(scores.softmax(-1), dropout_p)
        outputs.append(torch.einsum("hqk,khd->qhd", probs, v))
    return torch.cat(outputs)


# After "reference", which can always run: `auto` never takes them.
for _name, (_attend, _why_not) in _varlen_libraries.BY_NAME.items():
    varlen_backends.register(_name, _why_not)(_attend)
varlen_backends.register("triton_interpreter", _heads_that_fit(_triton.why_not_interpreter))(
    _varlen_triton
)


@dataclass(frozen=True)
class CrossPlan:
    """Which query rows look at which key/value set: built once, used by every layer.

    packing: the layout of the queries. kv_index: for each sequence its key/value set, on the host.
    num_kv: how many sets there are. kv_lengths: valid keys of each set, where some are padded.
    """

    packing: Packing
    kv_index: tuple[int, ...]
    num_kv: int
    kv_lengths: Tensor | None = None

    @classmethod
    def build(
        cls,
        packing: Packing,
        kv_index: Sequence[int] | Tensor,
        num_kv: int,
        kv_lengths: Tensor | None = None,
    ) -> CrossPlan:
        """Raises ShapeError on an index out of range or of the wrong length."""
        index = tuple(kv_index.tolist() if isinstance(kv_index, Tensor) else kv_index)
        if len(index) != packing.num_sequences:
            raise ShapeError(
                f"kv_index names {len(index)} sets for {packing.num_sequences} sequences"
            )
        if any(not 0 <= i < num_kv for i in index):
            raise ShapeError(f"kv_index must lie in [0, {num_kv}), got {list(index)}")
        if kv_lengths is not None and kv_lengths.shape != (num_kv,):
            raise ShapeError(f"kv_lengths must be ({num_kv},), got {tuple(kv_lengths.shape)}")
        return cls(packing, index, num_kv, kv_lengths)

    def prepare(self) -> CrossPlan:
        """As `Packing.prepare`: all index tensors now. Returns self."""
        self.packing.prepare()
        self.grouped.prepare()
        _ = self.slots
        return self

    @lazy
    def grouped(self) -> Packing:
        """The queries regrouped: one ragged row of tokens per key/value set."""
        rows = [0] * self.num_kv
        for i, length in zip(self.kv_index, self.packing.lengths, strict=True):
            rows[i] += length
        return Packing.from_lengths(rows, self.packing.device)

    @property
    def device(self) -> torch.device:
        return self.packing.device

    @lazy
    def host(self) -> CrossPlan:
        """The same plan on the CPU, where its index tensors are made."""
        if self.packing.host is self.packing:
            return self
        return CrossPlan(self.packing.host, self.kv_index, self.num_kv)

    @host_made
    def order(self) -> Tensor | None:
        """`(T,)` packed token index in grouped order; None when the texts are in it already."""
        by_set = sorted(range(len(self.kv_index)), key=self.kv_index.__getitem__)
        if by_set == list(range(len(by_set))):
            return None
        return self.packing.select(by_set)[1]

    @host_made
    def slots(self) -> Tensor | None:
        """`(T,)`: each token's row in the padded `(num_kv * max rows)` grid; None: a view."""
        if self.order is None:
            return None if self.grouped.uniform else self.grouped.slots
        slots = torch.empty_like(self.order)
        slots[self.order] = self.grouped.slots
        return slots

    def mask_for(self, num_keys: int) -> Tensor | None:
        """`(num_kv, 1, 1, num_keys)` bool, True for a valid key; None when all are valid."""
        if self.kv_lengths is None:
            return None
        columns = torch.arange(num_keys, device=self.kv_lengths.device)
        return (columns[None, :] < self.kv_lengths[:, None])[:, None, None, :]


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: CrossPlan,
    *,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """`softmax(q_n k_{i(n)}^T / sqrt(head_dim)) v_{i(n)}` for each sequence n, with i = kv_index.

    q: `(T, H, head_dim)`, packed. k, v: `(B, H, S, head_dim)`. Returns `(T, H, head_dim)`.
    dK and dV sum over all sequences that look at a set, without atomics.
    Raises ShapeError when heads, dims, sets or tokens disagree.
    """
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape:
        raise ShapeError(
            "q must be (T, H, head_dim), k and v (B, H, S, head_dim), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (k.shape[1], k.shape[3]) != (q.shape[1], q.shape[2]):
        raise ShapeError(
            f"q has {q.shape[1]} heads of {q.shape[2]}, but k {k.shape[1]} of {k.shape[3]}"
        )
    if q.shape[0] != plan.packing.total or k.shape[0] != plan.num_kv:
        raise ShapeError(
            f"the plan is for {plan.packing.total} tokens and {plan.num_kv} key/value sets, "
            f"got {q.shape[0]} and {k.shape[0]}"
        )
    for name, x in (("k", k), ("v", v)):
        if q.device != x.device or q.dtype != x.dtype:
            raise ShapeError(f"q is {q.dtype} on {q.device}, but {name} {x.dtype} on {x.device}")
    if q.shape[0] == 0:
        return q.clone()
    return cross_backends(q, impl)(q, k, v, plan, dropout_p)


def _cross_on_card(q: Tensor, k: Tensor, v: Tensor, plan: CrossPlan, dropout_p: float) -> Tensor:
    """The kernel, but for a single set: without an index PyTorch's own attention is as good and
    better, since its tiles are larger (256 texts over 577 keys on an H100: 136 us against 172)."""
    if plan.num_kv == 1:
        return _cross_torch(q, k, v, plan, dropout_p)
    return _cross_triton(q, k, v, plan, dropout_p)


def _cross_triton(q: Tensor, k: Tensor, v: Tensor, plan: CrossPlan, dropout_p: float) -> Tensor:
    """Rows that share a set share a tile; dropout draws its seed from the device's generator."""
    from blipfast.kernels.cross_attention import cross_attention as kernel

    seed = new_seed(q.device) if dropout_p > 0 else None
    rows = plan.grouped
    out: Tensor = kernel(
        *(q, k, v, rows.cu_seqlens, rows.max_seqlen),
        order=plan.order,
        kv_lengths=plan.kv_lengths,
        dropout_p=dropout_p,
        seed=seed,
    )
    return out


cross_backends.register("triton", _heads_that_fit(_triton.why_not))(_cross_on_card)


@cross_backends.register("native", _packed_why_not, _native_attention.slower)
def _cross_native(q: Tensor, k: Tensor, v: Tensor, plan: CrossPlan, dropout_p: float) -> Tensor:
    """A head of a set at a time, with the rows that look at it read and written where they lie."""
    if plan.num_kv * q.shape[1] < torch.get_num_threads():  # there is not a head for each thread
        return _cross_torch(q, k, v, plan, dropout_p)
    options = _native_attention.Options(
        plan.kv_lengths, plan.grouped.cu_seqlens, plan.order, dropout_p=dropout_p
    )
    return _native_attention.attention(q, k, v, options)


# Padding each set's rows to the longest wastes work when a few sets are far more looked at.
_MAX_PADDING = 3.0


@cross_backends.register("torch")
def _cross_torch(q: Tensor, k: Tensor, v: Tensor, plan: CrossPlan, dropout_p: float) -> Tensor:
    grouped = plan.grouped
    padded_rows = plan.num_kv * grouped.max_seqlen
    if padded_rows > _MAX_PADDING * q.shape[0]:
        return _cross_by_set(q, k, v, plan, dropout_p)
    grid = q if plan.slots is None else scatter_rows(q, plan.slots, padded_rows)
    grid = grid.reshape(plan.num_kv, grouped.max_seqlen, *q.shape[1:]).transpose(1, 2)
    out = dense_attention(grid, k, v, key_lengths=plan.kv_lengths, dropout_p=dropout_p)
    rows = out.transpose(1, 2).flatten(0, 1)
    return rows if plan.slots is None else gather_rows(rows, plan.slots)


def _cross_by_set(q: Tensor, k: Tensor, v: Tensor, plan: CrossPlan, dropout_p: float) -> Tensor:
    ordered = q if plan.order is None else gather_rows(q, plan.order)
    lengths = plan.kv_lengths
    outputs = []
    for i, rows in enumerate(ordered.split(list(plan.grouped.lengths))):
        if rows.shape[0]:
            out = dense_attention(
                rows.transpose(0, 1)[None],
                k[i : i + 1],
                v[i : i + 1],
                key_lengths=None if lengths is None else lengths[i : i + 1],
                dropout_p=dropout_p,
            )
            outputs.append(out[0].transpose(0, 1))
    out = torch.cat(outputs)
    return out if plan.order is None else scatter_rows(out, plan.order, q.shape[0])


@cross_backends.register("reference")
def cross_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, plan: CrossPlan, dropout_p: float = 0.0
) -> Tensor:
    """One sequence after the other, from the formula."""
    outputs = []
    mask = plan.mask_for(k.shape[2])
    for q_n, i in zip(q.split(list(plan.packing.lengths)), plan.kv_index, strict=True):
        scores = torch.einsum("qhd,hkd->hqk", q_n, k[i]) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[i], -math.inf)
        probs = F.dropout(scores.softmax(-1), dropout_p)
        outputs.append(torch.einsum("hqk,hkd->qhd", probs, v[i]))
    return torch.cat(outputs)


# The same kernel on a CPU, for tests; last, so that `auto` never takes it.
cross_backends.register("triton_interpreter", _heads_that_fit(_triton.why_not_interpreter))(
    _cross_triton
)
