"""Pictures and texts in memory, and batches of them with light augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.data import IMAGE_MEAN, IMAGE_STD, BlipTokenizer, Record, load_image
from blipfast.demo.scenes import DemoRecord
from blipfast.errors import DataError
from blipfast.objectives.distributed import rank_offset, world_size

_SHIFT = 4  # pixels; crops and flips as in the paper would falsify "left" and counts


@dataclass(frozen=True)
class Samples:
    """Image-text pairs: `pixels (I, 3, H, W)` uint8, and for each pair an image and a text."""

    pixels: Tensor
    images: tuple[int, ...]
    texts: tuple[str, ...]
    keys: tuple[str, ...]

    @classmethod
    def from_demo(cls, records: Sequence[DemoRecord]) -> Samples:
        pixels = decode([r.image for r in records], [r.key for r in records])
        keys = tuple(r.key for r in records)
        return cls(pixels, tuple(range(len(records))), tuple(r.caption for r in records), keys)

    @classmethod
    def from_records(cls, records: Sequence[Record]) -> Samples:
        """One sample for each text of each record."""
        pixels = decode([r.image for r in records], [r.key for r in records])
        pairs = [(i, t.text) for i, r in enumerate(records) for t in r.texts]
        images = tuple(i for i, _ in pairs)
        return cls(
            pixels, images, tuple(t for _, t in pairs), tuple(records[i].key for i in images)
        )

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, other: Samples) -> Samples:
        first = len(self.pixels)
        return Samples(
            torch.cat([self.pixels, other.pixels]),
            self.images + tuple(i + first for i in other.images),
            self.texts + other.texts,
            self.keys + other.keys,
        )


def decode(images: Sequence[bytes], keys: Sequence[str]) -> Tensor:
    """Encoded pictures of one size to `(N, 3, H, W)` uint8; an error names the key."""
    arrays = [np.array(load_image(data, key)) for data, key in zip(images, keys, strict=True)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def normalise(pixels: Tensor) -> Tensor:
    """`(B, 3, H, W)` in 0 to 255 to what the model takes."""
    mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1) * 255
    std = torch.tensor(IMAGE_STD).view(3, 1, 1) * 255
    return (pixels.float() - mean) / std


class SceneBatches:
    """Shuffled batches for `fit`; each iteration is one epoch of whole batches.

    prompt: put before each text. The draws depend on the seed and the epoch alone; of several
    ranks each has its part of the same batches. Raises DataError when they cannot be parted evenly.
    """

    def __init__(
        self,
        samples: Samples,
        tokenizer: BlipTokenizer,
        batch_size: int,
        seed: int,
        prompt: str = "",
    ) -> None:
        self.samples = samples
        self.batch_size = min(batch_size, len(samples))
        self.seed = seed
        self.epoch = 0
        self.text = tokenizer([prompt + text for text in samples.texts])
        self.images = torch.tensor(samples.images)
        if self.batch_size % world_size():
            raise DataError(f"{self.batch_size} pairs a step do not part into {world_size()} ranks")

    def __iter__(self) -> Iterator[dict]:
        generator = torch.Generator().manual_seed(self.seed * 1_000 + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.samples), generator=generator)
        for rows in order.split(self.batch_size):
            if len(rows) == self.batch_size:
                yield self._batch(rows, generator)

    def _batch(self, rows: Tensor, generator: torch.Generator) -> dict:
        share = len(rows) // world_size()
        own = slice(rank_offset(share), rank_offset(share) + share)
        pixels = jitter(self.samples.pixels[self.images[rows]], generator)[own]
        rows = rows[own]
        images, mask = self.images[rows], self.text.attention_mask[rows]
        length = int(mask.sum(1).max())
        return {
            "pixel_values": normalise(pixels),
            "input_ids": self.text.input_ids[rows, :length],
            "attention_mask": mask[:, :length],
            "image_ids": images,
            "keys": [self.samples.keys[i] for i in rows.tolist()],
        }


def jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts each picture by a few pixels and varies its colours a little."""
    size = pixels.shape[-1]
    padded = F.pad(pixels.float(), (_SHIFT,) * 4, mode="replicate")
    shifts = torch.randint(0, 2 * _SHIFT + 1, (len(pixels), 2), generator=generator).tolist()
    moved = torch.stack(
        [image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, shifts, strict=True)]
    )
    return moved * (1 + 0.05 * torch.randn(len(pixels), 3, 1, 1, generator=generator))
