"""`blipfast serve`: a local page for captions, questions, matching and search."""

from __future__ import annotations

from collections.abc import Sequence

from blipfast.cli._parsing import add_dataclass, make_parser, parse_as

_EXAMPLES = """\
  blipfast serve --caption model_base_caption.pth --vqa model_vqa.pth \\
      --retrieval model_base_retrieval_coco.pth --folder photos/ --vocabulary vocab.txt
  blipfast serve --retrieval runs/retrieval/model --port 8000"""


def main(argv: Sequence[str]) -> int:
    from blipfast.serve.app import ServeConfig

    parser = make_parser(
        "serve",
        "A page on this machine: captions of a picture, answers to questions about it, how well "
        "texts fit and where each word looks, and pictures of a folder by text. It has what the "
        "checkpoints given can do, and listens to this machine alone unless --host says otherwise.",
        _EXAMPLES,
    )
    add_dataclass(parser, ServeConfig)
    config = parse_as(ServeConfig, parser, argv)
    from blipfast.serve.page import serve

    serve(config, lambda address: print(f"blipfast: open {address} (Ctrl-C ends)", flush=True))
    return 0
