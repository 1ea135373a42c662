"""Model configurations and presets.

One frozen dataclass per part; presets are functions in a registry, looked up by name
(`blip_config("blip_base", image_size=384)`), as in timm.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from blipfast.errors import ConfigError

# What the decoder has in common with the image-grounded encoder (BLIP, table 3). The paper shares
# all but self-attention; captioners and VQA models carry a decoder of their own ("nothing").
Sharing = Literal["all_but_self_attention", "all_but_cross_attention", "all", "nothing"]


@dataclass(frozen=True)
class VisionConfig:
    """A ViT (pre-LN, CLS token, learned positions)."""

    image_size: int = 224  # pixels, square
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0  # stochastic depth, rising linearly over the layers

    def __post_init__(self) -> None:
        _check_heads("vision", self.hidden_size, self.num_heads)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision.image_size {self.image_size} is no multiple of patch_size "
                f"{self.patch_size}"
            )

    @property
    def num_tokens(self) -> int:
        """Patches and the CLS token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class TextConfig:
    """A BERT-like transformer (post-LN, learned positions, no token types)."""

    vocab_size: int = 30_524  # BERT uncased's 30,522 and [DEC], [ENC]
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3_072
    max_positions: int = 512
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pad_token_id: int = 0
    cls_token_id: int = 101
    sep_token_id: int = 102
    dec_token_id: int = 30_522  # starts a text to be decoded
    enc_token_id: int = 30_523  # starts a text to be grounded in an image

    def __post_init__(self) -> None:
        _check_heads("text", self.hidden_size, self.num_heads)
        for name in ("pad", "cls", "sep", "dec", "enc"):
            token = getattr(self, f"{name}_token_id")
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"text.{name}_token_id {token} is outside the vocabulary of {self.vocab_size}"
                )


@dataclass(frozen=True)
class BlipConfig:
    """Image encoder, text transformer and what joins them."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 256  # width of the contrastive space
    sharing: Sharing = "all_but_self_attention"
    temperature: float = 0.07  # initial, learned

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlipConfig:
        """The inverse of `to_dict`. Raises ConfigError naming an unknown key."""
        values = dict(values)
        vision = _build(VisionConfig, values.pop("vision", {}), "vision.")
        text = _build(TextConfig, values.pop("text", {}), "text.")
        return _build(cls, {**values, "vision": vision, "text": text}, "")


def _check_heads(part: str, hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ConfigError(
            f"{part}.hidden_size {hidden_size} is no multiple of num_heads {num_heads}"
        )


def _build(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(f"unknown configuration key {prefix}{key}{hint}")
    return cls(**values)


_presets: dict[str, Callable[[], BlipConfig]] = {}


def preset(fn: Callable[[], BlipConfig]) -> Callable[[], BlipConfig]:
    """Registers a preset under the function's name."""
    _presets[fn.__name__] = fn
    return fn


def list_presets() -> list[str]:
    return sorted(_presets)


def blip_config(name: str, *, image_size: int | None = None, **overrides: Any) -> BlipConfig:
    """The preset `name`, with the image size and top-level fields replaced.

    Raises ConfigError for an unknown name or field.
    """
    if name not in _presets:
        raise ConfigError(f"no preset {name!r}; there are {', '.join(list_presets())}")
    config = _presets[name]()
    if image_size is not None:
        vision = dataclasses.replace(config.vision, image_size=image_size)
        config = dataclasses.replace(config, vision=vision)
    return _build(BlipConfig, {**_shallow(config), **overrides}, "")


def _shallow(config: BlipConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


@preset
def blip_base() -> BlipConfig:
    """ViT-B/16 and BERT-base, the paper's main model."""
    return BlipConfig()


@preset
def blip_large() -> BlipConfig:
    """ViT-L/16 and BERT-base."""
    return BlipConfig(
        vision=VisionConfig(hidden_size=1024, num_layers=24, num_heads=16, drop_path_rate=0.1)
    )


@preset
def blip_demo() -> BlipConfig:
    """A small ViT from scratch under MiniLM's text shape; what two CPU cores train in minutes."""
    return BlipConfig(
        vision=VisionConfig(
            image_size=64, patch_size=8, hidden_size=256, num_layers=6, num_heads=4
        ),
        text=TextConfig(
            hidden_size=384,
            num_layers=6,
            num_heads=12,
            intermediate_size=1_536,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        embed_dim=128,
    )


@preset
def blip_tiny() -> BlipConfig:
    """Two narrow layers on each side, for tests."""
    return BlipConfig(
        vision=VisionConfig(image_size=32, patch_size=8, hidden_size=64, num_layers=2, num_heads=4),
        text=TextConfig(
            vocab_size=452,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            intermediate_size=128,
            max_positions=64,
            dropout=0.0,
            attention_dropout=0.0,
            dec_token_id=450,
            enc_token_id=451,
        ),
        embed_dim=32,
    )
