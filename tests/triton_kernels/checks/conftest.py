"""For checks that run on a card, or without one in Triton's interpreter, each file by a process.

`make test-gpu` runs all on a card. Without one `../test_interpreted.py` starts them; by hand:
`TRITON_INTERPRET=1 pytest check_cross_attention.py`. Tensors are made where the kernels run. Fresh
memory is NaN throughout, so that what a kernel forgets to write is seen.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from place import DEVICE, INTERPRETED

if INTERPRETED:
    import addresses
    import interpreter

    interpreter.correct()
    addresses.watch()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _tensors_where_the_kernels_run() -> Iterator[None]:
    with DEVICE:
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=DEVICE).isnan().all()
    with np.errstate(divide="ignore", invalid="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_no_worse() -> Callable[..., None]:
    """Our error is at most twice that of plain PyTorch in the same dtype, plus rounding.

    terms: of a sum that a library forms in an order of its own; its rounding grows with their root.
    """

    def check(ours: Tensor, plain: Tensor, exact: Tensor, name: str, terms: int = 1) -> None:
        assert ours.shape == exact.shape, name
        assert ours.dtype == plain.dtype, name
        if not exact.numel():
            return
        eps = torch.finfo(ours.dtype).eps
        # Products of inputs of size 1 are rounded even where they cancel and the result is 0.
        size = exact.abs().max().clamp(min=4 if eps < 1e-6 else 1)
        # On a card a float32 product is three of TF32, whose 21 bits leave a quarter of eps more.
        places = 2 if INTERPRETED or eps > 1e-6 else 4
        rounding = places * max(1.0, math.sqrt(terms) / 8) * eps * size
        bound = 2 * (plain.double() - exact).abs().max() + rounding
        error = (ours.double() - exact).abs().max()
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"

    return check
