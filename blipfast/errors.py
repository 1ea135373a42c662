"""Errors that blipfast raises for people: what is wrong, where, and what to do."""

from __future__ import annotations


class BlipfastError(Exception):
    """Base class: catch this to catch every error blipfast raises on purpose."""


class ShapeError(BlipfastError, ValueError):
    """A tensor has a shape, dtype or device that the operation cannot take."""


class BackendError(BlipfastError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class CheckpointError(BlipfastError, ValueError):
    """A checkpoint does not fit the model: lists the keys missing, left over or misshapen."""


class DataError(BlipfastError, ValueError):
    """An image, a text or a shard cannot be used."""


class ConfigError(BlipfastError, ValueError):
    """A configuration value is unknown, of the wrong type or contradicts another."""


class TrainingError(BlipfastError, RuntimeError):
    """Training cannot go on (a loss is not finite, a disk is full)."""


class Preempted(BaseException):
    """A run was told to end by SIGTERM, and is saved. Not an error, so no `except` takes it."""

    exit_code = 75  # EX_TEMPFAIL: torchrun, or a scheduler, starts the run again
