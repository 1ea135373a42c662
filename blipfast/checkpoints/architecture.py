"""The model configuration of a foreign checkpoint: from its tensors' shapes and a config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipfast.errors import CheckpointError, ConfigError
from blipfast.models.config import BlipConfig, TextConfig, VisionConfig, blip_config

# Shapes do not tell the number of heads; these are the widths of the published models.
_HEADS = {768: 12, 1024: 16}
_DROP_PATH = {1024: 0.1}  # ViT-L is trained with stochastic depth
# What transformers' configuration has no field for; `save_hf` writes it beside the rest.
HF_EXTRA = "blipfast"

Shapes = Mapping[str, tuple[int, ...]]


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError when the file is missing, damaged or no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return values


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules there are under `prefix`."""
    numbers = [n[len(prefix) :].split(".")[0] for n in shapes if n.startswith(prefix)]
    return 1 + max((int(n) for n in numbers), default=-1)


def config_of_original(shapes: Shapes, sidecar: dict[str, Any] | None, where: str) -> BlipConfig:
    """The configuration of one of the original's files, by its own tensor names.

    sidecar: a config.json beside the file, either our `BlipConfig.to_dict()` or the original's
    terms (`vit`, `med_config` or `bert_config`, `tokens`). Raises CheckpointError when the shapes
    do not tell everything and there is none.
    """
    sidecar = sidecar or {}
    if "vision" in sidecar and "text" in sidecar:
        return BlipConfig.from_dict(sidecar)
    vit = sidecar.get("vit", {})
    bert = sidecar.get("med_config") or sidecar.get("bert_config") or {}
    text_part = "text_encoder." if _has(shapes, "text_encoder.") else "text_decoder.bert."
    needed = ("visual_encoder.cls_token", f"{text_part}embeddings.word_embeddings.weight")
    if missing := [name for name in needed if name not in shapes]:
        raise CheckpointError(f"{where} is no BLIP checkpoint: it lacks {', '.join(missing)}")
    vision = _vision_of_shapes(shapes, vit, where)
    text = _text_of_shapes(shapes, text_part, bert, sidecar.get("tokens", {}), where)
    embed_dim = shapes["vision_proj.weight"][0] if "vision_proj.weight" in shapes else None
    return BlipConfig(vision, text, embed_dim or BlipConfig.embed_dim)


def _has(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)


def _vision_of_shapes(shapes: Shapes, vit: dict[str, Any], where: str) -> VisionConfig:
    width = shapes["visual_encoder.cls_token"][-1]
    patch = shapes["visual_encoder.patch_embed.proj.weight"][-1]
    grid = math.isqrt(shapes["visual_encoder.pos_embed"][1] - 1)
    return VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        hidden_size=width,
        num_layers=count(shapes, "visual_encoder.blocks."),
        num_heads=vit.get("num_heads") or _guess_heads("image encoder", width, where),
        mlp_ratio=shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0] / width,
        layer_norm_eps=vit.get("norm_eps", VisionConfig.layer_norm_eps),
        drop_path_rate=vit.get("drop_path_rate", _DROP_PATH.get(width, 0.0)),
    )


def _text_of_shapes(
    shapes: Shapes, part: str, bert: dict[str, Any], tokens: dict[str, int], where: str
) -> TextConfig:
    vocab_size, width = shapes[f"{part}embeddings.word_embeddings.weight"]
    default = TextConfig
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_layers=count(shapes, f"{part}encoder.layer."),
        num_heads=bert.get("num_attention_heads") or _guess_heads("text side", width, where),
        intermediate_size=shapes[f"{part}encoder.layer.0.intermediate.dense.weight"][0],
        max_positions=shapes[f"{part}embeddings.position_embeddings.weight"][0],
        layer_norm_eps=bert.get("layer_norm_eps", default.layer_norm_eps),
        dropout=bert.get("hidden_dropout_prob", default.dropout),
        attention_dropout=bert.get("attention_probs_dropout_prob", default.attention_dropout),
        pad_token_id=tokens.get("pad", default.pad_token_id),
        cls_token_id=tokens.get("cls", default.cls_token_id),
        sep_token_id=tokens.get("sep", default.sep_token_id),
        # The two added tokens follow BERT's vocabulary.
        dec_token_id=tokens.get("bos_dec", vocab_size - 2),
        enc_token_id=tokens.get("enc", vocab_size - 1),
    )


def _guess_heads(part: str, width: int, where: str) -> int:
    if width not in _HEADS:
        raise CheckpointError(
            f"{where}: the {part} is {width} wide, which does not tell its number of heads; pass "
            "config=BlipConfig(...), or put a config.json beside the file"
        )
    return _HEADS[width]


def config_of_hf(directory: Path) -> BlipConfig:
    """The configuration of a transformers directory. Raises CheckpointError if it is not BLIP."""
    values = read_json(directory / "config.json")
    if values.get("model_type") != "blip":
        raise CheckpointError(
            f"{directory} holds a {values.get('model_type')!r} model of transformers, not 'blip'"
        )
    from transformers import BlipConfig as HFBlipConfig  # slow to import, so only when needed

    hf = HFBlipConfig.from_dict(values)
    vision, text = hf.vision_config, hf.text_config
    for part, act in (("vision", vision.hidden_act), ("text", text.hidden_act)):
        if act != "gelu":
            raise CheckpointError(
                f"{directory}: the {part} side uses {act!r}, blipfast only 'gelu'"
            )
    extra = values.get(HF_EXTRA, {})
    return BlipConfig(
        vision=VisionConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_size=vision.hidden_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            layer_norm_eps=vision.layer_norm_eps,
            drop_path_rate=extra.get("drop_path_rate", 0.0),
        ),
        text=TextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            intermediate_size=text.intermediate_size,
            max_positions=text.max_position_embeddings,
            layer_norm_eps=text.layer_norm_eps,
            dropout=text.hidden_dropout_prob,
            attention_dropout=text.attention_probs_dropout_prob,
            pad_token_id=text.pad_token_id,
            cls_token_id=extra.get("cls_token_id", TextConfig.cls_token_id),
            sep_token_id=text.sep_token_id,
            dec_token_id=text.bos_token_id,
            enc_token_id=extra.get("enc_token_id", text.vocab_size - 1),
        ),
        embed_dim=hf.image_text_hidden_size,
        sharing=extra.get("sharing", BlipConfig.sharing),
        temperature=extra.get("temperature", BlipConfig.temperature),
    )


def hf_config(config: BlipConfig, architecture: str, label_smoothing: float) -> dict[str, Any]:
    """`config` in the terms of transformers, the inverse of `config_of_hf`."""
    from transformers import BlipConfig as HFBlipConfig

    vision, text = config.vision, config.text
    hf = HFBlipConfig(
        vision_config={
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": int(vision.hidden_size * vision.mlp_ratio),
            "layer_norm_eps": vision.layer_norm_eps,
        },
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "encoder_hidden_size": vision.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_positions,
            "layer_norm_eps": text.layer_norm_eps,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.attention_dropout,
            "pad_token_id": text.pad_token_id,
            "sep_token_id": text.sep_token_id,
            "eos_token_id": text.sep_token_id,
            "bos_token_id": text.dec_token_id,
            "label_smoothing": label_smoothing,
        },
        image_text_hidden_size=config.embed_dim,
        label_smoothing=label_smoothing,
    )
    values = hf.to_dict()
    values["architectures"] = [architecture]
    values[HF_EXTRA] = {
        "drop_path_rate": vision.drop_path_rate,
        "cls_token_id": text.cls_token_id,
        "enc_token_id": text.enc_token_id,
        "sharing": config.sharing,
        "temperature": config.temperature,
    }
    return values


def as_config(config: BlipConfig | dict[str, Any] | str) -> BlipConfig:
    """A configuration from itself, its dictionary or a preset's name. Raises ConfigError."""
    if isinstance(config, BlipConfig):
        return config
    if isinstance(config, str):
        return blip_config(config)
    if isinstance(config, dict):
        return BlipConfig.from_dict(config)
    raise ConfigError(f"config must be a BlipConfig, a dict or a preset's name, got {config!r}")


def with_image_size(config: BlipConfig, image_size: int | None) -> BlipConfig:
    if image_size is None:
        return config
    vision = dataclasses.replace(config.vision, image_size=image_size)
    return dataclasses.replace(config, vision=vision)
