"""`blipfast capfilt finetune|bootstrap|report|sample|calibrate`: what surrounds the stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blipfast.cli._parsing import add_dataclass, make_parser, parse, parse_as

if TYPE_CHECKING:
    from blipfast.capfilt.bootstrap import BootstrapConfig


def report(argv: Sequence[str]) -> int:
    parser = make_parser(
        "capfilt report",
        "A page on runs side by side: how many texts of each source were kept, noise ratio, how "
        "varied the captions are, and images with their kept and rejected texts.",
        """\
  blipfast capfilt report clean/
  blipfast capfilt report nucleus/ beam/ --output compared.html""",
    )
    parser.add_argument("runs", type=str, nargs="+", help="output folders of CapFilt")
    parser.add_argument("--output", type=str, default="capfilt.html", help="the page")
    values = parse(parser, argv)
    from blipfast.capfilt.pages import write_report

    write_report(values["runs"], Path(values["output"]))
    print(values["output"])
    return 0


def sample(argv: Sequence[str]) -> int:
    parser = make_parser(
        "capfilt sample",
        "Texts to label by hand, spread evenly over the filter's scores: a page to click on, and a "
        "file with the same rows.",
        "  blipfast capfilt sample clean/ --count 200",
    )
    parser.add_argument("run", type=str, help="output folder of CapFilt")
    parser.add_argument("--count", type=int, default=200, help="texts, half of them synthetic")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--output", type=str, default="labels.html", help="the page")
    values = parse(parser, argv)
    from blipfast.capfilt.calibrate import sample_texts
    from blipfast.capfilt.decisions import read_manifest
    from blipfast.capfilt.pages import open_run, write_labelling_page

    run = open_run(values["run"])
    labels = sample_texts(read_manifest(run.manifest), values["count"], values["seed"])
    write_labelling_page(labels, run, Path(values["output"]))
    print(values["output"])
    return 0


def calibrate(argv: Sequence[str]) -> int:
    parser = make_parser(
        "capfilt calibrate",
        "Thresholds for web and synthetic texts from labelled ones, and a page with the precision "
        "and recall of all thresholds.",
        """\
  blipfast capfilt calibrate labels.jsonl
  blipfast capfilt calibrate labels.jsonl --precision 0.95""",
    )
    parser.add_argument("labels", type=str, help="a file that `capfilt sample`'s page saved")
    parser.add_argument(
        "--precision",
        type=float,
        default=None,
        help="share of kept texts that must match; by default F1 decides",
    )
    parser.add_argument("--output", type=str, default="thresholds.html", help="the page")
    values = parse(parser, argv)
    from blipfast.capfilt.calibrate import calibrate, read_labels
    from blipfast.capfilt.decisions import write_lines
    from blipfast.capfilt.pages import write_calibration_page

    curves = calibrate(read_labels(values["labels"]), values["precision"])
    page = Path(values["output"])
    write_calibration_page(curves, page)
    options = {"web": "threshold", "synthetic": "synthetic_threshold"}
    chosen = {options[kind]: curve.threshold for kind, curve in curves.items()}
    write_lines(page.with_suffix(".json"), [json.dumps(chosen, indent=1)])
    for kind, curve in curves.items():
        p, r = curve.precision[curve.chosen], curve.recall[curve.chosen]
        print(f"{kind}: threshold {curve.threshold:.4f} (precision {p:.1%}, recall {r:.1%})")
    print("blipfast capfilt filter", *(f"--{name} {value:.6g}" for name, value in chosen.items()))
    return 0


def finetune(argv: Sequence[str]) -> int:
    from blipfast.capfilt.bootstrap import run_finetune

    config = _bootstrap_config(
        argv,
        "finetune",
        "Captioner and filter from a pre-trained model, fine-tuned on human-written texts: apart, "
        "or as one model (--models shared). Settings and output are those of `capfilt bootstrap`, "
        "which goes on from here.",
        """\
  blipfast capfilt finetune --pretrained model_base_14M.pth --vocabulary vocab.txt \\
      --human shards/coco --web shards/web --output runs/bootstrap""",
    )
    for model in dict.fromkeys(run_finetune(config, lambda text: print(text, flush=True))):
        print(model)
    return 0


def bootstrap(argv: Sequence[str]) -> int:
    from blipfast.capfilt.bootstrap import run_bootstrap

    config = _bootstrap_config(
        argv,
        "bootstrap",
        "The whole of it: fine-tune captioner and filter, caption and filter the web, train a "
        "new model on what is kept; in rounds, if asked. A run that was stopped goes on.",
        """\
  blipfast capfilt bootstrap --pretrained model_base_14M.pth --vocabulary vocab.txt \\
      --web shards/web --human shards/coco --output runs/bootstrap

  # one model as captioner and filter; a second round
  blipfast capfilt bootstrap --config shared --rounds 2 ...

  # the paper's comparison: as many steps on the web texts as they are
  blipfast capfilt bootstrap --config web_longer --pretrain.fit.steps 100000 ...""",
    )
    for model in run_bootstrap(config, lambda text: print(text, flush=True)):
        print(model)
    return 0


def _bootstrap_config(
    argv: Sequence[str], command: str, description: str, examples: str
) -> BootstrapConfig:
    """The paper's settings, under those that are named and given."""
    from blipfast.capfilt.bootstrap import BootstrapConfig, packaged_bootstraps

    named = packaged_bootstraps()
    parser = make_parser(
        f"capfilt {command}",
        f"{description} Settings for --config, on top of the paper's: {', '.join(named)}.",
        examples,
        usage=f"blipfast capfilt {command} [--config NAME_OR_FILE] --pretrained MODEL --web SHARDS "
        "--human SHARDS [--OPTION ...]",
    )
    add_dataclass(parser, BootstrapConfig)
    return parse_as(BootstrapConfig, parser, ["--config", "paper", *argv], named)
