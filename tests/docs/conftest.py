"""What the documentation's code blocks find in their working directory: small, but all real."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from shards import tiny_bootstrap

from blipfast.checkpoints import save_hf, save_model
from blipfast.data import BlipTokenizer, Record, ShardWriter, TextEntry
from blipfast.models.config import blip_config
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.tasks.retrieval import BlipForRetrieval
from blipfast.tasks.vqa import BlipForVQA

VOCAB = Path(__file__).parents[1] / "fixtures" / "reference" / "vocab.txt"
ORIGINAL = VOCAB.parent / "caption" / "checkpoint.pth"


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def shards(folder: Path, name: str, source: str, count: int = 8) -> None:
    with ShardWriter(folder, name) as writer:
        for i in range(count):
            texts = (TextEntry(["a dog on a beach", "a cat", "two men"][i % 3], source),)
            writer.write(Record(f"{name}-{i}", picture(i), texts, 40, 40, {"image": i}))


def img2dataset(folder: Path) -> None:
    """As img2dataset leaves what it has downloaded."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for n in range(3):
            facts = {"url": f"http://x/{n}", "caption": f"web {n}", "sha256": f"{n:064d}"}
            for extension, content in (
                ("jpg", picture(n)), ("txt", f"web {n}".encode()),
                ("json", json.dumps(facts).encode()),
            ):  # fmt: skip
                info = tarfile.TarInfo(f"{n:09d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, pictures, shards and settings, by the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(VOCAB, folder / "vocab.txt")
    shutil.copy(ORIGINAL, folder / "original.pth")
    torch.manual_seed(0)
    config = blip_config("blip_tiny")
    models = {
        "caption-model": BlipForCaptioning(config),
        "retrieval-model": BlipForRetrieval(config),
        "vqa-model": BlipForVQA(config),
        "pretrained-model": BlipForPretraining(config, queue_size=8),
    }
    for name, model in models.items():
        save_model(model, folder / name)
        shutil.copy(VOCAB, folder / name / "vocab.txt")
    save_hf(models["caption-model"], folder / "hf-caption")
    BlipTokenizer.from_file(VOCAB).save_pretrained(folder / "hf-caption")
    for name in ("photos", "my_photos"):
        (folder / name).mkdir()
        several = [f"photo-{n}" for n in range(45)] if name == "my_photos" else []
        for i, what in enumerate(("dog", "cat", "beach", *several)):
            (folder / name / f"{what}.jpg").write_bytes(picture(i))
            if name == "my_photos":
                (folder / name / f"{what}.txt").write_text(f"a picture of a {what}\na {what}\n")
    shards(folder / "shards" / "web", "web", "web")
    for name in ("coco", "vg", "sbu", "cc12m"):
        shards(folder / "shards" / name, name, "human", 24)
    img2dataset(folder / "data" / "cc3m")
    for role in ("captioner", "filter"):
        name = {"captioner": "caption-model", "filter": "retrieval-model"}[role]
        shutil.copytree(folder / name, folder / "runs" / role / "model")
    shutil.copy(ORIGINAL, folder / "model_base_caption_capfilt_large.pth")
    shutil.copy(ORIGINAL.with_name("config.json"), folder)  # tiny files do not tell their heads
    (folder / "photo.jpg").write_bytes(picture(9))
    labels = [
        {"key": f"k{i}", "text": "a dog", "source": source, "itm": i / 10, "match": i % 3 != 1}
        for i in range(10)
        for source in ("web", "synthetic")
    ]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, labels)))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_bootstrap()))
    return folder


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory, with the project's own folders beside."""
    folder = tmp_path / "here"
    shutil.copytree(template, folder)
    root = Path(__file__).parents[2]
    for name in ("docs", "scripts"):
        os.symlink(root / name, folder / name)
    monkeypatch.chdir(folder)
    return folder
