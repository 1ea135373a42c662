"""`blipfast match`: how well texts fit an image."""

from __future__ import annotations

import json
from collections.abc import Sequence

from blipfast.cli._parsing import make_parser, parse

_EXAMPLES = """\
  blipfast match dog.jpg --text "a dog" --text "a cat" --checkpoint runs/filter/model
  blipfast match dog.jpg --text "a dog" --checkpoint model_base_retrieval.pth \\
      --vocabulary vocab.txt --json"""


def main(argv: Sequence[str]) -> int:
    from blipfast.cli import _inputs

    parser = make_parser(
        "match",
        "For each text the probability that it matches the image (ITM) and their similarity (ITC), "
        "the best text first. The image is encoded once for all texts.",
        _EXAMPLES,
    )
    parser.add_argument("image", type=str, help="an image file")
    parser.add_argument(
        "--text", action="append", type=str, required=True, help="a text; may be repeated"
    )
    _inputs.add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="JSON Lines: text, itm, itc")
    return _run(**parse(parser, argv))


def _run(
    image: str, text: list[str], checkpoint: str, vocabulary: str | None, image_size: int | None,
    device: str, precision: str, json: bool,
) -> int:  # fmt: skip
    import torch

    from blipfast.cli import _inputs
    from blipfast.data import EvalTransform
    from blipfast.models.blip import PackedText

    model, tokenizer, where = _inputs.load_for(
        "retrieval", checkpoint, vocabulary, device, image_size
    )
    pixels = EvalTransform(model.config.vision.image_size)(image)[None].to(where)
    batch = tokenizer(text, max_length=35).to(where)
    packed = PackedText.from_padded(batch.input_ids, batch.attention_mask)
    with torch.inference_mode(), _inputs.autocast(where, precision):
        embeds = model.encode_image(pixels)
        states = model.image_states(embeds, project=True)
        logits = model.match(packed, states, [0] * len(text)).float()
        similarity = (model.text_features(packed) @ model.image_features(embeds)[0]).float()
    rows = sorted(
        zip(logits.softmax(-1)[:, 1].tolist(), similarity.tolist(), text, strict=True), reverse=True
    )
    for itm, itc, one in rows:
        _print(itm, itc, one, json)
    return 0


def _print(itm: float, itc: float, text: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"text": text, "itm": itm, "itc": itc}, ensure_ascii=False))
    else:
        print(f"ITM {itm:.4f}  ITC {itc:+.4f}  {text}")
