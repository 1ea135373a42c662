"""Initialisation from published parts: an ImageNet ViT and a BERT (BLIP, section 4.1)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from blipfast.checkpoints.architecture import count
from blipfast.checkpoints.load import LoadReport, plan_load, read_into
from blipfast.checkpoints.mapping import LM_TRANSFORM, Tensors, text_entries, to_ours
from blipfast.checkpoints.rules import Transfer
from blipfast.checkpoints.source import open_weights, read_pth
from blipfast.errors import CheckpointError
from blipfast.models.blip import Blip
from blipfast.models.text import TextTransformer
from blipfast.models.vit import VisionTransformer

Weights = str | os.PathLike[str] | Mapping[str, Tensor]


def init_from_timm_vit(visual_encoder: VisionTransformer, source: Weights) -> LoadReport:
    """Loads a timm or DeiT ViT into the image encoder; positions are interpolated (section 4.2).

    source: a `.pth` or `.safetensors` file, a directory with `model.safetensors`, or a state dict.
    The classification head is left unused. Raises CheckpointError when anything else does not fit.
    """
    tensors, where = _weights(source)
    rules = Transfer(unused=("classification head",))
    plan = plan_load(tensors, visual_encoder, rules, LoadReport(where, "timm ViT", "image encoder"))
    read_into(plan, tensors, visual_encoder)
    return plan.report


def init_text_from_bert(
    model: Blip, directory: Weights, *, rows: Sequence[int] | Tensor | None = None
) -> LoadReport:
    """Loads a BERT into the text encoder and into the parts of the decoder that are its own.

    directory: of a Hugging Face BERT (`model.safetensors`), or its state dict.
    rows: for each entry of a reduced vocabulary its row in BERT's, without the added [DEC] and
    [ENC]. Those two rows, cross-attention and what else BERT lacks stay as they are.

    BLIP has no token types. BERT always adds one; type 0 is added to the positions, which leaves
    every embedded text as BERT has it. The word table would do too, but it is the output embedding.
    Raises CheckpointError when anything else does not fit. A momentum twin follows the model.
    """
    stored, where = _weights(directory)
    bert = _as_bert(stored)
    depth = count(bert.shapes, "encoder.layer.")
    tensors = to_ours(bert, [*text_entries(depth, cross=None), *LM_TRANSFORM])
    report = LoadReport(where, "BERT", "text side")
    for part in ("text_encoder", "text_decoder", "caption_encoder"):
        text = getattr(model, part, None)
        if text is not None:
            _init_text(part, text, tensors, rows, report)
    if getattr(model, "twin", None) is not None:
        model.twin.copy_from(model)  # type: ignore[union-attr, operator]
    return report


def _init_text(
    part: str,
    text: TextTransformer,
    tensors: Tensors,
    rows: Sequence[int] | Tensor | None,
    report: LoadReport,
) -> None:
    fitted = _fit_embeddings(tensors, text, rows, report.source)
    rules = Transfer(
        unused=("BERT's heads", "token types", "position ids"), fresh=("what BERT lacks",)
    )
    plan = plan_load(fitted, text, rules, LoadReport(report.source, report.source_task, part))
    read_into(plan, fitted, text)
    report.loaded += [f"{part}.{name}" for name in plan.report.loaded]
    report.unused = plan.report.unused
    names = [f"{part}.{name}" for names in plan.report.fresh.values() for name in names]
    fresh = report.fresh.setdefault("what BERT lacks", [])
    fresh += [*names, f"{part}.embeddings.word.weight[-2:] ([DEC] and [ENC])"]


def _fit_embeddings(
    tensors: Tensors, text: TextTransformer, rows: Sequence[int] | Tensor | None, where: str
) -> Tensors:
    """BERT's embedding tables (and output bias) brought to the model's vocabulary and positions."""
    names = ("embeddings.word.weight", "embeddings.position.weight")
    if missing := [name for name in names if name not in tensors.shapes]:
        raise CheckpointError(f"{where} is no BERT: it lacks {', '.join(missing)}")
    word, position = (tensors.read(name) for name in names)
    index = torch.arange(word.shape[0]) if rows is None else torch.as_tensor(rows)
    wanted = text.config.vocab_size - 2
    if index.shape != (wanted,) or bool(((index < 0) | (index >= word.shape[0])).any()):
        raise CheckpointError(
            f"the model has {wanted} words beside [DEC] and [ENC], {where} gives {index.numel()} "
            f"of {word.shape[0]}: pass rows=, for each of the model's words its row in BERT"
        )
    if position.shape[0] < text.config.max_positions:
        raise CheckpointError(
            f"the model has {text.config.max_positions} positions, {where} {position.shape[0]}"
        )
    position = position[: text.config.max_positions]
    types = "embeddings.token_type_embeddings.weight"
    if types in tensors.shapes:
        position = position + tensors.read(types)[0]
    added = text.embeddings.word.weight.detach()[-2:].to(word)
    ready = {names[0]: torch.cat([word[index], added]), names[1]: position}
    bias = "lm_head.decoder.bias"
    if bias in tensors.shapes:
        ready[bias] = torch.cat([tensors.read(bias)[index], word.new_zeros(2)])
    shapes = {**tensors.shapes, **{name: tuple(t.shape) for name, t in ready.items()}}
    return Tensors(
        shapes,
        tensors.dtypes,
        lambda name: ready[name] if name in ready else tensors.read(name),
    )


def _as_bert(stored: Tensors) -> Tensors:
    """Without the prefix that BERT's task models have, LayerNorms named as they are today."""
    names = {}
    for name in stored.shapes:
        short = name.removeprefix("bert.")
        names[short.replace(".gamma", ".weight").replace(".beta", ".bias")] = name
    return Tensors(
        {short: stored.shapes[name] for short, name in names.items()},
        {short: stored.dtypes[name] for short, name in names.items()},
        lambda short: stored.read(names[short]),
    )


def _weights(source: Weights) -> tuple[Tensors, str]:
    if isinstance(source, Mapping):
        return Tensors.of(source), "the state dict"
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    if path.is_dir() or path.suffix == ".safetensors":
        return open_weights(path), str(path)
    return Tensors.of(read_pth(path)), str(path)
