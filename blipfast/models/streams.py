"""Texts of several kinds on their way through the layers of MED, in one pass.

`run_streams` carries texts that are encoded and texts that are decoded together; they meet in every
module they share and part only where they do not, so that an image's K/V are projected and read
once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blipfast.errors import ConfigError, ShapeError
from blipfast.ops.attention import CrossPlan
from blipfast.ops.device_packing import plan_of
from blipfast.ops.packing import Index, Packing, SharedPrefixes, gather_rows

KeyValue = tuple[Tensor, Tensor]  # (B, H, S, head_dim) each


@dataclass(frozen=True)
class CrossStates:
    """`B` images (or questions) that texts look at.

    embeds: one `(B, S, cross_width)` tensor, or two for NLVR2's pairs.
    lengths: `(B,)` valid tokens of each, where some are padded.
    layers: each layer's projected K/V, if projected ahead (`TextTransformer.cross_states`).
    """

    embeds: tuple[Tensor, ...]
    lengths: Tensor | None = None
    layers: tuple[tuple[KeyValue, ...], ...] | None = None

    @property
    def size(self) -> int:
        return self.embeds[0].shape[0]

    def key_values(self, layer: int) -> Sequence[KeyValue | None]:
        """Of each of `embeds`, if projected ahead."""
        return [None] * len(self.embeds) if self.layers is None else self.layers[layer]


@dataclass(frozen=True)
class TextStream:
    """Texts of one kind on their way through a transformer's `layers` (`TextLayer`).

    hidden: `(T, D)`, embedded. causal: decoded rather than encoded.
    kv_index: for each text the image it looks at, a tensor where only the device knows; None for a
        text on its own.
    first_only: only each text's first token is wanted ([CLS], [ENC]); the last layer stops there.
    prefixes: `hidden` holds nodes that several texts share, packed by what they look at.
    recompute: no layer keeps its activations; the backward pass computes them again.
    """

    layers: nn.ModuleList
    hidden: Tensor
    packing: Packing
    causal: bool = False
    kv_index: Index | None = None
    first_only: bool = False
    prefixes: SharedPrefixes | None = None
    recompute: bool = False


def run_streams(streams: Sequence[TextStream], states: CrossStates | None = None) -> list[Tensor]:
    """Carries all streams through the layers in one pass; returns `(T, D)`, or `(N, D)`, of each.

    Streams that share a module run through it together, so that an image's K/V are projected and
    read once for all of them. states: what the streams look at; None skips cross-attention.
    Raises ConfigError when the depths differ, or states are wrongly given or missing.
    """
    _check_streams(streams, states)
    num_layers = len(streams[0].layers)
    hidden = torch.cat([s.hidden for s in streams]) if len(streams) > 1 else streams[0].hidden
    plans: dict[tuple[int, int], CrossPlan] = {}
    after = streams
    for i in range(num_layers):
        if i == num_layers - 1 and any(s.first_only for s in streams):
            after, plans = [_shortened(s) for s in streams], {}
        layer = partial(_layer, i, streams=streams, after=after, states=states, plans=plans)
        if any(s.recompute for s in streams):
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        else:
            hidden = layer(hidden)
    return list(_split(hidden, after))


def _layer(
    i: int,
    hidden: Tensor,
    *,
    streams: Sequence[TextStream],
    after: Sequence[TextStream],
    states: CrossStates | None,
    plans: dict[tuple[int, int], CrossPlan],
) -> Tensor:
    """Layer i of all streams; `after` are those that leave its self-attention, maybe shortened."""
    layers = [s.layers[i] for s in streams]
    parts = [
        layer.self_attention(part, s.packing, s.causal, s.prefixes)  # type: ignore[operator]
        for layer, part, s in zip(layers, _split(hidden, streams), streams, strict=True)
    ]
    if after is not streams:
        parts = [_first_tokens(part, s) for part, s in zip(parts, streams, strict=True)]
    hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
    if states is not None:
        modules = [cross_module(layer) for layer in layers]
        hidden = _cross(i, modules, hidden, after, states, plans)
    feed_forward: list[nn.Module] = [layer.feed_forward for layer in layers]  # type: ignore[misc]
    return _shared(feed_forward, hidden, after, lambda module, x, *_: module(x))


def _cross(
    i: int,
    modules: list[nn.Module],
    hidden: Tensor,
    streams: Sequence[TextStream],
    states: CrossStates,
    plans: dict[tuple[int, int], CrossPlan],
) -> Tensor:
    def attend(module: nn.Module, x: Tensor, start: int, stop: int) -> Tensor:
        if (start, stop) not in plans:
            packings = [s.packing for s in streams[start:stop]]
            looks = [s.kv_index for s in streams[start:stop] if s.kv_index is not None]
            plans[start, stop] = plan_of(packings, looks, states.size, states.lengths)
        return module(x, states.embeds, plans[start, stop], states.key_values(i))

    return _shared(modules, hidden, streams, attend)


def _shared(
    modules: list[nn.Module],
    hidden: Tensor,
    streams: Sequence[TextStream],
    apply: Callable[[nn.Module, Tensor, int, int], Tensor],
) -> Tensor:
    """Applies each stream's module to it, once for neighbours that have it in common."""
    runs = [list(group) for _, group in groupby(range(len(modules)), lambda j: id(modules[j]))]
    if len(runs) == 1:
        return apply(modules[0], hidden, 0, len(modules))
    sizes = [sum(streams[j].packing.total for j in run) for run in runs]
    parts = zip(runs, hidden.split(sizes), strict=True)
    return torch.cat([apply(modules[run[0]], x, run[0], run[-1] + 1) for run, x in parts])


def _split(hidden: Tensor, streams: Sequence[TextStream]) -> Sequence[Tensor]:
    return hidden.split([s.packing.total for s in streams]) if len(streams) > 1 else [hidden]


def _first_tokens(part: Tensor, stream: TextStream) -> Tensor:
    return gather_rows(part, stream.packing.first_tokens) if stream.first_only else part


def _shortened(stream: TextStream) -> TextStream:
    if not stream.first_only:
        return stream
    return replace(stream, packing=stream.packing.first_only())


def cross_module(layer: nn.Module) -> nn.Module:
    """A layer's cross-attention."""
    return layer.cross_attention  # type: ignore[return-value]


def _check_streams(streams: Sequence[TextStream], states: CrossStates | None) -> None:
    if len({len(s.layers) for s in streams}) != 1:
        raise ConfigError("streams of one pass must have the same number of layers")
    if any((s.kv_index is None) != (states is None) for s in streams):
        raise ConfigError("streams that look at images need both kv_index and states")
    if any(s.first_only and s.packing.any_empty for s in streams):
        raise ShapeError("a text has no tokens, so no first token either")
    if states is not None and any(cross_module(s.layers[0]) is None for s in streams):
        raise ConfigError("this text transformer was built without cross-attention")
