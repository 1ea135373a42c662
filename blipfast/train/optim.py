"""The optimiser: AdamW over groups of parameters with learning rates of their own."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from blipfast.train.config import FitConfig

_BLOCK = re.compile(r"(visual_encoder\.blocks|text_(?:en|de)coder\.layers)\.(\d+)\.")
_BOTTOM = re.compile(
    r"visual_encoder\.(cls_token|pos_embed|patch_embed)|text_(?:en|de)coder\.embeddings\."
)


def make_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.AdamW:
    """Fused AdamW; a group's learning rate is the schedule's times its `scale`.

    PyTorch's: it moves the 28 bytes a parameter that the formula must, which apex's cannot better.
    """
    groups = parameter_groups(model, config.layer_decay)
    kinds = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=kinds <= {"cpu", "cuda"} or None,
    )


def parameter_groups(model: nn.Module, layer_decay: float | None) -> list[dict]:
    """Groups of trained parameters with the `scale` of their learning rate.

    With a decay d, heads have scale 1, the last layer of image encoder and text transformer d, the
    one below d^2, and embeddings come after the first layer (BEiT's layer-wise decay).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = 1.0 if layer_decay is None else layer_decay
    depth: dict[str, int] = {}
    for name, _ in named:
        if found := _BLOCK.match(name):
            depth[found[1]] = max(depth.get(found[1], 0), int(found[2]) + 1)
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in named:
        below = 0  # how many layers lie above it
        if found := _BLOCK.match(name):
            below = depth[found[1]] - int(found[2])
        elif found := _BOTTOM.match(name):
            stem = name.split(".")[0]
            below = 1 + max(n for part, n in depth.items() if part.startswith(stem))
        shared_out = isinstance(parameter, DTensor)  # no kernel takes both kinds at once
        groups.setdefault((decay**below, shared_out), []).append(parameter)
    return [{"params": parameters, "scale": scale} for (scale, _), parameters in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def named_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The optimiser's tensors by parameter: `<name>.exp_avg` and the like.

    names: of the parameters, by `id`.
    """
    return {
        f"{names[id(parameter)]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def create_state(optimizer: torch.optim.AdamW) -> None:
    """AdamW's state as before the first step, so that a checkpoint can be read into it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }
