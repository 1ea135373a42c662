"""`blipfast caption`: captions for images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from blipfast.cli._parsing import make_parser, parse
from blipfast.errors import ConfigError

_EXAMPLES = """\
  blipfast caption dog.jpg --checkpoint model_base_caption.pth --vocabulary vocab.txt
  blipfast caption photos/ --checkpoint runs/caption/model --nucleus --seed 7 --json"""


def main(argv: Sequence[str]) -> int:
    from blipfast.cli import _inputs

    parser = make_parser(
        "caption",
        "Captions for image files and the images in folders, a line each: path, tab, caption. "
        "An image that cannot be read is named on stderr; the others go on and the status is 1.",
        _EXAMPLES,
    )
    parser.add_argument("images", type=str, nargs="+", help="files or folders")
    _inputs.add_model_options(parser)
    parser.add_argument(
        "--prompt", type=str, default="a picture of ", help="what a caption follows"
    )
    parser.add_argument("--beams", type=int, default=3, help="width of the beam search")
    parser.add_argument("--nucleus", action="store_true", help="sample instead (top-p 0.9)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--max_length", type=int, default=20, help="tokens, the prompt included")
    parser.add_argument("--min_length", type=int, default=5, help="tokens, the prompt included")
    parser.add_argument("--batch_size", type=int, default=8, help="images at once")
    parser.add_argument("--json", action="store_true", help="JSON Lines: image and caption")
    values = parse(parser, argv)
    return _run(**values)


def _run(
    images: list[str], checkpoint: str, vocabulary: str | None, image_size: int | None, device: str,
    precision: str, prompt: str, beams: int, nucleus: bool, seed: int, max_length: int,
    min_length: int, batch_size: int, json: bool,
) -> int:  # fmt: skip
    from blipfast.cli import _inputs
    from blipfast.generation import GenerationOptions, caption_images
    from blipfast.generation.options import Method
    from blipfast.serve.folder import find_images

    method: Method = "nucleus" if nucleus else "beam"
    paths = find_images(images)
    place = {path: i for i, path in enumerate(paths)}
    try:
        GenerationOptions(
            method=method, num_beams=beams, max_length=max_length, min_length=min_length
        )
    except ConfigError as error:
        raise ConfigError(str(error).replace("num_beams", "--beams")) from error
    model, tokenizer, where = _inputs.load_for(
        "caption", checkpoint, vocabulary, device, image_size
    )
    with _inputs.image_batches(paths, model, batch_size) as batches:
        for names, pixels in batches:
            options: dict[str, Any] = {"num_beams": beams}
            if nucleus:  # draws go by an image's place among all images, not by batches
                options = {"seed": seed, "image_ids": [place[name] for name in names]}
            with _inputs.autocast(where, precision):
                captions = caption_images(
                    model, tokenizer, pixels.to(where), prompt=prompt, method=method,
                    max_length=max_length, min_length=min_length, **options,
                )  # fmt: skip
            for name, caption in zip(names, captions, strict=True):
                _print(str(name), caption, json)
    return 1 if batches.failed else 0


def _print(image: str, caption: str, as_json: bool) -> None:
    row = {"image": image, "caption": caption}
    print(json.dumps(row, ensure_ascii=False) if as_json else f"{image}\t{caption}", flush=True)
