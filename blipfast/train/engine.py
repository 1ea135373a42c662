"""The training loop: any model, any iterable of batches, any step that gives a loss, any ranks.

What is particular here:
- A step counts only when its loss and gradients are finite on all ranks; otherwise the run stops
  with the batch's keys, or leaves the step out.
- Ctrl-C and SIGTERM end the run after the step at hand, on all ranks alike, and what is saved is
  whole.
- A resumed run continues bit for bit: weights, optimiser, random numbers, place in the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import Progress
from torch import Tensor, nn

from blipfast.errors import CheckpointError, ConfigError, Preempted, TrainingError
from blipfast.ops.packing import from_host
from blipfast.train import random_state
from blipfast.train.checkpoints import Checkpoints
from blipfast.train.config import FitConfig
from blipfast.train.history import History
from blipfast.train.optim import create_state, make_optimizer, named_state, set_learning_rate
from blipfast.train.parallel import lay_out
from blipfast.train.progress import training_progress
from blipfast.train.ranks import gather_objects, mean_of_ranks, rank, restarted, world_size
from blipfast.train.schedule import learning_rate_at
from blipfast.train.stopping import Watchdog, Wishes, heeding_signals
from blipfast.train.watch import StepTimer, Watch

Batch = dict[str, Any]
_REDRAW_SECONDS = 0.1
# What a resumed run may change: its length, how it reports, and over how many ranks it runs.
_MAY_CHANGE = frozenset(
    {"steps", "epochs", "log_every", "checkpoint_every", "keep_checkpoints", "on_nonfinite"}
    | {
        "max_skips",
        "compile",
        "cuda_graph",
        "parallel",
        "grad_checkpointing",
        "micro_batch",
        "hang_timeout",
    }
)


class StepOutput(Protocol):
    """What a step returns: the loss to minimise and its named parts, all scalars.

    A loss without a graph says that the step has run the backward pass itself.
    """

    @property
    def loss(self) -> Tensor: ...

    def losses(self) -> dict[str, Tensor]: ...


@dataclasses.dataclass
class FinishedLosses:
    """The output of a step that has run the backward pass itself: `parts` add up to its loss."""

    parts: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        return torch.stack(list(self.parts.values())).sum()

    def losses(self) -> dict[str, Tensor]:
        return self.parts


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
    watch: Watch | None = None,
    timer: StepTimer | None = None,
) -> History:
    """Trains `model` in place with AdamW and returns what each step gave.

    With a process group (`train.ranks.process_group`) every rank calls it with a model of the same
    shape and batches of its own; losses are averaged over the ranks.

    Args:
        model: its parameters that require gradients are trained, on the device where they lie.
            Under `parallel="fsdp"` they are shared out over the ranks, and stay so.
        batches: dicts whose tensors are moved to that device. "keys" (a list of names) tells errors
            and the count of samples; "position" and methods `stream(state)` and
            `combine_positions(positions of all ranks)` of `batches` let a resumed run find its
            place at once, on any number of ranks. An iterable that ends is begun again.
        step_fn: `(model, batch, step, epoch)` to an output with `.loss` and `.losses()`; step
            counts from 0, epoch is a fraction (`step / steps_per_epoch`).
        config: length, optimiser, schedule, parallelism. `config.seed` seeds torch's generators.
        title: names the run in the bar and in errors.
        progress: a rich bar to add a task to; by default one of its own, on rank 0.
        checkpoint_dir: keeps the newest checkpoints there: each epoch or `checkpoint_every` steps,
            at the end, and on Ctrl-C or SIGTERM. Each is there whole or not at all.
        resume: go on from the newest one, if there is one. A run that torchrun starts again does.
        watch: where losses and rates go as well, on rank 0.
        timer: measures the steps; give one that knows the model's FLOPs to see the MFU.

    Raises:
        TrainingError: a loss or gradient is not finite, the data end or the disk is full.
        ConfigError: the length is open, settings exclude each other, or a resumed run has others.
        CheckpointError: a checkpoint does not fit, or is there without `resume`.
        KeyboardInterrupt: on Ctrl-C, after the step is finished and saved; at once on a second.
        Preempted: on SIGTERM, after the step is finished and saved.
    """
    run = _Run(model, batches, step_fn, config, title, checkpoint_dir)
    run.timer = timer or StepTimer()
    # Ctrl-C may cut into any line: a drawing thread could then be left waiting for a lock.
    bar = progress or training_progress(auto_refresh=False, disable=rank() > 0)
    with contextlib.ExitStack() as stack:
        stack.callback(run.close)
        run.start(resume or restarted())
        if progress is None:
            stack.enter_context(bar)
        if watch is not None:
            stack.enter_context(watch)
        wishes = stack.enter_context(heeding_signals())
        watchdog = stack.enter_context(Watchdog(title, config.hang_timeout))
        task = bar.add_task(title, total=config.total_steps, completed=run.step)
        stream = run.stream() if run.left else iter(())
        stack.callback(getattr(stream, "close", lambda: None))
        for batch in run.timer.waiting(itertools.islice(stream, run.left)):
            asked = run.do(batch, wishes)
            watchdog.alive(run.step)
            run.report(bar, task, watch)
            if asked.interrupted or asked.preempted:
                run.save()
                run.close()
                raise Preempted if asked.preempted else KeyboardInterrupt
            if run.checkpoint_due:
                run.save()
        run.close()
    return run.history


class _Run:
    """Everything that changes during one `fit`."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        step_fn: StepFn,
        config: FitConfig,
        title: str,
        directory: str | os.PathLike[str] | None,
    ) -> None:
        self.batches, self.step_fn, self.config, self.title = batches, step_fn, config, title
        self.total = config.total_steps
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise TrainingError(f"{title}: no parameter of the model requires gradients")
        self.device = trained[0].device
        self.layout = lay_out(model, config)
        self.model = model
        self.optimizer = make_optimizer(model, config)
        keep = config.keep_checkpoints
        self.checkpoints = None if directory is None else Checkpoints(directory, keep)
        self.history = History(title)
        self.step, self.skips_in_a_row = 0, 0
        self.position: Any = None  # of this rank in its data
        self.found: Any = None  # that of all ranks, in a checkpoint
        self.clock = self.drawn = time.perf_counter()
        self.timer = StepTimer()

    @property
    def left(self) -> int:
        return self.total - self.step

    @property
    def checkpoint_due(self) -> bool:
        every = self.config.checkpoint_every or self.config.epoch_length
        return self.step % every == 0 or self.step == self.total

    def start(self, resume: bool) -> None:
        self.model.train()
        random_state.seed(self.config.seed)
        latest = None if self.checkpoints is None else self.checkpoints.latest()
        if latest is not None:
            if not resume:
                raise CheckpointError(
                    f"{latest} is there already: resume that run, or choose another folder"
                )
            self._restore(latest)
        self.clock = time.perf_counter() - (self.history.seconds or [0.0])[-1]

    def stream(self) -> Iterator[Batch]:
        if hasattr(self.batches, "stream"):
            return self.batches.stream(self.found)
        return _repeated(self.batches, self.step, self.title)

    def do(self, batch: Batch, wishes: Wishes) -> Wishes:
        """One step: forward, backward, check, update, record. Returns what any rank was asked."""
        config, step = self.config, self.step
        moved = {name: self._moved(name, value) for name, value in batch.items()}
        lr = learning_rate_at(step, config)
        set_learning_rate(self.optimizer, lr)
        # A bad batch reaches the feature queue before its loss is known.
        before = self._buffers() if config.on_nonfinite == "skip" else {}
        self.layout.before_step()
        bf16 = config.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = self.step_fn(self.layout.forward, moved, step, step / config.epoch_length)
        if output.loss.requires_grad:
            output.loss.backward()
        self.layout.finish()
        norm = self.layout.gradient_norm()
        parts = output.losses()
        scalars = [output.loss, norm, *parts.values()]
        scalars += [norm.new_tensor(float(wish)) for wish in dataclasses.astuple(wishes)]
        mean = mean_of_ranks(torch.stack([t.detach().float() for t in scalars]))
        total, grad_norm, *values = mean.tolist()  # a step waits for the device here
        losses = dict(zip(parts, values[: len(parts)], strict=True))
        if math.isfinite(total) and math.isfinite(grad_norm):
            if config.grad_clip is not None:
                self.layout.clip(config.grad_clip, norm)
            self.optimizer.step()
            self.skips_in_a_row = 0
            seconds = time.perf_counter() - self.clock
            samples = _samples(moved) * world_size()
            self.history.add(step, total, losses, lr, grad_norm, seconds, samples)
        else:
            self._skip_or_stop(batch, total, losses, grad_norm, before)
        self.optimizer.zero_grad(set_to_none=True)
        self.timer.done(_samples(moved) * world_size())
        self.step += 1
        self.position = batch.get("position")
        return Wishes(*(value > 0 for value in values[len(parts) :]))

    def _moved(self, name: str, value: Any) -> Any:
        """To the device, but masks: what they say of lengths is wanted on the host."""
        if not isinstance(value, Tensor) or name.endswith("_mask"):
            return value
        return from_host(value, self.device)

    def _skip_or_stop(
        self, batch: Batch, total: float, losses: dict[str, float], grad_norm: float,
        before: dict[str, Tensor],
    ) -> None:  # fmt: skip
        what = "gradient" if math.isfinite(total) else "loss"
        named = ", ".join(f"{k} {v:.4g}" for k, v in {"loss": total, **losses}.items())
        of_ranks = gather_objects([str(key) for key in batch.get("keys", [])])
        keys = [key for of_rank in of_ranks for key in of_rank]
        self._write_down({"step": self.step, "loss": str(total), "keys": keys})
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

    def _write_down(self, entry: dict[str, Any]) -> None:
        """All keys of a bad batch, for later: an error shows only the first."""
        if self.checkpoints is not None and rank() == 0:
            folder = self.checkpoints.folder
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "nonfinite.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def report(self, bar: Progress, task: Any, watch: Watch | None) -> None:
        history, rates = self.history, self.timer.rates()
        losses = "  ".join(f"{name} {history.mean(name, 20):.3f}" for name in history.losses)
        if history.skipped:
            losses += f"  left out {len(history.skipped)}"
        rate = f"{rates.samples:.1f} samples/s  data {rates.data_wait:.0%}"
        if rates.mfu is not None:
            rate += f"  MFU {rates.mfu:.0%}"
        bar.update(task, completed=self.step, losses=losses, rate=rate)
        if not bar.live.auto_refresh and time.perf_counter() - self.drawn > _REDRAW_SECONDS:
            bar.refresh()
            self.drawn = time.perf_counter()
        due = self.step % self.config.log_every == 0 or self.step == self.total
        if due and rank() == 0 and not bar.console.is_terminal:
            lr = (history.lr or [0.0])[-1]
            bar.console.print(
                f"{self.title}  step {self.step}/{self.total}  {losses}  lr {lr:.2e}  {rate}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        if watch is not None:
            watch.step()
            if history.steps and (self.step % watch.config.every == 0 or self.step == self.total):
                watch.log(self.step, {**history.last(), **rates.named()})

    def save(self) -> None:
        """Starts to write a checkpoint; `close` waits for it."""
        if self.checkpoints is None:
            return
        positions = gather_objects(self.position)
        combine = getattr(self.batches, "combine_positions", None)
        facts = {
            "data": combine(positions) if combine is not None else None,
            "random": gather_objects(random_state.host_state()),
            "history": self.history.to_dict(),
            "config": dataclasses.asdict(self.config),
        }
        self.checkpoints.save(self.step, self._tensors(), facts)

    def close(self) -> None:
        """Waits until the checkpoint under way is whole."""
        if self.checkpoints is not None:
            self.checkpoints.close()

    def _tensors(self) -> dict[str, Tensor]:
        """All that training changes; a module that is shared counts under its first name."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        kept = self.model.state_dict(keep_vars=True).keys()
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors |= {f"model.{n}": b for n, b in self.model.named_buffers() if n in kept}
        optimizer = named_state(self.optimizer, names)
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        return tensors | random_state.device_state(self.device)

    def _restore(self, path: Path) -> None:
        assert self.checkpoints is not None
        create_state(self.optimizer)
        tensors = self._tensors()
        facts = self.checkpoints.load(path, tensors, optional="rng.")
        now = json.loads(json.dumps(dataclasses.asdict(self.config)))
        for name, value in facts["config"].items():
            if name not in _MAY_CHANGE and now.get(name) != value:
                raise ConfigError(
                    f"{path} was made with fit.{name} {value!r}, now it is {now.get(name)!r}: "
                    "resume with the old settings, or start anew in another folder"
                )
        self.step, self.found = facts["step"], facts["data"]
        if self.step > self.total:
            raise ConfigError(f"{path} is at step {self.step}, after the end at {self.total}")
        self.history = History.from_dict(facts["history"])
        random_state.restore(facts["random"], tensors, self.device, self.config.seed, self.step)


def _samples(batch: Batch) -> int:
    if "keys" in batch:
        return len(batch["keys"])
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)


def _repeated(batches: Iterable[Batch], done: int, title: str) -> Iterator[Batch]:
    """Batches without end, after the `done` that an interrupted run has used."""
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
