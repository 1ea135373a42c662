"""The main job from the command line: `python scripts/demo.py --help`."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from blipfast.demo.main_job import run_demo
from blipfast.demo.settings import DemoSettings
from blipfast.environment import keep_freed_memory
from blipfast.errors import BlipfastError


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Pre-train on noisy emoji scenes, bootstrap the texts, train again, compare.",
        epilog="example: python scripts/demo.py --minutes 30 --scale 2 --seed 1 --out outputs/long",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(DemoSettings):
        flag = "--" + field.name.replace("_", "-")
        about = field.metadata["help"]
        parser.add_argument(
            flag, type=type(field.default), default=field.default, help=about, metavar=""
        )
    keep_freed_memory()
    try:
        result = run_demo(DemoSettings(**vars(parser.parse_args())))
    except BlipfastError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; what is written so far is whole", file=sys.stderr)
        return 130
    print(result.page.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
