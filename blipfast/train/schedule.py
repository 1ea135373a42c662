"""Learning rates of BLIP's recipes: linear warm-up, decay by a factor, half a cosine."""

from __future__ import annotations

import math

from blipfast.train.config import FitConfig


def warmup_lr(step: int, warmup_steps: int, start: float, learning_rate: float) -> float:
    """Rises linearly from `start` at step 0 to `learning_rate` at `warmup_steps`, then stays."""
    if step >= warmup_steps:
        return learning_rate
    return start + (learning_rate - start) * step / warmup_steps


def step_decay_lr(epoch: int, learning_rate: float, min_lr: float, decay: float) -> float:
    """`learning_rate * decay ** epoch`, never under `min_lr`."""
    return max(min_lr, learning_rate * decay**epoch)


def cosine_lr(position: float, length: float, learning_rate: float, min_lr: float) -> float:
    """From `learning_rate` at 0 down to `min_lr` at `length`, along half a cosine."""
    height = 0.5 * (1.0 + math.cos(math.pi * position / length))
    return (learning_rate - min_lr) * height + min_lr


def learning_rate_at(step: int, config: FitConfig) -> float:
    """The learning rate of a step, counted from 0 over all epochs.

    Counted in epochs the rate changes once an epoch, as in the original; counted in steps the
    cosine moves at every step. Unlike the original's, a warm-up longer than the first epoch goes on
    in the second: until it is over the smaller of both rates counts.
    """
    epoch = step // config.epoch_length
    if config.schedule == "cosine":
        by_epoch = config.epochs is not None
        position, length = (epoch, config.epochs) if by_epoch else (step, config.total_steps)
        rate = cosine_lr(position, length or 1, config.learning_rate, config.min_learning_rate)
    elif config.schedule == "step":
        rate = step_decay_lr(epoch, config.learning_rate, config.min_learning_rate, config.decay)
    else:
        rate = config.learning_rate
    if step >= config.warmup_steps:
        return rate
    start = config.warmup_learning_rate
    return min(rate, warmup_lr(step, config.warmup_steps, start, config.learning_rate))
