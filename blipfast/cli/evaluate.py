"""`blipfast evaluate TASK`: the published protocols, on shards and manifests of clips."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from blipfast.cli._parsing import make_parser, parse
from blipfast.errors import ConfigError

if TYPE_CHECKING:
    from blipfast.evaluation.outcome import Outcome

# What is evaluated: the model's task, and the function that does it.
_TASKS = {
    "retrieval": ("retrieval", "_images.retrieval"),
    "caption": ("caption", "_images.caption"),
    "vqa": ("vqa", "_answers.vqa"),
    "nlvr2": ("nlvr", "_answers.nlvr2"),
    "visdial": ("visdial", "_answers.visdial"),
    "video-retrieval": ("retrieval", "_videos.video_retrieval"),
    "video-qa": ("vqa", "_videos.video_qa"),
}
_FRAMES = {"video-retrieval": 8, "video-qa": 16}
_EXAMPLES = """\
  # COCO or Flickr30K, fine-tuned or (a COCO model on Flickr30K) zero-shot
  blipfast evaluate retrieval --shards coco_test/ --checkpoint runs/retrieval_coco/model --k 256
  # COCO, and NoCaps by its domains
  blipfast evaluate caption --shards 'coco/test-*.tar' --checkpoint runs/caption_coco/model
  blipfast evaluate caption --shards 'nocaps/val-*.tar' --repetition_penalty 1.1 --checkpoint ...
  # VQA v2 by ranking a list; without --answers it generates
  blipfast evaluate vqa --shards 'vqa/val-*.tar' --checkpoint runs/vqa/model \\
      --answers answer_list.json --output results/vqa
  blipfast evaluate nlvr2 --shards 'nlvr2/test-*.tar' --checkpoint runs/nlvr/model
  blipfast evaluate visdial --shards 'visdial/val-*.tar' --checkpoint runs/visdial/model
  # clips, zero-shot: a retrieval model on MSRVTT, a VQA model on MSRVTT-QA or MSVD-QA
  blipfast evaluate video-retrieval --shards msrvtt/test.videos.jsonl --checkpoint coco.pth
  blipfast evaluate video-qa --shards msvd/qa-test.videos.jsonl --checkpoint model_vqa.pth
  # eight cards share the work, and give the same numbers
  torchrun --nproc-per-node 8 -m blipfast.cli evaluate vqa --shards ... --checkpoint ..."""


def main(argv: Sequence[str]) -> int:
    parser = make_parser(
        "evaluate",
        "Retrieval: recall at 1, 5 and 10 both ways in percent, by ITC alone and re-ranked by "
        "ITM. Caption: BLEU, METEOR, ROUGE-L, CIDEr, SPICE (METEOR, SPICE: with Java). VQA v2: the "
        "official accuracy. NLVR2: accuracy and consistency. VisDial: NDCG, MRR, R@1/5/10, mean "
        "rank. Clips: recall and median rank, or the share of right answers. Shards and manifests "
        "as `blipfast data prepare` writes them. A table goes to stderr, JSON to stdout.",
        _EXAMPLES,
    )
    _add_options(parser)
    values = parse(parser, argv)
    for name in ("k", "batch_size", "beams", "frames", "limit"):
        if values[name] is not None and values[name] < 1:
            raise ConfigError(f"{name} is {values[name]}; it must be at least 1")
    if values["keep_bytes"] < 0:
        raise ConfigError(f"keep_bytes is {values['keep_bytes']}; it must not be negative")
    if not 0 <= values["max_bad_fraction"] <= 1:
        raise ConfigError(
            f"max_bad_fraction is {values['max_bad_fraction']}; it is a share from 0 to 1"
        )
    values["frames"] = values["frames"] or _FRAMES.get(values["what"])
    return _run(values)


def _add_options(parser: Any) -> None:
    from blipfast.cli import _inputs

    def add(name: str, kind: Any, default: Any, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=text)

    parser.add_argument("what", type=Literal[tuple(_TASKS)], help="which task")
    parser.add_argument(
        "--shards", type=str, required=True,
        help="folder, file or glob of .tar; of clips: a videos.jsonl manifest",
    )  # fmt: skip
    _inputs.add_model_options(parser)
    add("--k", int | None, None, "candidates that ITM re-ranks (256; clips: 128), or answers (128)")
    add(
        "--max_length", int | None, None,
        "tokens of a text (35; of clips: 40), or of a caption with its prompt (20)",
    )  # fmt: skip
    add("--min_length", int, 5, "of a caption with its prompt")
    add("--prompt", str, "a picture of ", "what a caption follows")
    add("--beams", int, 3, "width of the beam search")
    add("--repetition_penalty", float, 1.0, "of captions; the paper's NoCaps has 1.1")
    add("--answers", str | None, None, "rank these, a JSON list or one a line; else generate")
    add(
        "--attend_padding", bool, False,
        "generated answers look at padding too, as the original's do: they depend on the batch",
    )  # fmt: skip
    add("--frames", int | None, None, "of a clip (retrieval 8, questions 16)")
    add(
        "--sampling", Literal["middle", "original"], "middle",
        "frames from the middles of equal shares; original: its step cut to a whole number",
    )  # fmt: skip
    add("--decoder", Literal["auto", "torchcodec", "pyav", "dali"], "auto", "what reads clips")
    add("--batch_size", int, 32, "images, questions or clips at once")
    add(
        "--keep_bytes", int, 2 << 30,
        "image tokens held in memory, per process; others are computed again for re-ranking",
    )  # fmt: skip
    add(
        "--reference_pairs", int, 0,
        "retrieval, VQA: also score about so many pairs by a padded pass for each, for its speed",
    )  # fmt: skip
    add("--limit", int | None, None, "at most so many records or lines; by default all")
    add("--max_bad_fraction", float, 0.01, "share of unreadable records that ends the run")
    add(
        "--output", str | None, None,
        "folder for metrics.json, the predictions file that the official server takes, and "
        "page.html with right and wrong answers",
    )  # fmt: skip
    add("--json", str | None, None, "also write the result there")


def _run(values: dict[str, Any]) -> int:
    import torch

    from blipfast.cli import _inputs
    from blipfast.cli._evaluation import Job, Records
    from blipfast.evaluation.sharing import rank
    from blipfast.train.ranks import process_group
    from blipfast.train.recipes import pick_device

    task, name = _TASKS[values["what"]]
    module, function = name.split(".")
    evaluate = getattr(import_module(f"blipfast.cli.{module}"), function)
    with process_group(pick_device(values["device"]), timeout=7200):
        model, tokenizer, where = _inputs.load_for(
            task, values["checkpoint"], values["vocabulary"], values["device"],
            values["image_size"],
        )  # fmt: skip
        model.eval()
        job = Job(model, tokenizer, where, values)
        if module == "_videos":
            data = import_module("blipfast.cli._videos").Clips(job)
        else:
            data = Records(values["shards"], values["limit"], values["max_bad_fraction"])
        with _inputs.autocast(where, values["precision"]), torch.inference_mode():
            outcome = evaluate(job, data)
        if rank() > 0:
            return 0
        first = {} if module == "_videos" else {"images": len(data)}
        _report({**first, **outcome.metrics, "bad_records": len(data.bad)}, outcome, values)
    return 0


def _report(metrics: dict[str, Any], outcome: Outcome, values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from blipfast.evaluation.page import flat_rows, render_page
    from blipfast.train.files import write_whole

    text = json.dumps(metrics, indent=2)
    wanted = {} if values["json"] is None else {Path(values["json"]): text}
    title = f"blipfast evaluate {values['what']}: {Path(values['checkpoint']).name}"
    if values["output"] is not None:
        folder = Path(values["output"])
        wanted |= {folder / name: content for name, content in outcome.files.items()}
        wanted[folder / "page.html"] = render_page(title, metrics, outcome)
        wanted[folder / "metrics.json"] = text  # last: with it all is there
    for path, content in wanted.items():
        write_whole(path, partial(_put, content))
    table = Table("metric", "value", title=title)
    table.columns[1].justify = "right"
    for row in flat_rows(metrics):
        table.add_row(*row)
    Console(stderr=True).print(table)
    print(text)


def _put(content: str, file: Any) -> None:
    file.write(f"{content.rstrip()}\n".encode())
