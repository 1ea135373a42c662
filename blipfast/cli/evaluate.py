"""`blipfast evaluate retrieval|caption|vqa|nlvr2|visdial`: metrics on shards."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from blipfast.cli._parsing import make_parser, parse
from blipfast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from blipfast.data import Record

_EXAMPLES = """\
  blipfast evaluate retrieval --shards coco_test/ --checkpoint runs/retrieval_coco/model --k 256
  blipfast evaluate caption --shards coco_test/ --checkpoint runs/caption_coco/model --beams 3
  blipfast evaluate vqa --shards 'vqa/val-*.tar' --checkpoint runs/vqa/model \\
      --answers answer_list.json --output results/vqa    # without --answers it generates
  blipfast evaluate nlvr2 --shards 'nlvr2/test-*.tar' --checkpoint runs/nlvr/model
  blipfast evaluate visdial --shards 'visdial/val-*.tar' --checkpoint runs/visdial/model"""
_KEEP_BYTES = 2 << 30  # image tokens above that are computed again for re-ranking, block by block


def main(argv: Sequence[str]) -> int:
    from blipfast.cli import _inputs

    parser = make_parser(
        "evaluate",
        "Retrieval: recall at 1, 5 and 10 both ways in percent, by ITC alone and re-ranked by "
        "ITM. Caption: CIDEr of generated captions against all texts of each image. VQA v2: the "
        "official accuracy. NLVR2: accuracy and consistency. VisDial: NDCG, MRR, R@1/5/10, mean "
        "rank. Shards as `blipfast data prepare` writes them.",
        _EXAMPLES,
    )
    parser.add_argument(
        "what", type=Literal["retrieval", "caption", "vqa", "nlvr2", "visdial"], help="which task"
    )
    parser.add_argument("--shards", type=str, required=True, help="folder, file or glob of .tar")
    _inputs.add_model_options(parser)
    parser.add_argument("--k", type=int, default=256, help="candidates that ITM re-ranks")
    parser.add_argument(
        "--max_length", type=int | None, default=None,
        help="tokens of a text (35), or of a caption with its prompt (20)",
    )  # fmt: skip
    parser.add_argument("--min_length", type=int, default=5, help="of a caption with its prompt")
    parser.add_argument(
        "--prompt", type=str, default="a picture of ", help="what a caption follows"
    )
    parser.add_argument("--beams", type=int, default=3, help="width of the beam search")
    parser.add_argument("--batch_size", type=int, default=32, help="images at once")
    parser.add_argument("--limit", type=int | None, default=None, help="images; by default all")
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.01,
        help="share of unreadable records that ends the run",
    )  # fmt: skip
    parser.add_argument(
        "--answers", type=str | None, default=None,
        help="VQA: rank these, a JSON list or one a line, rather than generate",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=str | None, default=None,
        help="folder for metrics.json and the predictions file that the official server takes",
    )  # fmt: skip
    parser.add_argument("--json", type=str | None, default=None, help="also write the result there")
    values = parse(parser, argv)
    for name in ("k", "batch_size", "beams"):
        if values[name] < 1:
            raise ConfigError(f"{name} is {values[name]}; it must be at least 1")
    return _run(values)


def _run(values: dict[str, Any]) -> int:
    from blipfast.cli import _answers, _inputs

    what = values["what"]
    task = _answers.TASKS[what][0] if what in _answers.TASKS else what
    model, tokenizer, where = _inputs.load_for(
        task, values["checkpoint"], values["vocabulary"], values["device"], values["image_size"]
    )
    model.eval()
    data = _Data(values, model.config.vision.image_size)
    files: dict[str, str] = {}
    with _inputs.autocast(where, values["precision"]):
        if what in _answers.TASKS:
            pixels = partial(_answers.stacked, transform=data.transform, where=where)
            run = _answers.TASKS[what][1]
            result, files = run(model, tokenizer, data.records, pixels, values)
        else:
            run_task = _retrieval if what == "retrieval" else _caption
            result = run_task(model, tokenizer, data, values, where)
    result = {"images": len(data.records), **result, "bad_records": data.bad}
    text = json.dumps(result, indent=2)
    _write(values, text, files)
    print(text)
    return 0


def _write(values: dict[str, Any], text: str, files: dict[str, str]) -> None:
    from pathlib import Path

    from blipfast.train.files import write_whole

    wanted = {} if values["json"] is None else {Path(values["json"]): text}
    if values["output"] is not None:
        folder = Path(values["output"])
        wanted |= {folder / "metrics.json": text}
        wanted |= {folder / name: content for name, content in files.items()}
    for path, content in wanted.items():
        write_whole(path, partial(_put, content))


def _put(content: str, file: Any) -> None:
    file.write(f"{content.rstrip()}\n".encode())


class _Data:
    """Images and texts of the shards, the images kept as they are encoded in the files."""

    def __init__(self, values: dict[str, Any], image_size: int) -> None:
        from blipfast.data import EvalTransform, read_shards

        self.size = values["batch_size"]
        self.transform = EvalTransform(image_size)
        reader = read_shards(values["shards"], values["max_bad_fraction"], True)
        self.records: list[Record] = []
        for record in reader:
            if values["limit"] is not None and len(self.records) >= values["limit"]:
                break
            self.records.append(record)
        self.texts = [[entry.text for entry in record.texts] for record in self.records]
        self.bad = len(reader.quarantine)
        if not self.records:
            raise DataError(f"the shards {values['shards']} hold no usable record")

    def pixels(self, index: Sequence[int]) -> Any:
        import torch

        return torch.stack([self.transform(self.records[i].image) for i in index])

    def batches(self) -> Iterator[range]:
        for start in range(0, len(self.records), self.size):
            yield range(start, min(start + self.size, len(self.records)))


def _retrieval(
    model: Any, tokenizer: Any, data: _Data, values: dict[str, Any], where: Any
) -> dict[str, Any]:
    import torch

    from blipfast.evaluation.retrieval import recall_metrics, score_retrieval
    from blipfast.models.blip import PackedText

    flat = [text for texts in data.texts for text in texts]
    encoded = tokenizer(flat, max_length=values["max_length"] or 35).to(where)
    text = PackedText.from_padded(encoded.input_ids, encoded.attention_mask)
    with torch.inference_mode():
        embeds, features, total = [], [], 0
        for block in data.batches():
            tokens = model.encode_image(data.pixels(block).to(where))
            features.append(model.image_features(tokens))
            total += tokens.nbytes
            if total <= _KEEP_BYTES:
                embeds.append(tokens)
        kept = torch.cat(embeds) if total <= _KEEP_BYTES else None
        del embeds
        text_feats = torch.cat(
            [
                model.text_features(text.select(range(i, min(i + 256, len(flat)))))
                for i in range(0, len(flat), 256)
            ]
        )

        def again(index: Sequence[int]) -> Any:
            return model.encode_image(data.pixels(index).to(where))

        scores = score_retrieval(
            model, again if kept is None else kept, torch.cat(features), text, text_feats,
            k=values["k"],
        )  # fmt: skip
    ends = [0]
    for texts in data.texts:
        ends.append(ends[-1] + len(texts))
    owned = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    return {
        "texts": len(flat),
        "itc": recall_metrics(scores.itc, scores.itc, owned).to_dict(),
        "itm": recall_metrics(scores.image_to_text, scores.text_to_image, owned).to_dict(),
        "pairs_through_itm": scores.pairs,
    }


def _caption(
    model: Any, tokenizer: Any, data: _Data, values: dict[str, Any], where: Any
) -> dict[str, Any]:
    from blipfast.evaluation.captions import cider
    from blipfast.generation import caption_images

    captions: list[str] = []
    for block in data.batches():
        captions += caption_images(
            model, tokenizer, data.pixels(block).to(where), prompt=values["prompt"],
            num_beams=values["beams"], max_length=values["max_length"] or 20,
            min_length=values["min_length"],
        )  # fmt: skip
    return {"cider": 100.0 * cider(captions, data.texts).mean, "first_captions": captions[:5]}
