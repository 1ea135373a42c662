"""What several subcommands read: images, vocabularies, models."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipfast.data import EvalTransform
from blipfast.data.records import IMAGE_EXTENSIONS
from blipfast.errors import ConfigError, DataError


def find_images(paths: Iterable[str]) -> list[Path]:
    """The files given, and the image files in the folders given and below them, in order.

    Raises DataError for a path that is not there and for a folder without images.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(
                p
                for p in path.rglob("*")
                if p.is_file() and p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
            )
            if not inside:
                kinds = ", ".join(IMAGE_EXTENSIONS)
                raise DataError(f"{path}: no images in this folder (looked for {kinds})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: there is no such file or folder")
    return found


class ImageBatches:
    """Batches of `(paths, pixel_values)` from files; those that cannot be read are left out.

    failed: how many were, each having been named on stderr.
    """

    def __init__(self, paths: Sequence[Path], image_size: int, batch_size: int) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        self.paths, self.batch_size = paths, batch_size
        self.transform = EvalTransform(image_size)
        self.failed = 0

    def __iter__(self) -> Iterator[tuple[list[Path], Tensor]]:
        names: list[Path] = []
        pixels: list[Tensor] = []
        for path in self.paths:
            try:
                pixels.append(self.transform(path))
            except DataError as error:
                self.failed += 1
                print(f"blipfast: left out: {error}", file=sys.stderr)
                continue
            names.append(path)
            if len(names) == self.batch_size:
                yield names, torch.stack(pixels)
                names, pixels = [], []
        if names:
            yield names, torch.stack(pixels)


def load_for(
    task: str, checkpoint: str, vocabulary: str | None, device: str, image_size: int | None
) -> tuple[Any, Any, torch.device]:
    """Model, tokenizer and device. Raises ConfigError, CheckpointError or DataError in words."""
    from blipfast.checkpoints import load_model
    from blipfast.train.recipes import load_tokenizer, pick_device

    where = pick_device(device)
    model = load_model(checkpoint, task, image_size=image_size, device=where)
    tokenizer = load_tokenizer(vocabulary, checkpoint)
    if tokenizer.vocab_size != model.text_config.vocab_size:
        raise ConfigError(
            f"the vocabulary has {tokenizer.vocab_size} pieces, the checkpoint {checkpoint} "
            f"{model.text_config.vocab_size}: give its own by --vocabulary"
        )
    return model, tokenizer, where


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 under autocast, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def add_model_options(parser: Any) -> None:
    """--checkpoint, --vocabulary, --image_size, --device and --precision."""
    from typing import Literal

    parser.add_argument(
        "--checkpoint", type=str, required=True,
        help="an original .pth, a Hugging Face directory, or one that blipfast wrote",
    )  # fmt: skip
    parser.add_argument(
        "--vocabulary", type=str | None, default=None,
        help="vocab.txt of the text encoder; by default the one beside the checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--image_size", type=int | None, default=None,
        help="side of the images in pixels; by default the checkpoint's",
    )  # fmt: skip
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda or auto")
    parser.add_argument(
        "--precision", type=Literal["fp32", "bf16"], default="fp32",
        help="bf16 computes under autocast",
    )  # fmt: skip
