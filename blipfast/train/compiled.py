"""torch.compile for the parts of a model that look the same in every step."""

from __future__ import annotations

from typing import Any

from torch import nn

from blipfast.models.text import FeedForward, Residual
from blipfast.models.vit import Block


def compile_regions(model: nn.Module, **options: Any) -> None:
    """Compiles a model's blocks in place; a model that has none of BLIP's, as a whole.

    What lies between the blocks depends on each batch's texts (how they are packed, who looks at
    which image, what comes from other ranks) and would be compiled anew for each. Blocks that
    differ in their weights alone share one graph, so that depth costs no time. options: of
    `torch.compile`, as `backend`.
    """
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    of_texts = [m for m in model.modules() if isinstance(m, FeedForward | Residual)]
    for block in blocks:
        block.compile(**options)
    for module in of_texts:  # over all tokens of a batch, whose number is never the same
        module.compile(dynamic=True, **options)
    if not blocks and not of_texts:
        model.compile(**options)
