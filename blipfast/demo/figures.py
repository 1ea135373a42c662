"""The report's plots, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

from blipfast.demo.measure import FilterResult
from blipfast.evaluation.figures import as_svg, pyplot
from blipfast.train.history import History

_COLOURS = {"noisy": "#c0504d", "bootstrapped": "#2e7d4f"}
_NAMES = {"itc": "ITC", "itm": "ITM", "lm": "LM"}


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start."""
    total, norm, out = 0.0, 0.0, []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def loss_curves(histories: dict[str, History]) -> str:
    """One panel per loss, one line per model ("noisy", "bootstrapped")."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.9))
    for axis, (key, title) in zip(axes, _NAMES.items(), strict=True):
        for name, history in histories.items():
            steps, values = history.steps, history.losses[key]
            axis.plot(steps, values, color=_COLOURS[name], alpha=0.15, linewidth=0.7)
            axis.plot(steps, smooth(values), color=_COLOURS[name], label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    return as_svg(figure)


def filter_plots(result: FilterResult, threshold: float) -> str:
    """How the filter's probabilities fall for right and wrong texts, and its ROC curve."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9))
    bins = [i / 20 for i in range(21)]
    left.hist(
        [result.right, result.wrong], bins, label=["right texts", "wrong texts"],
        color=["#2e7d4f", "#c0504d"],
    )  # fmt: skip
    left.axvline(threshold, color="black", linestyle="--", linewidth=1)
    left.set_xlabel("ITM probability of a match")
    left.legend()
    right.plot(*zip(*result.roc, strict=True), color="#2e7d4f")
    right.plot([0, 1], [0, 1], color="grey", linestyle=":")
    right.set_xlabel("right texts rejected")
    right.set_ylabel("wrong texts rejected")
    right.set_title(f"AUC {result.auc:.3f}")
    return as_svg(figure)
