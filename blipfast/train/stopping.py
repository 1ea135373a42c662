"""What ends a run early: Ctrl-C, SIGTERM (pre-emption), and a rank that hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from blipfast.train.ranks import rank, world_size

EXIT_HUNG = 76
"""Exit code of a rank that has not finished a step in time."""


@dataclass
class Wishes:
    """Signals that came since the start; the run ends after the step at hand.

    It is one rank's: all must learn of it to end at the same step.
    """

    interrupted: bool = False
    preempted: bool = False


@contextmanager
def heeding_signals() -> Iterator[Wishes]:
    """Notes the first SIGINT and SIGTERM rather than dying; a second SIGINT raises on the spot."""
    wishes = Wishes()
    if threading.current_thread() is not threading.main_thread():
        yield wishes
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if wishes.interrupted:
            raise KeyboardInterrupt
        wishes.interrupted = True

    def on_terminate(number: int, frame: FrameType | None) -> None:
        wishes.preempted = True

    previous = {}
    for number, handler in ((signal.SIGINT, on_interrupt), (signal.SIGTERM, on_terminate)):
        before = signal.getsignal(number)
        # A library's own SIGTERM handler counts; one that ignores Ctrl-C is left alone.
        if before not in (signal.SIG_IGN, None):
            previous[number] = before
            signal.signal(number, handler)
    try:
        yield wishes
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class Watchdog:
    """Ends this process when no step finishes in `timeout` seconds, after it has written down where
    each of its threads is. A context manager; `alive` restarts the clock.
    """

    def __init__(self, title: str, timeout: float) -> None:
        self.title, self.timeout = title, timeout
        self._last, self._step = time.monotonic(), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="blipfast-watchdog", daemon=True)

    def alive(self, step: int) -> None:
        self._last, self._step = time.monotonic(), step

    def __enter__(self) -> Watchdog:
        self.alive(0)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.timeout / 4)):
            if time.monotonic() - self._last > self.timeout:
                who = f"rank {rank()} of {world_size()}"
                print(
                    f"{self.title}: {who} has not finished step {self._step} within "
                    f"{self.timeout:g} s (fit.hang_timeout); it ends here. Its threads are at:",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(EXIT_HUNG)
