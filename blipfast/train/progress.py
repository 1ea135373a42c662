"""The progress bar of training: step, losses, samples a second, time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Field(ProgressColumn):
    """A field of the task, empty for tasks that do not have it."""

    def __init__(self, name: str, style: str) -> None:
        super().__init__()
        self.name, self.style = name, style

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get(self.name, "")), style=self.style)


def training_progress(
    console: Console | None = None, *, auto_refresh: bool = True, disable: bool = False
) -> Progress:
    """A bar whose tasks may have the fields `losses` and `rate`; it draws on stderr.

    auto_refresh: draw from a thread; otherwise only when `refresh` is called. disable: never draw.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Field("losses", "cyan"),
        _Field("rate", "green"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        auto_refresh=auto_refresh,
        disable=disable,
    )
