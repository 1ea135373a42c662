"""Checkpoints of a run: written in the background by all ranks, whole or not at all.

One folder each, `step-00000120/`: safetensors files by `torch.distributed.checkpoint`, which any
number of ranks can read, and `state.json` with all that is no tensor. Nothing is pickled. A folder
gets its name when every rank has written its part; until then it is a dot-folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from blipfast.errors import CheckpointError, TrainingError
from blipfast.train.files import describe_write_error, write_whole
from blipfast.train.ranks import gather_objects, leave_group, rank, world_size

# A run of one process is not a fault.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")

_NAME = re.compile(r"step-(\d{8})")
_FACTS = "state.json"
_FORMAT = 1


class Checkpoints:
    """The newest checkpoints of a run, in a folder that all ranks see.

    folder: where they are. keep: how many stay; older ones are removed after a newer is whole.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int) -> None:
        self.folder, self.keep = Path(folder), keep
        self._pending: Future[Any] | None = None
        self._published = threading.Event()
        self._failed: OSError | None = None
        self._step = -1
        # Background writes must not meet the training's collectives in one group.
        group = dist.is_initialized()
        self._group = dist.new_group(backend="gloo") if group and world_size() > 1 else None

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(p for p in found if _NAME.fullmatch(p.name) and (p / _FACTS).is_file())

    def latest(self) -> Path | None:
        """The newest whole checkpoint, which is the same on all ranks."""
        found = self.all()
        newest = gather_objects(str(found[-1]) if found else None)[0]
        return None if newest is None else Path(newest)

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Starts to write a checkpoint, once an earlier one is whole; every rank must call it.

        tensors are copied before it returns, so they may change then. Names that are the same on
        all ranks hold the same tensor on all, or are shared out. facts: plain data; rank 0's count.

        Raises TrainingError if the earlier one could not be written.
        """
        self.finish()
        if (self.folder / _name(step)).exists():
            return
        self._step = step
        with self._write_errors():
            if rank() == 0:
                for left in self.folder.glob(".step-*"):  # by a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
                self._temporary.mkdir(parents=True)
                text = json.dumps({"format": _FORMAT, "step": step, **facts})
                write_whole(self._temporary / _FACTS, lambda file: file.write(text.encode()))
            self._barrier()
            writer = HuggingFaceStorageWriter(str(self._temporary), save_distributed=True)
            with _quiet():
                started = dcp.async_save(
                    tensors,
                    storage_writer=writer,
                    process_group=self._group,
                    no_dist=not dist.is_initialized(),
                )
        assert isinstance(started, Future)
        self._pending, self._failed = started, None
        self._published.clear()
        if rank() == 0:
            started.add_done_callback(self._publish)

    def _publish(self, written: Future[Any]) -> None:
        """Gives the folder its name, once all ranks have written: rank 0 is the last to know."""
        try:
            if written.exception() is not None:
                return
            os.replace(self._temporary, self.folder / _name(self._step))
            _sync(self.folder)
            for old in self.all()[: -self.keep]:
                gone = old.with_name(f".{old.name}.old")
                os.replace(old, gone)
                shutil.rmtree(gone, ignore_errors=True)
        except OSError as error:
            self._failed = error
        finally:
            self._published.set()

    def finish(self) -> None:
        """Waits until the checkpoint under way is whole. Raises TrainingError if it fails."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._write_errors():
            pending.result()
            if rank() == 0:
                self._published.wait()
                if self._failed is not None:
                    raise self._failed
        self._barrier()

    def load(self, path: Path, tensors: dict[str, Tensor], optional: str) -> dict[str, Any]:
        """Reads a checkpoint into `tensors`, in place, and returns its facts.

        optional: tensors whose names start so may be missing in it; they keep their values.

        Raises CheckpointError when it is damaged or of another model.
        """
        facts = read_facts(path)
        try:
            with _quiet():
                reader = HuggingFaceStorageReader(str(path))
                there = reader.read_metadata().state_dict_metadata
                sizes = {name: tuple(entry.size) for name, entry in there.items()}  # type: ignore[union-attr]
                wanted = _fitting(path, sizes, tensors, optional)
                dcp.load(
                    wanted,
                    storage_reader=reader,
                    process_group=self._group,
                    no_dist=not dist.is_initialized(),
                )
        except CheckpointError:
            raise
        except Exception as error:  # readers raise many kinds on damaged data
            raise CheckpointError(
                f"{path} is damaged: {error}; remove this folder to go on from the one before it"
            ) from error
        return facts

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{_name(self._step)}.tmp"

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Failures to write, in words; torch reports those of all ranks in one exception."""
        try:
            yield
        except (OSError, TrainingError, dcp.CheckpointException) as error:
            if rank() == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            if isinstance(error, TrainingError):
                raise
            cause: BaseException = error
            if isinstance(error, dcp.CheckpointException):
                cause = next(iter(error.failures.values()))[0]
            final = self.folder / _name(self._step)
            if not isinstance(cause, OSError):
                raise TrainingError(f"cannot write {final}: {cause}") from error
            kept = "; the checkpoints before it are unharmed"
            raise TrainingError(describe_write_error(final, cause, kept)) from error

    def _barrier(self) -> None:
        if world_size() > 1:
            dist.barrier(self._group)

    def close(self) -> None:
        """Waits for the checkpoint under way and gives the process group back."""
        try:
            self.finish()
        finally:
            if self._group is not None:
                leave_group(self._group)
                self._group = None


def read_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors. Raises CheckpointError when it cannot be read."""
    try:
        facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {facts['format']}, this version {_FORMAT}")
        return facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a run: {error!r}") from error


def _fitting(
    path: Path, sizes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], optional: str
) -> dict[str, Tensor]:
    """The tensors that the checkpoint has. Raises CheckpointError when it is of another model."""
    wanted = {name: t for name, t in tensors.items() if name in sizes}
    missing = [n for n in tensors if n not in sizes and not n.startswith(optional)]
    left = [n for n in sizes if n not in tensors and not n.startswith(("rng.", optional))]
    other = [
        f"{name} is {sizes[name]} there, {tuple(tensor.shape)} here"
        for name, tensor in wanted.items()
        if sizes[name] != tuple(tensor.shape)
    ]
    if missing or left or other:
        reasons = [f"it lacks {', '.join(missing[:5])}"] if missing else []
        reasons += [f"it has {', '.join(left[:5])} too"] if left else []
        raise CheckpointError(f"{path} is of another model: {'; '.join(reasons + other[:5])}")
    return wanted


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes on this way of writing, which say nothing to people."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if "dcp" in name]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
