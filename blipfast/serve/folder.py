"""A folder of pictures: found, read in batches, and searched by text.

What a search needs of each picture are its features, a few hundred numbers. They may be kept in a
file, so that the next search encodes new and changed pictures only.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blipfast.checkpoints import model_hash
from blipfast.data import BlipTokenizer, EvalTransform, load_image
from blipfast.data.records import IMAGE_EXTENSIONS
from blipfast.errors import ConfigError, DataError
from blipfast.models.blip import PackedText
from blipfast.tasks.retrieval import BlipForRetrieval

Failed = Callable[[DataError], None]


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The files given, and the image files in the folders given and below them, in order.

    Raises DataError for a path that is not there and for a folder without images.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(
                p
                for p in path.rglob("*")
                if p.is_file() and p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
            )
            if not inside:
                kinds = ", ".join(IMAGE_EXTENSIONS)
                raise DataError(f"{path}: no images in this folder (looked for {kinds})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: there is no such file or folder")
    return found


class ImageBatches:
    """Batches of `(paths, pixel_values)` from files, upright, without those that cannot be read.

    on_failed: told of each that is. failed: how many were. on_read: told of each file.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        image_size: int,
        batch_size: int,
        on_failed: Failed,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        self.paths, self.batch_size = paths, batch_size
        self.transform = EvalTransform(image_size, apply_orientation=True)
        self.on_failed, self.on_read = on_failed, on_read
        self.failed = 0

    def __iter__(self) -> Iterator[tuple[list[Path], Tensor]]:
        names: list[Path] = []
        pixels: list[Tensor] = []
        for path in self.paths:
            self.on_read()
            try:
                pixels.append(self.transform(path))
            except DataError as error:
                self.failed += 1
                self.on_failed(error)
                continue
            names.append(path)
            if len(names) == self.batch_size:
                yield names, torch.stack(pixels)
                names, pixels = [], []
        if names:
            yield names, torch.stack(pixels)


def load_thumbnail(path: Path, side: int = 512) -> Image.Image:
    """A picture, upright, at most `side` pixels wide and high. Raises DataError as `load_image`."""
    image = load_image(path, apply_orientation=True)
    image.thumbnail((side, side))
    return image


@dataclass(frozen=True)
class Found:
    """A picture that a text has found. itm: probability of a match. itc: cosine similarity."""

    path: Path
    itm: float
    itc: float


class FolderIndex:
    """Pictures and their features `(N, E)`, unit vectors, in the order of their paths."""

    def __init__(self, paths: list[Path], features: Tensor) -> None:
        self.paths, self.features = paths, features

    @classmethod
    @torch.inference_mode()
    def build(
        cls,
        paths: Sequence[Path],
        model: BlipForRetrieval,
        *,
        batch_size: int = 8,
        file: Path | None = None,
        on_failed: Failed = lambda error: None,
        on_read: Callable[[], None] = lambda: None,
    ) -> FolderIndex:
        """Encodes pictures, but for those that `file` has of the same model, unchanged since.

        file: read if it is there, and written when there is something new. What it has of pictures
            elsewhere stays in it.
        on_failed, on_read: as of `ImageBatches`; what is in the file is not read.
        Raises DataError when no picture can be read, or the file cannot be written.
        """
        device = next(model.parameters()).device
        size = model.config.vision.image_size
        made_by = _made_by(model) if file is not None else {}
        known = _read(file, made_by) if file is not None else {}
        stamps = {path: _stamp(path) for path in paths}
        rows = {path: known[stamps[path]] for path in paths if stamps[path] in known}
        todo = [path for path in paths if path not in rows]
        for names, pixels in ImageBatches(todo, size, batch_size, on_failed, on_read):
            features = model.image_features(model.encode_image(pixels.to(device), first_only=True))
            rows |= dict(zip(names, features.float().cpu(), strict=True))
        if not rows:
            raise DataError("none of the pictures can be read")
        order = [path for path in paths if path in rows]
        index = cls(order, torch.stack([rows[path] for path in order]))
        if file is not None:
            kept = {stamps[path]: rows[path] for path in order}
            here = {str(path.resolve()) for path in paths}
            kept |= {s: row for s, row in known.items() if _elsewhere(s, here)}
            if kept.keys() != known.keys():
                _write(file, made_by, kept)
        return index

    @torch.inference_mode()
    def search(
        self,
        model: BlipForRetrieval,
        tokenizer: BlipTokenizer,
        texts: Sequence[str],
        *,
        count: int = 10,
        candidates: int = 16,
        batch_size: int = 8,
    ) -> list[list[Found]]:
        """For each text its best pictures, best first: by ITC, the first ones re-ranked by ITM.

        candidates: how many are encoded anew and re-ranked by ITM logit plus cosine, as in the
        paper's retrieval (section 5.1). A picture that has gone since is left out.
        """
        device = next(model.parameters()).device
        batch = tokenizer(list(texts), max_length=35).to(device)
        packed = PackedText.from_padded(batch.input_ids, batch.attention_mask)
        with torch.autocast(device.type, enabled=False):  # bf16 would make ties of them
            cosines = model.text_features(packed).float().cpu() @ self.features.T
        results = []
        for number, row in enumerate(cosines):
            best = row.topk(min(max(count, candidates), len(self.paths))).indices.tolist()
            paths = [self.paths[i] for i in best]
            itc = dict(zip(paths, row[best].tolist(), strict=True))
            ranked: list[tuple[float, Found]] = []
            for names, pixels in ImageBatches(
                paths, model.config.vision.image_size, batch_size, lambda error: None
            ):
                states = model.image_states(model.encode_image(pixels.to(device)))
                text = packed.select([number] * len(names))
                logits = model.match(text, states, range(len(names))).float().cpu()
                for path, logit, itm in zip(
                    names, logits[:, 1].tolist(), logits.softmax(-1)[:, 1].tolist(), strict=True
                ):
                    ranked.append((logit + itc[path], Found(path, itm, itc[path])))
            ranked.sort(key=lambda pair: -pair[0])
            results.append([found for _, found in ranked[:count]])
        return results


def _stamp(path: Path) -> str:
    """What a picture is known by: where it lies, how large it is, and when it was written."""
    try:
        status = os.stat(path)
    except OSError:
        return f"{path.resolve()}|gone"
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def _elsewhere(stamp: str, here: set[str]) -> bool:
    """Whether a stamp is that of a picture not among those here, and still unchanged."""
    path = stamp.rsplit("|", 2)[0]
    return path not in here and _stamp(Path(path)) == stamp


def _made_by(model: BlipForRetrieval) -> dict[str, str]:
    """What features depend on beside the pictures."""
    device = next(model.parameters()).device.type
    casts = torch.is_autocast_enabled(device)
    return {
        "format": "2",  # of this file, and of how pictures are read: upright
        "model": model_hash(model),
        "image_size": str(model.config.vision.image_size),
        "autocast": str(torch.get_autocast_dtype(device)) if casts else "off",
    }


def _read(file: Path, made_by: dict[str, str]) -> dict[str, Tensor]:
    """Features by stamp; none from a file that is not there, damaged, or made by something else."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            if any(about.get(name) != value for name, value in made_by.items()):
                return {}
            features = opened.get_tensor("features")
            return dict(zip(json.loads(about["pictures"]), features, strict=True))
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}


def _write(file: Path, made_by: dict[str, str], features: dict[str, Tensor]) -> None:
    about = {**made_by, "pictures": json.dumps(list(features))}
    temporary = file.with_name(f".{file.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        save_file({"features": torch.stack(list(features.values()))}, temporary, about)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write the index {file}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
