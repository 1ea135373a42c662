"""A step of contrastive training, recorded once as a CUDA graph and replayed.

A bf16 step of ViT-B launches some 4,000 kernels, for which a host needs longer than the card takes
to compute them; a graph is a single launch. Recorded are the forward and the backward pass, from a
batch on the card to losses and gradients, with the collectives of ITC between. That the ranks'
gradients are averaged, the check that they are finite, clipping and the optimiser come after it.

A graph has fixed shapes, so texts get room: as many tokens as a multiple of 128, none longer than a
multiple of 8. There is a graph for each room that batches need, which are few; its first batch is
a plain step, in which kernels are compiled, and the second is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from blipfast.errors import ShapeError, TrainingError
from blipfast.models.blip import PackedText
from blipfast.ops.packing import Packing, from_host
from blipfast.train.engine import Batch, FinishedLosses

_TOKENS, _LENGTH = 128, 8  # what room is rounded up to
_MOST_GRAPHS = 8  # rarer rooms go without: each graph holds gradients of its own

Key = tuple[Any, ...]


class Graph(Protocol):
    """What runs a function without arguments or results again and again."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Runs it plainly, before it is recorded."""

    def record(self, run: Callable[[], None]) -> None:
        """Notes what it does, without doing it."""

    def replay(self) -> None:
        """Does it, into the same memory."""


class CudaGraph:
    """`torch.cuda.CUDAGraph`. One runs at a time, so all share the memory of what lies between."""

    _pool: Any = None

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def warm_up(self, run: Callable[[], None]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, run: Callable[[], None]) -> None:
        if CudaGraph._pool is None:
            CudaGraph._pool = torch.cuda.graph_pool_handle()
        torch.clear_autocast_cache()  # of copies made outside, which no replay would renew
        # Other threads decode and pin memory meanwhile, which is no part of the graph.
        options = {"pool": CudaGraph._pool, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(self.graph, **options):
                run()
        except RuntimeError as error:
            raise TrainingError(
                f"the step cannot be recorded as a CUDA graph; set fit.cuda_graph=false: {error}"
            ) from error

    def replay(self) -> None:
        self.graph.replay()


@dataclass
class _Pass:
    """Forward and backward pass over inputs that stay where they are.

    losses, gradients: where the last run, or the recording, has put them.
    """

    graph: Graph
    model: Any
    inputs: dict[str, Tensor]
    room: int
    seed: int
    losses: dict[str, Tensor] = field(default_factory=dict)
    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    recorded: bool = False

    def run(self) -> None:
        inputs = self.inputs
        text = PackedText.with_room(inputs["input_ids"], inputs["lengths"], self.room)
        options = {name: inputs[name] for name in ("image_ids", "alpha", "step")}
        output = self.model(inputs["pixel_values"], text, seed=self.seed, **options)
        with torch.autocast(output.loss.device.type, enabled=False):
            output.loss.backward()
        self.losses = {name: loss.detach() for name, loss in output.losses().items()}
        parameters = self.model.parameters()
        self.gradients = [(p, p.grad) for p in parameters if p.grad is not None]

    def replay(self) -> None:
        if not self.recorded:
            self.graph.record(self.run)
            self.recorded = True
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient


class CapturedStep:
    """The step function of pre-training or retrieval for `fit`; it runs the backward pass itself.

    alpha_at: weight of the soft targets at a step. seed: of the drawn negatives.
    graph: makes what records and replays.
    """

    def __init__(
        self, alpha_at: Callable[[int], float], seed: int, graph: Callable[[], Graph] = CudaGraph
    ) -> None:
        self.alpha_at, self.seed, self.make_graph = alpha_at, seed, graph
        self._buffers: dict[Key, Tensor] = {}
        self._passes: dict[Key, _Pass] = {}

    def __call__(self, model: Any, batch: Batch, step: int, epoch: float) -> FinishedLosses:
        inputs, room = self._loaded(model, batch, step)
        kind = inputs["pixel_values"].device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (room, low, *((name, x.shape, x.dtype) for name, x in inputs.items()))
        known = self._passes.get(key)
        if known is not None:
            known.replay()
            return FinishedLosses(known.losses)
        first = _Pass(self.make_graph(), model, inputs, room, self.seed)
        first.graph.warm_up(first.run)
        first.gradients = []  # the parameters have them: nothing replays into these
        if len(self._passes) < _MOST_GRAPHS:
            self._passes[key] = first
        return FinishedLosses(first.losses)

    def _loaded(self, model: Any, batch: Batch, step: int) -> tuple[dict[str, Tensor], int]:
        """The batch where a graph of its sizes looks for it, and the room that its texts get."""
        packing = Packing.from_mask(batch["attention_mask"].cpu())
        if packing.any_empty:
            raise ShapeError(f"text {packing.lengths.index(0)} of the batch has no tokens at all")
        longest = _rounded_up(packing.max_seqlen, _LENGTH)
        longest = max(min(longest, model.text_config.max_positions), packing.max_seqlen)
        room = min(_rounded_up(packing.total, _TOKENS), packing.num_sequences * longest)
        device = batch["pixel_values"].device
        count = packing.num_sequences
        ids = self._buffer("input_ids", (count, longest), torch.int64, device)
        shown = batch["input_ids"][:, :longest]
        ids[:, : shown.shape[1]].copy_(shown)
        lengths = self._buffer("lengths", (count,), torch.int64, device)
        lengths.copy_(from_host(packing.lengths_tensor, device))
        inputs = {"input_ids": ids, "lengths": lengths}
        for name in ("pixel_values", "image_ids"):
            value = batch[name]
            inputs[name] = self._buffer(name, value.shape, value.dtype, device)
            inputs[name].copy_(value, non_blocking=True)
        for name, number, dtype in (
            ("alpha", self.alpha_at(step), torch.float32),
            ("step", step, torch.int64),
        ):
            inputs[name] = self._buffer(name, (), dtype, device).fill_(number)
        return inputs, room

    def _buffer(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        key = (name, tuple(shape), dtype, device)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=dtype, device=device)
        return self._buffers[key]


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
