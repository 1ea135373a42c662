"""The web set and the models that the tests of CapFilt share."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from web_set import VOCAB, record, sharpened

from blipfast.checkpoints import save_model
from blipfast.data import BlipTokenizer, ShardWriter
from blipfast.models.config import blip_config
from blipfast.tasks.pretrain import BlipForPretraining


@pytest.fixture(scope="session")
def models():
    return *sharpened(0), BlipTokenizer.from_file(VOCAB)


@pytest.fixture(scope="session")
def checkpoints(models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two captioners and two filters, each with its vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    other = sharpened(1)
    found = {"captioner": models[0], "filter": models[1]}
    found |= {"captioner2": other[0], "filter2": other[1]}
    found["pretrained"] = BlipForPretraining(blip_config("blip_tiny"), queue_size=8)
    for name, model in found.items():
        save_model(model, folder / name)
        shutil.copy(VOCAB, folder / name / "vocab.txt")
    return {name: str(folder / name) for name in found}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "web"
    with ShardWriter(folder, "web", max_count=5) as writer:
        for i in range(12):
            writer.write(record(i, ["a dog", "a cat on a mat", "two men"][i % 3]))
    return folder
