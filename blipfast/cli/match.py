"""`blipfast match`: how well texts fit images."""

from __future__ import annotations

import json
from collections.abc import Sequence

from blipfast.cli._parsing import make_parser, parse

_EXAMPLES = """\
  blipfast match dog.jpg --text "a dog" --text "a cat" --checkpoint runs/filter/model
  blipfast match photos/ --text "a dog" --checkpoint runs/filter/model --json
  blipfast match dog.jpg --text "a dog" --checkpoint model_base_retrieval.pth \\
      --vocabulary vocab.txt"""


def main(argv: Sequence[str]) -> int:
    from blipfast.cli import _inputs

    parser = make_parser(
        "match",
        "For each image and text the probability that they match (ITM) and their similarity (ITC), "
        "an image's best text first. An image is encoded once for all texts; one that cannot be "
        "read is named on stderr, the others go on and the status is 1.",
        _EXAMPLES,
    )
    parser.add_argument("images", type=str, nargs="+", help="files or folders")
    parser.add_argument(
        "--text", action="append", type=str, required=True, help="a text; may be repeated"
    )
    _inputs.add_model_options(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="images at once")
    parser.add_argument("--json", action="store_true", help="JSON Lines: image, text, itm, itc")
    return _run(**parse(parser, argv))


def _run(
    images: list[str], text: list[str], checkpoint: str, vocabulary: str | None,
    image_size: int | None, device: str, precision: str, batch_size: int, json: bool,
) -> int:  # fmt: skip
    import torch

    from blipfast.cli import _inputs
    from blipfast.models.blip import PackedText
    from blipfast.serve.folder import find_images

    paths = find_images(images)
    model, tokenizer, where = _inputs.load_for(
        "retrieval", checkpoint, vocabulary, device, image_size
    )
    batch = tokenizer(text, max_length=35).to(where)
    packed = PackedText.from_padded(batch.input_ids, batch.attention_mask)
    with _inputs.image_batches(paths, model, batch_size) as batches:
        for names, pixels in batches:
            count = len(names)
            with torch.inference_mode(), _inputs.autocast(where, precision):
                embeds = model.encode_image(pixels.to(where))
                texts = packed.select([n for n in range(len(text)) for _ in names])
                logits = model.match(
                    texts, model.image_states(embeds), [*range(count)] * len(text)
                ).float()
                cosines = (model.text_features(packed) @ model.image_features(embeds).T).float()
            itm = logits.softmax(-1)[:, 1].view(len(text), count)
            for i, name in enumerate(names):
                rows = zip(itm[:, i].tolist(), cosines[:, i].tolist(), text, strict=True)
                for one_itm, itc, one in sorted(rows, reverse=True):
                    _print(str(name), one_itm, itc, one, json, several=len(paths) > 1)
    return 1 if batches.failed else 0


def _print(image: str, itm: float, itc: float, text: str, as_json: bool, *, several: bool) -> None:
    if as_json:
        row = {"image": image, "text": text, "itm": itm, "itc": itc}
        print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    where = f"{image}\t" if several else ""
    print(f"{where}ITM {itm:.4f}  ITC {itc:+.4f}  {text}", flush=True)
