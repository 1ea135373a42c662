"""Image-text contrastive learning with momentum features and a queue (BLIP section 3.2, ITC)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.errors import ConfigError, ShapeError
from blipfast.objectives.distributed import all_gather_no_grad, rank_offset
from blipfast.ops.contrastive import Positives, contrastive_softmax

NO_ID = -100


class FeatureQueue(nn.Module):
    """The last momentum features of images and texts, as buffers; any batch size fits.

    size: `Q`, features kept of each kind. embed_dim: `D`. with_ids: keep the pairs' image ids too.
    Buffers: `image_queue (Q, D)` and `text_queue (Q, D)`, random unit vectors at first; `ptr ()`
    int64, the next place to write; with ids `id_queue (Q,)` int64, -100 where nothing was written.
    """

    image_queue: Tensor
    text_queue: Tensor
    ptr: Tensor
    id_queue: Tensor | None

    def __init__(self, size: int, embed_dim: int, *, with_ids: bool = False) -> None:
        super().__init__()
        if size < 1 or embed_dim < 1:
            raise ConfigError(f"FeatureQueue: size={size} and embed_dim={embed_dim} must be >= 1")
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(size, embed_dim), dim=1))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64))
        ids = torch.full((size,), NO_ID, dtype=torch.int64) if with_ids else None
        self.register_buffer("id_queue", ids)

    def __len__(self) -> int:
        return int(self.image_queue.shape[0])

    @torch.no_grad()
    def enqueue(self, image_feat: Tensor, text_feat: Tensor, ids: Tensor | None = None) -> None:
        """Write the features of all ranks over the oldest ones, wrapping around at the end.

        image_feat, text_feat: `(M, D)`, all ranks' as `gather_keys` gives them. Of a batch longer
        than the queue its end stays. ids: `(M,)`, for a queue with ids and only then.

        Raises ShapeError.
        """
        if (
            image_feat.shape != text_feat.shape
            or image_feat.shape[1:] != self.image_queue.shape[1:]
        ):
            raise ShapeError(
                f"FeatureQueue: image {tuple(image_feat.shape)} and text {tuple(text_feat.shape)} "
                f"features must both be (B, {self.image_queue.shape[1]})"
            )
        if (ids is None) != (self.id_queue is None):
            needed = "needs ids" if ids is None else "takes no ids: build it with_ids=True"
            raise ShapeError(f"FeatureQueue: this queue {needed}")
        if ids is not None and ids.shape != image_feat.shape[:1]:
            raise ShapeError(f"FeatureQueue: {tuple(ids.shape)} ids for {len(image_feat)} pairs")
        count = len(image_feat)
        kept = slice(max(0, count - len(self)), None)
        # All places come from the tensor `ptr`, so the host never waits for it.
        places = torch.arange(count, device=self.ptr.device)[kept].add(self.ptr) % len(self)
        self.image_queue[places] = image_feat[kept].to(self.image_queue.dtype)
        self.text_queue[places] = text_feat[kept].to(self.text_queue.dtype)
        if self.id_queue is not None and ids is not None:
            self.id_queue[places] = ids[kept]
        self.ptr.add_(count).remainder_(len(self))

    def extra_repr(self) -> str:
        size, width = self.image_queue.shape
        return f"{size}, {width}, with_ids={self.id_queue is not None}"


@dataclass(frozen=True)
class Keys:
    """The momentum features of all ranks' batches, `(M, D)` each, without gradients.

    first: row of this rank's own batch, which has `batch` rows. ids: `(M,)` int64 image ids.
    """

    image: Tensor
    text: Tensor
    first: int
    batch: int
    ids: Tensor | None = None

    def of_this_rank(self) -> Keys:
        """Only what this rank's own batch gave."""
        own = slice(self.first, self.first + self.batch)
        ids = None if self.ids is None else self.ids[own]
        return Keys(self.image[own], self.text[own], 0, self.batch, ids)


def gather_keys(image_feat_m: Tensor, text_feat_m: Tensor, ids: Tensor | None = None) -> Keys:
    """All ranks' keys from each rank's momentum features `(B, D)` and, if wanted, ids `(B,)`."""
    batch = len(image_feat_m)
    both = all_gather_no_grad(torch.cat([image_feat_m, text_feat_m], dim=1))
    image, text = (part.contiguous() for part in both.chunk(2, dim=1))
    all_ids = None if ids is None else all_gather_no_grad(ids)
    return Keys(image, text, rank_offset(batch), batch, all_ids)


def itc_loss(
    image_feat: Tensor,
    text_feat: Tensor,
    image_feat_m: Tensor,
    text_feat_m: Tensor,
    queue: FeatureQueue | None,
    temperature: Tensor,
    alpha: float | Tensor,
    ids: Tensor | None = None,
    *,
    keys: Keys | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mean of the image-to-text and text-to-image losses over the batch.

    Each student feature is compared with the other modality's momentum features of the batch and
    of the queue. Targets are `alpha * softmax(momentum similarities) + (1 - alpha) * positives`,
    both softmaxes at the student's temperature. Keys and targets carry no gradient. The queue may
    be written to before the backward pass.

    Args:
        image_feat, text_feat: `(B, D)` unit features of the student; row i of each makes a pair.
        image_feat_m, text_feat_m: `(B, D)` of the momentum encoders.
        queue: further keys, or None.
        temperature: one element; clamp it first (`clamp_temperature_`).
        alpha: weight of the soft targets (`alpha_at`).
        ids: `(B,)` image ids: all keys with an equal id are positives, each with the same weight
            (retrieval fine-tuning); needs a queue with ids. None: only the pair itself is.
        keys: the momentum features of all ranks (`gather_keys`), as if they were one batch. By
            default only this rank's, as in the original.
        impl: backend of `contrastive_softmax`.

    Returns:
        A scalar, float32.

    Raises:
        ShapeError: the features or ids do not fit each other or the queue.
    """
    if not image_feat.shape == text_feat.shape == image_feat_m.shape == text_feat_m.shape:
        shapes = [tuple(t.shape) for t in (image_feat, text_feat, image_feat_m, text_feat_m)]
        raise ShapeError(f"itc_loss: features must all be (B, D), not {shapes}")
    if keys is None:
        keys = Keys(image_feat_m.detach(), text_feat_m.detach(), 0, len(image_feat), ids)
    image_keys, text_keys = [keys.image], [keys.text]
    positives: Positives = keys.first
    if ids is not None:
        if keys.ids is None:
            raise ShapeError("itc_loss: ids need keys with ids: gather_keys(…, ids)")
        key_ids = [keys.ids]
        if queue is not None:
            if queue.id_queue is None:
                raise ShapeError("itc_loss: ids need a queue with ids: FeatureQueue(with_ids=True)")
            key_ids.append(queue.id_queue)
        positives = (ids, key_ids)
    if queue is not None:
        image_keys.append(queue.image_queue)
        text_keys.append(queue.text_queue)

    def direction(query: Tensor, against: list[Tensor], teacher_query: Tensor) -> Tensor:
        return contrastive_softmax(
            query,
            against,
            temperature,
            teacher_query=teacher_query,
            alpha=alpha,
            positives=positives,
            impl=impl,
        )

    image_to_text = direction(image_feat, text_keys, image_feat_m)
    text_to_image = direction(text_feat, image_keys, text_feat_m)
    return (image_to_text.mean() + text_to_image.mean()) / 2


def alpha_at(
    alpha: float, epoch: int, step: int, steps_per_epoch: int, ramp_epochs: int = 2
) -> float:
    """Weight of the soft targets at a step: rises linearly from 0 over the first epochs.

    The original ramps over two epochs in pre-training and over one in retrieval fine-tuning.
    """
    if ramp_epochs <= 0:
        return alpha
    done = epoch * steps_per_epoch + step
    return alpha * min(1.0, done / max(1, ramp_epochs * steps_per_epoch))


@torch.no_grad()
def clamp_temperature_(temperature: Tensor, low: float = 0.001, high: float = 0.5) -> None:
    """Keep the learned temperature within bounds, in place; before each forward pass."""
    temperature.clamp_(low, high)
