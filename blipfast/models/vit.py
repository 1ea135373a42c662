"""The image encoder: a ViT with pre-LN blocks, CLS token and learned positions.

Parameter names are timm's (and the original BLIP's), so that such checkpoints load key by key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blipfast.errors import ShapeError
from blipfast.models.config import VisionConfig
from blipfast.ops.autocast_copies import cast_together
from blipfast.ops.dense import dense_attention, dense_self_attention
from blipfast.ops.layer_norm import LayerNorm
from blipfast.ops.linear_layers import Linear, feed_forward, linear
from blipfast.ops.split_heads import split_heads


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, D)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(dense_self_attention(qkv).flatten(2))

    def first_token(self, x: Tensor) -> Tensor:
        """`(B, S, D)` to the output of the first token alone, `(B, 1, D)`."""
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = linear(x[:, :1], weight[:width], bias[:width]).unflatten(-1, (self.num_heads, -1))
        kv = linear(x, weight[width:], bias[width:]).unflatten(-1, (2, self.num_heads, -1))
        k, v = split_heads(kv)
        return self.proj(dense_attention(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = Linear(config.hidden_size, hidden)
        self.fc2 = Linear(hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.fc1, self.fc2)


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, first_only: bool = False, keep: Tensor | None = None) -> Tensor:
        """keep: a scalar, the share of images whose branches stay (stochastic depth); None: all."""
        keep = keep if self.training else None
        held = cast_together(self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2)
        attn = self.attn.first_token if first_only else self.attn
        x, normed = self.norm1.add(x, None)
        branch = _drop_path(attn(normed), keep)
        x, normed = self.norm2.add(x[:, :1] if first_only else x, branch)
        x = x + _drop_path(self.mlp(normed), keep)
        del held
        return x


def _drop_path(branch: Tensor, keep: Tensor | None) -> Tensor:
    """The branch is dropped per image, the rest scaled up."""
    if keep is None:
        return branch
    kept = torch.bernoulli(keep.expand(branch.shape[0], 1, 1))
    return branch * (kept / keep).to(branch.dtype)


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        proj = self.proj
        full = proj.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if full and pixel_values.is_cpu:
            return proj(pixel_values).flatten(2).transpose(1, 2)
        # The patches do not overlap: one matrix product, whose backward is several times as fast in
        # bf16, and which on a GPU is of the precision asked for, where convolutions take TF32. In
        # float32 a CPU gains nothing, and the convolution's rounding is the original's.
        return linear(
            patches_of(pixel_values, proj.kernel_size[0]), proj.weight.flatten(1), proj.bias
        )


def patches_of(pixel_values: Tensor, size: int) -> Tensor:
    """`(B, C, height, width)` to `(B, patches, C * size * size)`, row by row.

    One copy, a tenth of the time of `F.pixel_unshuffle`.
    """
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // size, width // size
    parts = pixel_values.reshape(batch, channels, rows, size, columns, size)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


class VisionTransformer(nn.Module):
    """`pixel_values (B, 3, image_size, image_size)` to `image_embeds (B, S, D)`, CLS token first.

    gradient_checkpointing: how many of the last blocks recompute their activations in the backward.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.drop_path_rate = config.drop_path_rate
        self.gradient_checkpointing = 0
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, config.hidden_size))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)

    def forward(self, pixel_values: Tensor, *, first_only: bool = False) -> Tensor:
        """Raises ShapeError when the images are not of the configured size.

        first_only: only the CLS token is wanted, `(B, 1, D)`; the last block stops there.
        """
        size = self.config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ShapeError(
                f"pixel_values must be (B, 3, {size}, {size}), got {tuple(pixel_values.shape)}; "
                "resize the images, or load the model with image_size=…"
            )
        x = self.patch_embed(pixel_values)
        cls_token = self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1) + self.pos_embed.to(x.dtype)
        count = len(self.blocks)
        keep: Sequence[Tensor | None] = [None] * count
        if self.training and self.drop_path_rate > 0.0:
            # Tensors, so that one compiled graph serves all blocks.
            keep = torch.linspace(1.0, 1.0 - self.drop_path_rate, count, device=x.device).unbind()
        for i, block in enumerate(self.blocks):
            last = first_only and i == count - 1
            if self.training and i >= count - self.gradient_checkpointing:
                x = checkpoint(block, x, last, keep[i], use_reentrant=False)
            else:
                x = block(x, last, keep[i])
        return self.norm(x)


def interpolate_pos_embed(pos_embed: Tensor, num_tokens: int) -> Tensor:
    """Bicubic interpolation of `(1, 1 + grid^2, D)` positions to another square grid (section 4.2).

    The CLS token's position stays as it is. Raises ShapeError when either grid is not square.
    """
    if pos_embed.shape[1] == num_tokens:
        return pos_embed
    old, new = (math.isqrt(n - 1) for n in (pos_embed.shape[1], num_tokens))
    if old * old + 1 != pos_embed.shape[1] or new * new + 1 != num_tokens:
        raise ShapeError(
            f"cannot interpolate {pos_embed.shape[1]} positions to {num_tokens}: "
            "both must be a square grid and the CLS token"
        )
    grid = pos_embed[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
