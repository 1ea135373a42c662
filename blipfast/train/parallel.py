"""How a model is laid out over the ranks: whole on each (DDP), or each its share (FSDP2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from blipfast.errors import ConfigError
from blipfast.models.vit import Block
from blipfast.tasks.contrastive import ContrastiveBlip
from blipfast.tasks.in_parts import METHODS
from blipfast.train.compiled import compile_regions
from blipfast.train.config import FitConfig
from blipfast.train.ranks import world_size

_BUCKET_BYTES = 64 << 20


@dataclass
class Layout:
    """A model ready to be trained on all ranks.

    model: holds the parameters, as the optimiser and checkpoints see them. forward: what a step
    calls. before_step: to be called before each step. own_gradients: parameters whose gradients
    `finish` must still average over the ranks.
    """

    model: nn.Module
    forward: Any
    before_step: Callable[[], None]
    own_gradients: Sequence[nn.Parameter]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def finish(self) -> None:
        """Averages the gradients that no wrapper has averaged; after each backward pass."""
        if world_size() > 1:
            average([p.grad for p in self.own_gradients if p.grad is not None])

    def gradient_norm(self) -> Tensor:
        """Norm over all gradients of all ranks, a scalar."""
        whole = [p.grad for p in self.parameters if p.grad is not None]
        shares = [g for g in whole if isinstance(g, DTensor)]
        if not shares:
            return nn.utils.get_total_norm(whole)
        norms = [nn.utils.get_total_norm(shares).full_tensor()]  # type: ignore[attr-defined]
        norms += [g.norm() for g in whole if not isinstance(g, DTensor)]
        return torch.stack([norm.float() for norm in norms]).norm()

    def clip(self, largest: float, norm: Tensor) -> None:
        """Scales all gradients, of norm `norm`, down to the norm `largest`."""
        for kind in (True, False):
            chosen = [p for p in self.parameters if isinstance(p, DTensor) is kind]
            if any(p.grad is not None for p in chosen):
                nn.utils.clip_grads_with_norm_(chosen, largest, norm)


def lay_out(model: nn.Module, config: FitConfig) -> Layout:
    """`model`, which lies on its device already, laid out as configured.

    Raises ConfigError for settings that exclude each other.
    """
    if config.precision == "pure_bf16" and config.parallel != "fsdp":
        raise ConfigError(
            "fit.precision pure_bf16 keeps its fp32 masters in FSDP's shares: set fit.parallel=fsdp"
            " (it works on one process too), or use bf16"
        )
    if config.cuda_graph:
        _check_graph(model, config)
    if config.compile:
        compile_regions(model)
    if config.parallel == "fsdp":
        return _shared_out(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if world_size() == 1:
        return Layout(model, model, _nothing, [])
    if config.micro_batch is not None or config.cuda_graph:
        _same_start(model)  # their backward passes go past DDP
        return Layout(model, model, _nothing, parameters)
    device = parameters[0].device
    ddp: Any = nn.parallel.DistributedDataParallel
    # Queues are equal on all ranks, since all features enter them. torch 2.13 renamed the switch.
    known = inspect.signature(ddp.__init__).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    wrapped = ddp(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{switch: False},
    )
    return Layout(model, wrapped, _nothing, [])


def _check_graph(model: nn.Module, config: FitConfig) -> None:
    others = {"parallel=fsdp": config.parallel == "fsdp", "micro_batch": config.micro_batch}
    others["grad_checkpointing"] = config.grad_checkpointing  # reads the generators' state
    excluded = [name for name, is_set in others.items() if is_set]
    if excluded:
        raise ConfigError(f"fit.cuda_graph does not go with fit.{excluded[0]}")
    if world_size() > 1 and isinstance(model, ContrastiveBlip) and model.draws_from_all_ranks:
        raise ConfigError(
            "fit.cuda_graph on several ranks needs negatives of the own rank, since the host waits "
            "for others': set objective.across_ranks=false for pretrain, "
            "objective.negatives_from_all_ranks=false for retrieval"
        )
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ConfigError(f"fit.cuda_graph is for GPUs, this run is on a {device.type}")


def _shared_out(model: nn.Module, config: FitConfig) -> Layout:
    """FSDP2: one group for each block of a ViT, student and twin, and one for all the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    _same_start(model)
    first = next(model.parameters())
    mesh = init_device_mesh(first.device.type, (world_size(),))
    low = torch.bfloat16 if config.precision == "pure_bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    # The temperature is a scalar, which cannot be shared out, and is clamped in place.
    scalars = {p for p in model.parameters() if p.dim() == 0}
    for module in [m for m in model.modules() if isinstance(m, Block)]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # Text layers work together across streams, so their parameters stay gathered for the step.
    fully_shard(
        model, mesh=mesh, mp_policy=policy, ignored_params=scalars, reshard_after_forward=False
    )
    if config.micro_batch is not None and isinstance(model, ContrastiveBlip):
        for name in METHODS:
            register_fsdp_forward_method(model, name)
    before: Callable[[], None] = _nothing
    if getattr(model, "twin", None) is not None:
        # In the forward pass its parameters are whole copies, and a change to them is lost.
        model.moves_twin = False  # type: ignore[assignment]
        before = model.move_twin  # type: ignore[assignment]
    return Layout(model, model, before, [p for p in scalars if p.requires_grad])


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The whole weights of a model whose parameters are shared out, on the CPU; every rank must
    call it. None where the model has its weights whole."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()
        for name, t in model.state_dict().items()
    }


def average(gradients: Sequence[Tensor]) -> None:
    """Means over the ranks, in place, in buckets."""
    bucket: list[Tensor] = []
    size = 0
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
        last = i == len(gradients) - 1
        if last or size >= _BUCKET_BYTES or gradients[i + 1].dtype != gradient.dtype:
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            flat /= world_size()
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(mean.view_as(g))
            bucket, size = [], 0


@torch.no_grad()
def _same_start(model: nn.Module) -> None:
    """Every rank starts from rank 0's parameters and buffers, as DDP sees to."""
    if world_size() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, 0)


def _nothing() -> None:
    pass
