"""Writes checkpoints: our own format, transformers', and from one to the other.

A checkpoint is a directory. It is written under a temporary name beside the target, which it takes
only when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from blipfast.checkpoints.architecture import hf_config
from blipfast.checkpoints.load import LoadReport, load_model, tie_groups
from blipfast.checkpoints.mapping import Entry, layout, to_foreign
from blipfast.checkpoints.rules import task_of_model
from blipfast.checkpoints.source import CONFIG, FORMAT, FORMAT_VERSION, WEIGHTS
from blipfast.data.images import IMAGE_MEAN, IMAGE_STD
from blipfast.errors import CheckpointError, ConfigError
from blipfast.models.blip import Blip

PREPROCESSOR = "preprocessor_config.json"
_ARCHITECTURES = {
    "caption": "BlipForConditionalGeneration",
    "vqa": "BlipForQuestionAnswering",
    "retrieval": "BlipForImageTextRetrieval",
}
_OPTIONS = {  # arguments of the tasks' classes, kept as attributes of the same name
    "pretrain": ("momentum", "exclude_equal_ids", "label_smoothing"),
    "retrieval": ("momentum", "negatives_from_all_ranks"),
    "caption": ("label_smoothing",),
    "vqa": ("label_smoothing",),
}


def save_model(model: Blip, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes `model.safetensors` and `config.json`, which `load_model` reads back bit by bit.

    Raises CheckpointError when the directory exists and `overwrite` is false, or when writing fails
    (a full disk); what was there before is then unharmed.
    """
    task = task_of_model(model)
    tensors, ties = _stored(model)
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "task": task,
        "model": model.config.to_dict(),
        "options": _options(model, task),
        "ties": ties,
    }

    def write(temporary: Path) -> None:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        _write_json(temporary / CONFIG, config)

    return _write_directory(Path(directory), write, overwrite)


def save_hf(
    model: Blip,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a directory for the `from_pretrained` of transformers' class for the model's task.

    Those are BlipForConditionalGeneration (caption), BlipForQuestionAnswering (vqa) and
    BlipForImageTextRetrieval (retrieval, without training state and temperature).
    tokenizer: anything with `save_pretrained(directory)`, such as a `BlipTokenizer`, written along:
    then `BlipProcessor.from_pretrained` reads the directory too.
    Raises CheckpointError for other tasks, and as `save_model`.
    """
    task = task_of_model(model)
    if task not in _ARCHITECTURES:
        raise CheckpointError(
            f"transformers has no class for a {task!r} model; save it with save_model, or load it "
            f"as one of {', '.join(_ARCHITECTURES)} first"
        )
    widths = (model.config.vision.hidden_size, model.config.text.hidden_size)
    if task == "vqa" and widths[0] != widths[1]:
        raise CheckpointError(
            f"transformers' answer decoder must be as wide as the image encoder, this model has "
            f"widths {widths[1]} and {widths[0]}; save it with save_model"
        )
    smoothing = getattr(model, "label_smoothing", 0.0)
    config = hf_config(model.config, _ARCHITECTURES[task], smoothing)
    config["dtype"] = str(model.visual_encoder.cls_token.dtype).removeprefix("torch.")
    tensors = hf_state_dict(model)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        _write_json(temporary / CONFIG, config)
        _write_json(temporary / PREPROCESSOR, _image_processor(model.config.vision.image_size))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))

    return _write_directory(Path(directory), write, overwrite)


def _image_processor(size: int) -> dict[str, Any]:
    """The settings of transformers' BlipImageProcessor that equal `EvalTransform(size)`."""
    return {
        "processor_class": "BlipProcessor",
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def hf_state_dict(model: Blip) -> dict[str, Tensor]:
    """The model's tensors under transformers' names, each stored once."""
    tensors, _ = _stored(model)
    kept = {
        n: t for n, t in tensors.items() if not n.startswith(("twin.", "queue.")) and n != "temp"
    }
    foreign = to_foreign(kept, layout_of("hf", model), with_copies=False)
    return {name: tensor.contiguous() for name, tensor in foreign.items()}


def original_state_dict(model: Blip) -> dict[str, Tensor]:
    """The model's tensors under the original's names, tied ones repeated.

    A momentum twin lacks the cross-attention that the original's has and never uses.
    """
    return to_foreign(model.state_dict(), layout_of("original", model))


def layout_of(kind: Literal["original", "hf"], model: Blip) -> list[Entry]:
    """The table of names that fits `model`."""
    task, config = task_of_model(model), model.config
    entries = layout(
        kind,
        vision_depth=config.vision.num_layers,
        text_depth=config.text.num_layers,
        paired=task == "nlvr",
    )
    pointer = "queue_ptr" if task == "pretrain" else "ptr_queue"
    return [e for e in entries if e.ours != "queue.ptr" or e.foreign == (pointer,)]


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: Literal["hf", "blipfast"],
    task: str | None = None,
    *,
    overwrite: bool = False,
    **load_options: Any,
) -> LoadReport:
    """Reads any checkpoint that `load_model` reads and writes it in another format.

    task: what to make of it, by default the checkpoint's own. Returns the report of the loading.
    Raises ConfigError for an unknown format, CheckpointError as `load_model` and `save_model`.
    """
    if to not in ("hf", "blipfast"):
        raise ConfigError(f"no format {to!r}; there are 'hf' and 'blipfast'")
    model, report = load_model(src, task, return_report=True, **load_options)
    if to == "hf":
        save_hf(model, dst, overwrite=overwrite)
    else:
        save_model(model, dst, overwrite=overwrite)
    return report


def _stored(model: Blip) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under its first name, and the other names of tied ones."""
    state = model.state_dict()
    tensors, ties = {}, {}
    for names, _ in tie_groups(model):
        tensors[names[0]] = state[names[0]].contiguous()
        ties.update(dict.fromkeys(names[1:], names[0]))
    return tensors, ties


def _options(model: Any, task: str) -> dict[str, Any]:
    options = {name: getattr(model, name) for name in _OPTIONS.get(task, ())}
    if task == "retrieval":
        options["train_state"] = model.queue is not None
    if getattr(model, "queue", None) is not None:
        options["queue_size"] = model.queue.image_queue.shape[0]
    return options


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_directory(target: Path, write: Callable[[Path], None], overwrite: bool) -> Path:
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists already: choose another, or pass overwrite=True")
    if target.exists() and not (target / CONFIG).is_file():
        raise CheckpointError(f"{target} is no checkpoint, so it is not overwritten")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o777 & ~_umask())
        write(temporary)
        _put_in_place(temporary, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {_reason(error)}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.rename(old)  # onto an empty directory, which a rename replaces
        temporary.rename(target)
    except BaseException:  # Ctrl-C between the two renames included
        if not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _reason(error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        return "the disk is full; free some space or choose another folder"
    return str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def model_hash(model: nn.Module) -> str:
    """Sixteen hex digits that name a model's weights: equal weights, equal hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
