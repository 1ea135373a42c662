"""The command line: `blipfast COMMAND`, by what `COMMANDS` lists.

Each subcommand is a module of its own, imported when it is called, so that `--help` does not wait
for torch. What blipfast raises on purpose becomes one line on stderr; BLIPFAST_DEBUG=1 shows the
trace.

Exit status: 0 done; 1 done, but some inputs could not be used (they are named); 2 an error in
words; 75 ended by SIGTERM and saved; 130 ended by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from blipfast.errors import BlipfastError, ConfigError, Preempted

# Name -> what it is for. The module has the name of the subcommand.
COMMANDS = {
    "train": "pre-train or fine-tune on shards, by a recipe or your own YAML",
    "capfilt": "caption web images, filter both kinds of text, write new shards",
    "evaluate": "retrieval, captions, VQA, NLVR2, VisDial and clips by their protocols",
    "caption": "captions for images or folders of images",
    "match": "how well texts fit images",
    "search": "the pictures of a folder that fit a text",
    "serve": "a local page for all of that",
    "data": "data sets' own files to shards, and what is in shards",
    "convert": "a checkpoint to Hugging Face's or blipfast's format",
    "tune": "which tiles the Triton kernels run with on this card",
    "info": "what was found here, and which backend each operator uses, and why",
}
_EXAMPLES = """\
examples:
  blipfast info
  blipfast caption photos/ --checkpoint model_base_caption.pth --vocabulary vocab.txt
  blipfast match dog.jpg --text "a dog" --text "a cat" --checkpoint runs/filter/model
  blipfast train --config caption_coco --data.shards coco/ --model.checkpoint model_base.pth

`blipfast COMMAND --help` explains a command."""


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process of its own, which ends with its status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in COMMANDS:
        from blipfast.environment import keep_freed_memory

        keep_freed_memory()
    sys.exit(main(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()  # here, where a reader that went away can still be dealt with
        return status
    except BlipfastError as error:
        if _debugging():
            raise
        print(f"blipfast: error: {error}", file=sys.stderr)
        return 2
    except Preempted as told:
        print("blipfast: stopped by SIGTERM; what was done is saved", file=sys.stderr)
        return told.exit_code
    except KeyboardInterrupt:
        if _debugging():
            raise
        print("blipfast: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


def _debugging() -> bool:
    return os.environ.get("BLIPFAST_DEBUG", "") not in ("", "0")


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        from blipfast import __version__

        print(f"blipfast {__version__}")
        return 0
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(COMMANDS)}"
        raise ConfigError(f"no command {name!r}{hint}")
    return import_module(f"blipfast.cli.{name}").main(rest)


def _help() -> str:
    rows = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return f"usage: blipfast COMMAND ...\n\ncommands:\n{rows}\n\n{_EXAMPLES}"
