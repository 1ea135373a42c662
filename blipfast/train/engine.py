"""The training loop: any model, any iterable of batches, any step that gives a loss.

What is particular here:
- A step counts only when its loss and gradients are finite; otherwise the run stops with the
  batch's keys, or leaves the step out.
- The first Ctrl-C ends the run after the step at hand, so that what is saved is consistent.
- A resumed run continues bit for bit: weights, optimiser, random numbers, place in the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import Progress
from torch import Tensor, nn

from blipfast.errors import CheckpointError, ConfigError, TrainingError
from blipfast.train.config import FitConfig
from blipfast.train.files import LAST, load_state, save_state
from blipfast.train.history import History
from blipfast.train.progress import training_progress
from blipfast.train.schedule import learning_rate_at

Batch = dict[str, Any]
_REDRAW_SECONDS = 0.1
# What a resumed run may change: its length, and how it reports.
_MAY_CHANGE = frozenset(
    {"steps", "epochs", "log_every", "checkpoint_every", "on_nonfinite", "max_skips", "compile"}
)


class StepOutput(Protocol):
    """What a step returns: the loss to minimise and its named parts, all scalars."""

    @property
    def loss(self) -> Tensor: ...

    def losses(self) -> dict[str, Tensor]: ...


StepFn = Callable[[Any, Batch, int, float], StepOutput]


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    step_fn: StepFn,
    config: FitConfig,
    *,
    title: str,
    progress: Progress | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> History:
    """Trains `model` in place with AdamW and returns what each step gave.

    Args:
        model: its parameters that require gradients are trained, on the device where they lie.
        batches: dicts whose tensors are moved to that device. "keys" (a list of names) tells errors
            and the count of samples; "position" and a method `stream(position)` of `batches` let a
            resumed run find its place at once. An iterable that ends is begun again.
        step_fn: `(model, batch, step, epoch)` to an output with `.loss` and `.losses()`; step
            counts from 0, epoch is a fraction (`step / steps_per_epoch`).
        config: length, optimiser, schedule. `config.seed` seeds torch's global generator.
        title: names the run in the bar and in errors.
        progress: a rich bar to add a task to; by default one of its own.
        checkpoint_dir: keeps `last.pt` there: each epoch or `checkpoint_every` steps, at the end,
            and on Ctrl-C. It is replaced whole or not at all.
        resume: go on from `last.pt`, if there is one.

    Raises:
        TrainingError: a loss or gradient is not finite, the data end or the disk is full.
        ConfigError: the length is open, or a resumed run has other settings.
        CheckpointError: `last.pt` does not fit, or is there without `resume`.
        KeyboardInterrupt: on Ctrl-C, after the step is finished and saved; at once on a second.
    """
    run = _Run(model, step_fn, config, title, checkpoint_dir)
    run.start(resume)
    own = progress is None
    # Ctrl-C may cut into any line: a drawing thread could then be left waiting for a lock.
    bar = training_progress(auto_refresh=False) if progress is None else progress
    with bar if own else contextlib.nullcontext(), _interruption() as asked_to_stop:
        task = bar.add_task(title, total=config.total_steps, completed=run.step)
        stream = _stream(batches, run.step, run.position, title) if run.left else iter(())
        for batch in itertools.islice(stream, run.left):
            run.do(batch)
            run.report(bar, task)
            if asked_to_stop.is_set():
                run.save()
                raise KeyboardInterrupt
            if run.checkpoint_due:
                run.save()
    return run.history


class _Run:
    """Everything that changes during one `fit`."""

    def __init__(
        self,
        model: nn.Module,
        step_fn: StepFn,
        config: FitConfig,
        title: str,
        directory: str | os.PathLike[str] | None,
    ) -> None:
        self.model, self.step_fn, self.config, self.title = model, step_fn, config, title
        self.total = config.total_steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise TrainingError(f"{title}: no parameter of the model requires gradients")
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda") or None,
        )
        self.forward: Any = torch.compile(model) if config.compile else model
        self.checkpoint = None if directory is None else Path(directory) / LAST
        self.history = History(title)
        self.step, self.skips_in_a_row = 0, 0
        self.position: Any = None
        self.clock = self.drawn = time.perf_counter()

    @property
    def left(self) -> int:
        return self.total - self.step

    @property
    def checkpoint_due(self) -> bool:
        every = self.config.checkpoint_every or self.config.epoch_length
        return self.step % every == 0 or self.step == self.total

    def start(self, resume: bool) -> None:
        self.model.train()
        torch.manual_seed(self.config.seed)
        if self.checkpoint is not None and self.checkpoint.exists():
            if not resume:
                raise CheckpointError(
                    f"{self.checkpoint} is there already: resume that run, or choose another folder"
                )
            self._restore(self.checkpoint)
        self.clock = time.perf_counter() - (self.history.seconds or [0.0])[-1]

    def do(self, batch: Batch) -> None:
        """One step: forward, backward, check, update, record."""
        config, step = self.config, self.step
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        lr = learning_rate_at(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # A bad batch reaches the feature queue before its loss is known.
        before = self._buffers() if config.on_nonfinite == "skip" else {}
        bf16 = config.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = self.step_fn(self.forward, moved, step, step / config.epoch_length)
        output.loss.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        parts = output.losses()
        scalars = torch.stack([t.detach().float() for t in (output.loss, norm, *parts.values())])
        total, grad_norm, *values = scalars.tolist()  # the only wait for the device in a step
        losses = dict(zip(parts, values, strict=True))
        if math.isfinite(total) and math.isfinite(grad_norm):
            if config.grad_clip is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, config.grad_clip, norm)
            self.optimizer.step()
            self.skips_in_a_row = 0
            seconds = time.perf_counter() - self.clock
            samples = _samples(moved)
            self.history.add(step, total, losses, lr, grad_norm, seconds, samples)
        else:
            self._skip_or_stop(batch, total, losses, grad_norm, before)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.position = batch.get("position")

    def _skip_or_stop(
        self, batch: Batch, total: float, losses: dict[str, float], grad_norm: float,
        before: dict[str, Tensor],
    ) -> None:  # fmt: skip
        what = "gradient" if math.isfinite(total) else "loss"
        named = ", ".join(f"{k} {v:.4g}" for k, v in {"loss": total, **losses}.items())
        keys = [str(key) for key in batch.get("keys", [])]
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        message = (
            f"{self.title}: step {self.step}: the {what} is not finite ({named}, gradient norm "
            f"{grad_norm:.4g}); batch: {shown or 'no keys given'}"
        )
        if self.config.on_nonfinite == "stop":
            raise TrainingError(
                f"{message}. Look at these records, lower the learning rate, set grad_clip, or "
                'leave such steps out with on_nonfinite="skip"'
            )
        self.history.skipped.append(self.step)
        self.skips_in_a_row += 1
        if self.skips_in_a_row > self.config.max_skips:
            raise TrainingError(f"{message}. It is step {self.skips_in_a_row} in a row left out")
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def report(self, bar: Progress, task: Any) -> None:
        history = self.history
        losses = "  ".join(f"{name} {history.mean(name, 20):.3f}" for name in history.losses)
        if history.skipped:
            losses += f"  left out {len(history.skipped)}"
        rate = f"{history.samples_per_second:.1f} samples/s"
        bar.update(task, completed=self.step, losses=losses, rate=rate)
        if not bar.live.auto_refresh and time.perf_counter() - self.drawn > _REDRAW_SECONDS:
            bar.refresh()
            self.drawn = time.perf_counter()
        due = self.step % self.config.log_every == 0 or self.step == self.total
        if due and not bar.console.is_terminal:
            lr = (history.lr or [0.0])[-1]
            bar.console.print(
                f"{self.title}  step {self.step}/{self.total}  {losses}  lr {lr:.2e}  {rate}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip

    def save(self) -> None:
        if self.checkpoint is None:
            return
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        save_state(
            self.checkpoint,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "position": self.position,
                "rng": {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()},
                "history": self.history.to_dict(),
                "config": dataclasses.asdict(self.config),
            },
        )

    def _restore(self, path: Path) -> None:
        state = load_state(path)
        now = dataclasses.asdict(self.config)
        for name, value in state["config"].items():
            if name not in _MAY_CHANGE and now.get(name) != value:
                raise ConfigError(
                    f"{path} was made with fit.{name} {value!r}, now it is {now.get(name)!r}: "
                    "resume with the old settings, or start anew in another folder"
                )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is of another model: {error}") from error
        self.step, self.position = state["step"], state.get("position")
        self.history = History.from_dict(state["history"])
        torch.set_rng_state(state["rng"]["torch"])
        random.setstate(state["rng"]["python"])
        if state["rng"]["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        if self.step > self.total:
            raise ConfigError(f"{path} is at step {self.step}, after the end at {self.total}")


def _samples(batch: Batch) -> int:
    if "keys" in batch:
        return len(batch["keys"])
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)


def _stream(batches: Iterable[Batch], done: int, position: Any, title: str) -> Iterator[Batch]:
    """Batches without end, after the `done` that an interrupted run has used."""
    if hasattr(batches, "stream"):
        yield from batches.stream(position)
        done = 0
    taken = 0
    while True:
        before = taken
        for batch in batches:
            taken += 1
            if taken > done:
                yield batch
        if taken == before or iter(batches) is batches:
            raise TrainingError(
                f"{title}: the data ended after {taken} batches; give more, or fewer steps"
            )


@contextlib.contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second raises KeyboardInterrupt on the spot."""
    asked = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()
    if not here or previous in (signal.SIG_IGN, None):
        yield asked
        return

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
