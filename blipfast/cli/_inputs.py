"""What several subcommands share: models, their options, and how reading pictures is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from blipfast.errors import ConfigError, DataError
from blipfast.serve.folder import ImageBatches


def say_failed(error: DataError) -> None:
    """Names on stderr what is left out."""
    print(f"blipfast: left out: {error}", file=sys.stderr)


@contextmanager
def reading(total: int) -> Iterator[Callable[[], None]]:
    """A bar of files read, on stderr and on a terminal only; yields what is called for each."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("read"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("read", total=total)
        yield lambda: bar.advance(task)


@contextmanager
def image_batches(paths: Sequence[Path], model: Any, batch_size: int) -> Iterator[ImageBatches]:
    """The pictures as the model takes them, under a bar; what cannot be read is named."""
    side = model.config.vision.image_size
    with reading(len(paths)) as on_read:
        yield ImageBatches(paths, side, batch_size, say_failed, on_read)


def load_for(
    task: str, checkpoint: str, vocabulary: str | None, device: str, image_size: int | None
) -> tuple[Any, Any, torch.device]:
    """Model, tokenizer and device. Raises ConfigError, CheckpointError or DataError in words."""
    from blipfast.checkpoints import load_model
    from blipfast.data import load_tokenizer
    from blipfast.train.recipes import pick_device

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
