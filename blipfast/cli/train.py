"""`blipfast train`: one run from a recipe, a YAML file or dotted options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blipfast.cli._parsing import add_dataclass, make_parser, parse_as
from blipfast.train.config import TrainConfig, packaged_configs

_EXAMPLES = """\
  # the paper's pre-training, on your shards
  blipfast train --config pretrain --data.shards 'shards/*.tar' --data.vocabulary vocab.txt

  # fine-tune a captioner at a smaller learning rate, 1,000 steps only
  blipfast train --config caption_coco --data.shards coco/ --model.checkpoint model_base.pth \\
      --data.vocabulary vocab.txt --fit.learning_rate 5e-6 --fit.steps 1000

  # how much memory a step needs and how long the run is, without starting it
  blipfast train --config pretrain_14m --data.vocabulary vocab.txt --dry_run true

  # eight cards of this machine; it goes on by itself when a rank dies
  torchrun --nproc-per-node 8 --max-restarts 3 -m blipfast.cli train --config pretrain_14m ...

  # go on after Ctrl-C
  blipfast train --config caption_coco ... --resume true

  # write the settings of a recipe to a file of your own
  blipfast train --config retrieval_coco --print_config > mine.yaml"""


def main(argv: Sequence[str]) -> int:
    parser = make_parser(
        "train",
        "Pre-train or fine-tune. Recipes for --config: " + ", ".join(packaged_configs()) + ".",
        _EXAMPLES,
        usage="blipfast train [--config RECIPE_OR_FILE] [--GROUP.OPTION VALUE ...]",
    )
    add_dataclass(parser, TrainConfig)
    config = parse_as(TrainConfig, parser, argv, packaged_configs())
    # After the arguments: their errors and help should not wait for torch.
    from blipfast.train.recipes import run_training

    run_training(config)
    if config.dry_run:
        return 0
    print(Path(config.output) / "model")
    return 0
