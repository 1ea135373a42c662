"""Opens a checkpoint: the original's .pth, a transformers directory or our own, as one thing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blipfast.checkpoints.architecture import (
    config_of_hf,
    config_of_original,
    count,
    read_json,
)
from blipfast.checkpoints.mapping import Tensors, layout, to_ours
from blipfast.checkpoints.rules import task_of_names
from blipfast.errors import CheckpointError
from blipfast.models.config import BlipConfig

FORMAT = "blipfast"
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_HF_TASKS = {
    "BlipForConditionalGeneration": "caption",
    "BlipForQuestionAnswering": "vqa",
    "BlipForImageTextRetrieval": "retrieval",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint under our names.

    kind: "original", "hf" or "blipfast". options: the model options it was saved with.
    """

    where: str
    kind: str
    task: str
    tensors: Tensors
    config: BlipConfig
    options: dict[str, Any] = field(default_factory=dict)


def open_source(
    source: str | os.PathLike[str] | Mapping[str, Tensor], config: BlipConfig | None = None
) -> Source:
    """Opens a .pth file, a directory, or an original state dict in memory; reads no weights yet.

    config: instead of what the checkpoint says or its shapes tell.
    Raises CheckpointError when there is nothing, or nothing that is understood.
    """
    if isinstance(source, Mapping):
        return original_source(Tensors.of(source), config, None, "the state dict")
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    if path.is_file():
        return _open_file(path, config)
    values = read_json(path / CONFIG)
    if values.get("format") == FORMAT:
        return _open_own(path, values, config)
    return _open_hf(path, values, config)


def _open_file(path: Path, config: BlipConfig | None) -> Source:
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is one file of a checkpoint: give its directory, {path.parent}"
        )
    sidecar = path.with_name(CONFIG)
    values = read_json(sidecar) if config is None and sidecar.exists() else None
    return original_source(Tensors.of(read_pth(path)), config, values, str(path))


def read_pth(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pth file, plain or under "model"; no code in it is run.

    Raises CheckpointError when the file is damaged or holds something else.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # unpicklers raise many kinds on damaged data
        raise CheckpointError(f"{path} is damaged or no torch checkpoint: {error}") from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path} holds no state dict (a dict of tensors, or one under 'model')"
        )
    return state


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def original_source(
    tensors: Tensors, config: BlipConfig | None, sidecar: dict[str, Any] | None, where: str
) -> Source:
    """A checkpoint under the original's names."""
    if config is None:
        config = config_of_original(tensors.shapes, sidecar, where)
    ours = _named_as_ours("original", tensors, where)
    return Source(where, "original", task_of_names(ours.shapes), ours, config)


def _named_as_ours(kind: Any, tensors: Tensors, where: str) -> Tensors:
    shapes = tensors.shapes
    blocks = "vision_model.encoder.layers." if kind == "hf" else "visual_encoder.blocks."
    entries = layout(
        kind,
        vision_depth=count(shapes, blocks),
        text_depth=max(
            count(shapes, f"{part}encoder.layer.")
            for part in ("text_encoder.", "text_decoder.bert.")
        ),
        paired=any(".crossattention.self0." in name for name in shapes),
    )
    try:
        return to_ours(tensors, entries)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _open_hf(path: Path, values: dict[str, Any], config: BlipConfig | None) -> Source:
    config = config or config_of_hf(path)
    architectures = values.get("architectures") or ["(none named)"]
    if architectures[0] not in _HF_TASKS:
        raise CheckpointError(
            f"{path} holds a {architectures[0]}; blipfast reads {', '.join(_HF_TASKS)}"
        )
    ours = _named_as_ours("hf", open_weights(path), str(path))
    smoothing = values.get("text_config", {}).get("label_smoothing")
    scorer = architectures[0] == "BlipForImageTextRetrieval"
    options = {} if scorer or smoothing is None else {"label_smoothing": smoothing}
    return Source(str(path), "hf", _HF_TASKS[architectures[0]], ours, config, options)


def _open_own(path: Path, values: dict[str, Any], config: BlipConfig | None) -> Source:
    try:
        version, task, model = values["version"], values["task"], values["model"]
        ties: dict[str, str] = values.get("ties", {})
    except KeyError as error:
        raise CheckpointError(f"{path / CONFIG} lacks {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this blipfast reads {FORMAT_VERSION}: "
            "use the version of blipfast that wrote it, or newer"
        )
    stored = open_weights(path)
    if lost := [name for name in ties.values() if name not in stored.shapes]:
        raise CheckpointError(f"{path / WEIGHTS} lacks {', '.join(lost)}")
    tensors = Tensors(
        {**stored.shapes, **{alias: stored.shapes[name] for alias, name in ties.items()}},
        {**stored.dtypes, **{alias: stored.dtypes[name] for alias, name in ties.items()}},
        lambda name: stored.read(ties.get(name, name)),
    )
    config = config or BlipConfig.from_dict(model)
    return Source(str(path), "blipfast", task, tensors, config, values.get("options", {}))


def open_weights(directory: Path) -> Tensors:
    """The tensors of a directory's `model.safetensors`, its sharded form, or `pytorch_model.bin`.

    Also of one safetensors file. Raises CheckpointError when none is there or one is damaged.
    """
    if directory.is_file():
        return _open_safetensors([directory])
    index, single, pickled = (
        directory / name for name in (f"{WEIGHTS}.index.json", WEIGHTS, "pytorch_model.bin")
    )
    if single.exists():
        return _open_safetensors([single])
    if index.exists():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        return _open_safetensors([directory / shard for shard in shards])
    if pickled.exists():
        return Tensors.of(read_pth(pickled))
    raise CheckpointError(f"{directory} holds no {WEIGHTS}")


def _open_safetensors(paths: list[Path]) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    file_of: dict[str, Any] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is missing or damaged: {error}") from error
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            shapes[name] = tuple(part.get_shape())
            dtypes[name] = _DTYPES.get(part.get_dtype(), torch.float32)
            file_of[name] = file
    return Tensors(shapes, dtypes, lambda name: file_of[name].get_tensor(name))
