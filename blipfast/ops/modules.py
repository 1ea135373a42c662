"""The operators as `nn.Module`s, for a training loop of another project."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blipfast.errors import ShapeError
from blipfast.ops.attention import CrossPlan, cross_attention
from blipfast.ops.contrastive import Positives, contrastive_softmax
from blipfast.ops.hard_negatives import sample_hard_negatives
from blipfast.ops.linear_ce import Reduction, linear_cross_entropy
from blipfast.ops.linear_layers import Linear


class ContrastiveLoss(nn.Module):
    """Symmetric image-text contrast with a learned temperature (BLIP section 3.2; CLIP without
    teachers).

    temperature: at the start. bounds: what it is clamped to before each use. alpha: weight of the
    teachers' soft targets.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        bounds: tuple[float, float] = (0.001, 0.5),
        alpha: float = 0.4,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.bounds, self.alpha, self.impl = bounds, alpha, impl

    def forward(
        self,
        image_feat: Tensor,
        text_feat: Tensor,
        *,
        image_keys: Tensor | list[Tensor] | None = None,
        text_keys: Tensor | list[Tensor] | None = None,
        image_teacher: Tensor | None = None,
        text_teacher: Tensor | None = None,
        positives: Positives = None,
    ) -> Tensor:
        """A scalar: the mean of both directions over the batch.

        image_feat, text_feat: `(B, D)` unit features; row i of each makes a pair. image_keys,
        text_keys: what the other side is compared with, `(N, D)` or blocks; by default the other
        side's features, with gradients to both (CLIP). image_teacher, text_teacher: `(B, D)` of
        momentum encoders. positives: see `contrastive_softmax`.
        """
        if image_feat.shape != text_feat.shape:
            raise ShapeError(
                f"image_feat {tuple(image_feat.shape)} and text_feat {tuple(text_feat.shape)} "
                "must have the same shape (B, D)"
            )
        with torch.no_grad():
            self.temperature.clamp_(*self.bounds)

        def direction(query: Tensor, keys: Tensor | list[Tensor], teacher: Tensor | None) -> Tensor:
            return contrastive_softmax(
                query,
                keys,
                self.temperature,
                teacher_query=teacher,
                alpha=self.alpha,
                positives=positives,
                impl=self.impl,
            ).mean()

        to_text = direction(
            image_feat, text_feat if text_keys is None else text_keys, image_teacher
        )
        to_image = direction(
            text_feat, image_feat if image_keys is None else image_keys, text_teacher
        )
        return (to_text + to_image) / 2


class HardNegatives(nn.Module):
    """Draws hard negatives; counts its calls, so that each step draws anew and a rerun the same.

    eps, num, impl: see `sample_hard_negatives`. seed: of all draws. stream: of this direction.
    """

    step: Tensor

    def __init__(
        self, eps: float = 1e-4, num: int = 1, seed: int = 0, stream: int = 0, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.eps, self.num, self.seed, self.stream, self.impl = eps, num, seed, stream, impl
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))

    @torch.no_grad()
    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        temperature: Tensor,
        *,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
    ) -> Tensor:
        """Rows of `keys (M, D)` for `query (B, D)`, `(B,)` or `(B, num)`; -1 where none is left."""
        drawn = sample_hard_negatives(
            query,
            keys,
            temperature,
            eps=self.eps,
            num=self.num,
            seed=self.seed,
            stream=self.stream,
            step=int(self.step),
            impl=self.impl,
            query_ids=query_ids,
            key_ids=key_ids,
        )
        self.step += 1
        return drawn


class LinearCrossEntropy(nn.Linear):
    """An output layer and its cross-entropy in one: no logits of all tokens at once.

    label_smoothing, ignore_index, reduction, impl: see `linear_cross_entropy`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.reduction: Reduction = reduction
        self.impl = impl

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """`hidden (T, D)` and `labels (T,)` to the loss."""
        return linear_cross_entropy(
            hidden,
            self.weight,
            self.bias,
            labels,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            impl=self.impl,
        )


class CrossAttention(nn.Module):
    """Multi-head cross-attention of packed texts to the images they name, projections included.

    embed_dim: of the texts; kdim: of the images, by default the same. dropout: of the attention
    probabilities.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kdim: int | None = None,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ShapeError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.dropout, self.impl = num_heads, dropout, impl
        self.query = Linear(embed_dim, embed_dim)
        self.key_value = Linear(kdim or embed_dim, 2 * embed_dim)
        self.out = Linear(embed_dim, embed_dim)

    def forward(self, hidden: Tensor, image_embeds: Tensor, plan: CrossPlan) -> Tensor:
        """`hidden (T, embed_dim)`, `image_embeds (B, S, kdim)` to `(T, embed_dim)`.

        plan: `CrossPlan.build(packing, kv_index, B)`, made once for all layers of a batch.
        """
        q = self.query(hidden).unflatten(-1, (self.num_heads, -1))
        kv = self.key_value(image_embeds).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        dropout_p = self.dropout if self.training else 0.0
        out = cross_attention(q, k, v, plan, dropout_p=dropout_p, impl=self.impl)
        return self.out(out.flatten(-2))
