"""The one place that chooses which backend runs an operator.

Each operator owns a `Backends` table, in order of preference. `auto` takes the first that can run
on the given tensor; a name given by argument, context manager or environment must be able to run,
or a `BackendError` says why not.

Precedence: the `impl=` argument, then `use_backend(...)`, then `BLIPFAST_BACKEND`
(`"cross_attention=reference,linear_cross_entropy=torch"`), then `auto`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from blipfast.errors import BackendError

ENV_VAR = "BLIPFAST_BACKEND"
# The modules that register backends when they are imported.
_OPERATORS = (
    "attention",
    "contrastive",
    "dense",
    "hard_negatives",
    "layer_norm",
    "linear_ce",
    "linear_layers",
    "momentum_update",
    "seeded_dropout",
)
_overrides: ContextVar[dict[str, str] | None] = ContextVar("blipfast_backends", default=None)
_tables: dict[str, Backends] = {}


Reason = Callable[[torch.Tensor], str | None]  # in words, or None


@dataclass(frozen=True)
class _Backend:
    name: str
    fn: Callable[..., Any]
    why_not: Reason
    slower: Reason


def _always(_: torch.Tensor) -> str | None:
    return None


class Backends:
    """The backends of one operator, best first."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._backends: dict[str, _Backend] = {}
        _tables[op] = self

    def register(
        self, name: str, why_not: Reason = _always, slower: Reason = _always
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Adds `fn` as backend `name`.

        `why_not(tensor)` says why it cannot run, `slower(tensor)` why `auto` had better take
        another; None where there is no reason.
        """

        def add(fn: Callable[..., Any]) -> Callable[..., Any]:
            self._backends[name] = _Backend(name, fn, why_not, slower)
            return fn

        return add

    @property
    def names(self) -> list[str]:
        return list(self._backends)

    def can_run(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether backend `name` would run on `tensor`."""
        return self._backends[name].why_not(tensor) is None

    def choose(self, tensor: torch.Tensor, impl: str = "auto") -> tuple[str, str]:
        """The backend for `tensor` and the reason, as `(name, why)`.

        Raises BackendError when a backend named by anyone is unknown or cannot run.
        """
        name, source = _requested(self.op, impl)
        if name != "auto":
            if name not in self._backends:
                raise BackendError(
                    f"{self.op}: no backend {name!r} (asked for by {source}); "
                    f"there are {', '.join(self.names)} and 'auto'"
                )
            reason = self._backends[name].why_not(tensor)
            if reason is not None:
                raise BackendError(f"{self.op}: backend {name!r} (asked for by {source}): {reason}")
            return name, f"asked for by {source}"
        passed_over: list[str] = []
        for backend in self._backends.values():
            reason = backend.why_not(tensor) or backend.slower(tensor)
            if reason is None:
                return backend.name, "; ".join(passed_over) or "first choice"
            passed_over.append(f"not {backend.name}: {reason}")
        raise BackendError(f"{self.op}: no backend can run: {'; '.join(passed_over)}")

    @property
    def free(self) -> bool:
        """Whether nobody has named a backend, so that another way may be taken altogether."""
        return _requested(self.op, "auto")[0] == "auto"

    def __call__(self, tensor: torch.Tensor, impl: str = "auto") -> Callable[..., Any]:
        return self._backends[self.choose(tensor, impl)[0]].fn


# A compiled graph keeps the choice that was in force when it was traced.
@torch.compiler.assume_constant_result
def _requested(op: str, impl: str) -> tuple[str, str]:
    """The backend that was asked for, or "auto", and by whom."""
    if impl != "auto":
        return impl, "the impl argument"
    overrides = _overrides.get() or {}
    if op in overrides:
        return overrides[op], "use_backend"
    env = _parse_env(os.environ.get(ENV_VAR, ""))
    if op in env:
        return env[op], ENV_VAR
    return "auto", "default"


@functools.cache
def _parse_env(value: str) -> dict[str, str]:
    pairs = [item.strip() for item in value.split(",") if item.strip()]
    if any("=" not in pair for pair in pairs):
        raise BackendError(f"{ENV_VAR}={value!r}: write op=backend pairs separated by commas")
    return {op.strip(): name.strip() for op, name in (pair.split("=", 1) for pair in pairs)}


@contextlib.contextmanager
def use_backend(**backends: str) -> Iterator[None]:
    """Chooses backends within a block: `with use_backend(cross_attention="torch"):`."""
    unknown = set(backends) - set(_tables)
    if unknown:
        raise BackendError(f"no operator {sorted(unknown)}; there are {sorted(_tables)}")
    token = _overrides.set({**(_overrides.get() or {}), **backends})
    try:
        yield
    finally:
        _overrides.reset(token)


def explain(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """For each operator the backend that `auto` takes on `device`, and why."""
    probe = torch.empty(0, device=device, dtype=dtype)
    return {op: table.choose(probe) for op, table in sorted(tables().items())}


def tables() -> dict[str, Backends]:
    """The backends of every operator."""
    for module in _OPERATORS:
        import_module(f"blipfast.ops.{module}")
    return _tables
