"""Rounds of bootstrapping: fine-tune captioner and filter, CapFilt, train anew (section 3.3).

Each round starts from the model of the one before. Stages leave what they made in folders of their
own, and a stage whose folder is whole is not done again; one that was broken off goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blipfast.capfilt.config import CapFiltConfig
from blipfast.capfilt.run import run_capfilt
from blipfast.errors import ConfigError
from blipfast.train.config import TaskName, TrainConfig, described
from blipfast.train.ranks import rank
from blipfast.train.recipes import run_training


@dataclass(frozen=True)
class BootstrapConfig:
    """The learning framework of the paper (section 3.3), any number of times.

    captioner, filter, shared, pretrain: how each model is trained; their checkpoint, shards,
    vocabulary and output are filled in. capfilt: the same of CapFilt.
    With `rounds: 0` there is no CapFilt: a model is trained on the web texts as they are, which is
    what bootstrapping is compared with.
    Raises ConfigError for what does not go together.
    """

    pretrained: str = described("", "the pre-trained model to start from")
    web: str = described("", "shards of noisy pairs")
    human: str = described("", "shards of human-written texts")
    vocabulary: str | None = described(None, "vocab.txt; by default the one beside the model")
    output: str = described("runs/bootstrap", "folder for all rounds")
    rounds: int = described(1, "times that the set is bootstrapped; 0 trains on the web texts")
    models: Literal["decoupled", "shared"] = described(
        "decoupled", "captioner and filter fine-tuned apart, or one model for both (section 4.4)"
    )
    start: Literal["fresh", "continued"] = described(
        "fresh", "the model of a round is new, or goes on from the one before (section 6)"
    )
    captioner: TrainConfig = field(default_factory=TrainConfig)
    filter: TrainConfig = field(default_factory=TrainConfig)
    shared: TrainConfig = field(default_factory=TrainConfig)
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    capfilt: CapFiltConfig = field(default_factory=CapFiltConfig)

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ConfigError(f"rounds is {self.rounds}; it must be at least 0")

    def check(self) -> None:
        """Raises ConfigError for what a run needs and is not given."""
        for name in ("web", "human") + (("pretrained",) if self._needs_model else ()):
            if not getattr(self, name):
                raise ConfigError(f"{name} is not given")
        tasks: dict[str, TaskName] = {"pretrain": "pretrain"}
        if self.rounds and self.models == "shared":
            tasks["shared"] = "pretrain"
        elif self.rounds:
            tasks |= {"captioner": "caption", "filter": "retrieval"}
        for name, task in tasks.items():
            found = getattr(self, name).task
            if found != task:
                raise ConfigError(f"{name}.task is {found}, it must be {task}")

    @property
    def _needs_model(self) -> bool:
        return self.rounds > 0 or self.start == "continued"


def run_bootstrap(config: BootstrapConfig, say: Callable[[str], None] = print) -> list[Path]:
    """All rounds; returns the models that were trained, one for each round.

    say: told each stage. Raises as `run_training` and `run_capfilt` do.
    """
    config.check()
    job = _Job(config, say if rank() == 0 else lambda text: None)
    if config.rounds == 0:
        sets = {config.web: 1.0, config.human: 1.0}
        return [job.train("model", config.pretrain, job.first, mix=sets)]
    models: list[Path] = []
    for number in range(1, config.rounds + 1):
        models.append(job.round(number, models[-1] if models else Path(config.pretrained)))
    return models


def run_finetune(config: BootstrapConfig, say: Callable[[str], None] = print) -> tuple[Path, Path]:
    """The first stage of the first round alone: captioner and filter, which may be one model."""
    config.check()
    job = _Job(config, say if rank() == 0 else lambda text: None)
    return job.writers("round-1", Path(config.pretrained))


class _Job:
    def __init__(self, config: BootstrapConfig, say: Callable[[str], None]) -> None:
        self.config, self.say, self.output = config, say, Path(config.output)
        self.first = Path(config.pretrained) if config.start == "continued" else None

    def round(self, number: int, model: Path) -> Path:
        """One round, from a model to the next."""
        name, config = f"round-{number}", self.config
        captioner, judge = self.writers(name, model)
        shards = self.output / name / "shards"
        self.say(f"{name}: caption and filter the web texts")
        report = run_capfilt(
            dataclasses.replace(
                config.capfilt,
                input=config.web,
                output=str(shards),
                captioners=(str(captioner),),
                filters=(str(judge),),
                vocabulary=config.vocabulary,
                human=(config.human,),
                seed=config.capfilt.seed + number - 1,
            )
        )
        self.say(f"{name}: {report.kept} of {report.images} web images kept")
        start = model if config.start == "continued" else None
        return self.train(f"{name}/model", config.pretrain, start, str(shards))

    def writers(self, name: str, model: Path) -> tuple[Path, Path]:
        """Captioner and filter of a round, fine-tuned on the human-written texts."""
        config = self.config
        if config.models == "shared":
            both = self.train(f"{name}/shared", config.shared, model, config.human)
            return both, both
        return (
            self.train(f"{name}/captioner", config.captioner, model, config.human),
            self.train(f"{name}/filter", config.filter, model, config.human),
        )

    def train(
        self,
        name: str,
        recipe: TrainConfig,
        checkpoint: Path | None,
        shards: str = "",
        mix: dict[str, float] | None = None,
    ) -> Path:
        """Trains a model, unless it is there; returns its folder."""
        output = self.output / name
        found = output / "model"
        if (found / "vocab.txt").is_file():  # what a training writes last
            self.say(f"{name}: done before")
            return found
        self.say(f"{name}: train")
        model, data = recipe.model, recipe.data
        if checkpoint is not None:
            model = dataclasses.replace(
                model, checkpoint=str(checkpoint), image_weights=None, text_weights=None
            )
        vocabulary = self.config.vocabulary
        if vocabulary is None and self.config.pretrained:
            vocabulary = _vocabulary_beside(Path(self.config.pretrained))
        data = dataclasses.replace(data, shards=shards, mix=mix, vocabulary=vocabulary)
        run_training(
            dataclasses.replace(recipe, model=model, data=data, output=str(output), resume=True)
        )
        return found


def _vocabulary_beside(checkpoint: Path) -> str | None:
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return str(folder / "vocab.txt") if (folder / "vocab.txt").is_file() else None


def packaged_bootstraps() -> dict[str, Path]:
    """The settings that come with the package, by name: the paper's, and its ablations."""
    folder = Path(__file__).parents[1] / "configs" / "bootstrap"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
