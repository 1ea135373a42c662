"""What dropout keeps, by the formula in the kernels' docstring."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from blipfast.ops.hard_negatives import philox


def kept(rows: int, keys: int, heads: int, number: int, p: float, seed: int) -> Tensor:
    """``(heads, rows, keys)`` bool of the weights of set `number`."""
    row, key = torch.arange(rows)[:, None], torch.arange(keys)[None]
    which = (2 * ((row & 8) > 0) + ((key & 8) > 0)).expand(1, rows, keys)
    masks = []
    for head in range(heads):
        words = torch.stack(philox(key & ~8, row & ~8, head, number, seed=seed, rounds=7))
        masks.append(words.gather(0, which)[0] >= int(float(np.float32(p)) * 2**32))
    return torch.stack(masks)
