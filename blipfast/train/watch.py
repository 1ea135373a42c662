"""Watching a run: TensorBoard, Weights & Biases, a trace of some steps, and where the time goes."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from blipfast.errors import ConfigError, TrainingError
from blipfast.train.config import WatchConfig

T = TypeVar("T")
_WINDOW = 50  # steps that rates are averaged over


@dataclass
class Rates:
    """samples: a second, on all ranks. data_wait: share of the time that steps waited for data.
    mfu: share of the hardware's FLOP/s that the model's arithmetic makes up, None if unknown."""

    samples: float
    data_wait: float
    mfu: float | None

    def named(self) -> dict[str, float]:
        named = {"rate/samples_per_second": self.samples, "rate/data_wait": self.data_wait}
        return named if self.mfu is None else {**named, "rate/mfu": self.mfu}


class StepTimer:
    """Measures steps over a sliding window. `waiting` wraps the batches, `done` ends a step.

    flops: the model's FLOPs for one sample of a step. peak: FLOP/s of all ranks' hardware.
    """

    def __init__(self, flops: float | None = None, peak: float | None = None) -> None:
        self.flops, self.peak = flops, peak
        self._waited = 0.0
        self._last = time.perf_counter()
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=_WINDOW)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, with the time that each took to come."""
        stream = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def done(self, samples: int) -> None:
        now = time.perf_counter()
        self._steps.append((now - self._last, self._waited, samples))
        self._last, self._waited = now, 0.0

    def rates(self) -> Rates:
        """Over the last steps; the first of a run, which pays for start-up, is left out early."""
        steps = list(self._steps)[1:] or list(self._steps)
        seconds = sum(step[0] for step in steps)
        if not seconds:
            return Rates(0.0, 0.0, None)
        samples = sum(step[2] for step in steps) / seconds
        known = self.flops is not None and self.peak
        mfu = samples * self.flops / self.peak if known else None  # type: ignore[operator]
        return Rates(samples, sum(step[1] for step in steps) / seconds, mfu)


class Watch:
    """Where a run's figures go. Open it on one rank only; a context manager.

    folder: of the run; TensorBoard's files go to `tensorboard/` in it, a trace to `trace.json`.
    Raises ConfigError when what is asked for is not installed.
    """

    def __init__(self, config: WatchConfig, folder: str | Path, settings: dict[str, Any]) -> None:
        self.config, self.folder = config, Path(folder)
        self._board: Any = None
        self._wandb: Any = None
        self._profiler: Any = None
        if config.tensorboard:
            self._board = self._open_board()
        if config.wandb is not None:
            self._wandb = self._open_wandb(settings)

    def _open_board(self) -> Any:
        if importlib.util.find_spec("tensorboard") is None:
            print(
                "blipfast: no TensorBoard files are written: pip install 'blipfast[tensorboard]', "
                "or set watch.tensorboard=false",
                file=sys.stderr,
            )
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), flush_secs=30)

    def _open_wandb(self, settings: dict[str, Any]) -> Any:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("watch.wandb needs Weights & Biases: pip install wandb")
        import wandb

        return wandb.init(project=self.config.wandb, dir=str(self.folder), config=settings)

    def __enter__(self) -> Watch:
        if self.config.profile:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(
                activities=activities,
                schedule=torch.profiler.schedule(wait=1, warmup=1, active=self.config.profile),
                on_trace_ready=self._write_trace,
            )
            self._profiler.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write_trace(self, profiler: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            profiler.export_chrome_trace(str(self.folder / "trace.json"))
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"cannot write the trace in {self.folder}: {error}") from error

    def step(self) -> None:
        """Tells the profiler that a step has ended."""
        if self._profiler is not None:
            self._profiler.step()

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes a step's figures, by names such as `loss/itc`."""
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
