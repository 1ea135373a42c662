"""`blipfast capfilt`: caption web images, filter both kinds of text (section 3.3)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from blipfast.capfilt.config import STAGES, CapFiltConfig
from blipfast.capfilt.report import CapFiltReport
from blipfast.cli._parsing import add_dataclass, make_parser, parse_as
from blipfast.errors import ConfigError

_STAGES = {
    "caption": "write captions of all images",
    "score": "judge all texts, those that came with the images and the captions",
    "filter": "decide by the scores, and write shards and manifest; needs no model",
}
# Options that may be repeated, and what they are called in the settings.
_REPEATED = {
    "--captioner": "captioners", "--filter": "filters", "--human": "human", "--trusted": "trusted",
}  # fmt: skip
_AROUND = {
    "finetune": "captioner and filter from a pre-trained model, apart or as one",
    "bootstrap": "fine-tune captioner and filter, run all stages, train a new model; in rounds",
    "report": "a page on runs: kept and rejected texts, noise, diversity",
    "sample": "texts of a run to label by hand",
    "calibrate": "thresholds from labelled texts, with their precision and recall",
}
_EXAMPLES = """\
  blipfast capfilt --input web/ --output clean/ --captioner runs/captioner/model \\
      --filter runs/filter/model --human coco/

  # another threshold on the same scores takes seconds
  blipfast capfilt filter --input web/ --work clean/ --output stricter/ --threshold 0.8

  # an ensemble of two filters, three captions of each image, eight cards
  torchrun --nproc-per-node 8 -m blipfast.cli capfilt --input web/ --output clean/ \\
      --captioner a/model --filter b/model --filter c/model --captions_per_image 3

  # on a Ray cluster
  blipfast capfilt --input web/ --output clean/ ... --runner ray --ray_models 16"""


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in _AROUND:
        from blipfast.cli import _capfilt_pages

        return getattr(_capfilt_pages, argv[0])(argv[1:])
    stage, rest = _stage(list(argv))
    parser = make_parser(
        "capfilt",
        "Captions the images of shards, judges web and synthetic texts by ITM and writes the texts "
        "that match as new shards, with a manifest of every decision. A run that was stopped, or "
        "killed, goes on where it was.\n\nAll stages run, unless one is named first:\n"
        + "\n".join(f"  {name:<10}{text}" for name, text in _STAGES.items())
        + "\n\nAround them, each with a --help of its own:\n"
        + "\n".join(f"  {name:<10}{text}" for name, text in _AROUND.items()),
        _EXAMPLES,
        usage="blipfast capfilt [STAGE] [--config FILE] --input SHARDS --output FOLDER "
        "[--OPTION ...]",
    )
    add_dataclass(parser, CapFiltConfig)
    config = parse_as(CapFiltConfig, parser, _listed(rest))
    from blipfast.capfilt import run_capfilt, run_stage
    from blipfast.train.ranks import rank

    report = run_capfilt(config) if stage is None else run_stage(config, stage)
    if report is not None and rank() == 0:
        _print(report)
    return 0


def _stage(argv: list[str]):  # type: ignore[no-untyped-def]
    if not argv or argv[0].startswith("-"):
        return None, argv
    if argv[0] not in STAGES:
        known = ", ".join([*STAGES, *_AROUND])
        raise ConfigError(f"capfilt has no stage {argv[0]!r}; there are {known}")
    return argv[0], argv[1:]


def _listed(argv: list[str]) -> list[str]:
    """Repeated options as the list that the settings have: `--captioner A --captioner B`."""
    out: list[str] = []
    given: dict[str, list[str]] = {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name = _REPEATED.get(flag)
        if name is None:
            out.append(word)
            continue
        value = value if equals else next(words, "")
        if value.startswith("["):  # a list already
            out.append(f"--{name}={value}")
        else:
            given.setdefault(name, []).append(value)
    return out + [f"--{name}={json.dumps(values)}" for name, values in given.items()]


def _print(report: CapFiltReport) -> None:
    for source, count in report.texts.items():
        print(f"{source}: {report.accepted.get(source, 0)} of {count} texts accepted")
    print(f"{report.kept} of {report.images} images kept, {report.unreadable} unreadable")
    print(report.manifest)
