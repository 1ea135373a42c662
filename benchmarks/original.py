"""The 2022 formulation of a pre-training step, in plain PyTorch: the baseline to beat.

It runs on the very modules of a `BlipForPretraining` as the original code computes: PyTorch's own
linear layers, GELU, LayerNorm and dropout, eager attention, captions padded to 30, the image's K/V
projected again in each of the four passes, a copy of an image's tokens for each negative, both
queues copied, logits over the whole vocabulary for padding too, a loop over all parameters for the
momentum update and one synchronising draw per negative.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.models.blip import Blip
from blipfast.models.reference import encode_padded
from blipfast.models.vit import Block, VisionTransformer
from blipfast.objectives.itm import Negatives
from blipfast.ops import use_backend
from blipfast.tasks.pretrain import BlipForPretraining

MAX_LENGTH = 30


def encode_image(vit: VisionTransformer, pixel_values: Tensor) -> Tensor:
    """The ViT with attention as matmul and softmax."""
    x = vit.patch_embed(pixel_values)
    x = torch.cat([vit.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + vit.pos_embed
    for block in vit.blocks:
        assert isinstance(block, Block)
        normed = block.norm1(x)
        q, k, v = block.attn.qkv(normed).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        probs = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        x = x + block.attn.proj((probs @ v).transpose(1, 2).flatten(-2))
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x)


def pad_to(ids: Tensor, length: int) -> Tensor:
    return F.pad(ids, (0, length - ids.shape[1]))


def features(model: Blip, pixel_values: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Image tokens, and unit features of image and text."""
    embeds = encode_image(model.visual_encoder, pixel_values)
    image_feat = F.normalize(model.vision_proj(embeds[:, 0]), dim=-1)
    hidden = encode_padded(model.encoder, ids, mask)[:, 0]
    return embeds, image_feat, F.normalize(model.text_proj(hidden), dim=-1)


@torch.no_grad()
def update_twin(model: BlipForPretraining) -> None:
    sources = dict(model.named_parameters())
    for name, target in model.twin.named_parameters():
        target.data = target.data * model.momentum + sources[name].data * (1 - model.momentum)


def draw_negatives(sim_i2t: Tensor, sim_t2i: Tensor) -> Negatives:
    """One synchronising draw for each row."""
    batch = sim_i2t.shape[0]
    weights_i2t = F.softmax(sim_i2t[:, :batch], dim=1) + 1e-4
    weights_t2i = F.softmax(sim_t2i[:, :batch], dim=1) + 1e-4
    weights_i2t.fill_diagonal_(0)
    weights_t2i.fill_diagonal_(0)
    images = [int(torch.multinomial(weights_t2i[i].float(), 1).item()) for i in range(batch)]
    texts = [int(torch.multinomial(weights_i2t[i].float(), 1).item()) for i in range(batch)]
    device = sim_i2t.device
    return Negatives(torch.tensor(images, device=device), torch.tensor(texts, device=device))


@use_backend(linear="torch", feed_forward="torch", dropout="torch", add_layer_norm="torch")
def pretrain_losses(
    model: BlipForPretraining,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    alpha: float,
    negatives: Negatives | None = None,
    update_state: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """ITC, ITM and LM losses of `B` pairs, with as many passes as the original makes."""
    with torch.no_grad():
        model.temp.clamp_(0.001, 0.5)
    ids, mask = pad_to(input_ids, MAX_LENGTH), pad_to(attention_mask, MAX_LENGTH)
    embeds, image_feat, text_feat = features(model, pixel_values, ids, mask)
    with torch.no_grad():
        if update_state:
            update_twin(model)
        _, image_feat_m, text_feat_m = features(model.twin, pixel_values, ids, mask)
        image_keys = torch.cat([image_feat_m, model.queue.image_queue.clone()])
        text_keys = torch.cat([text_feat_m, model.queue.text_queue.clone()])
        own = torch.zeros(len(ids), len(text_keys), device=ids.device)
        own.fill_diagonal_(1)
        soft_i2t = F.softmax(image_feat_m @ text_keys.T / model.temp, dim=1)
        soft_t2i = F.softmax(text_feat_m @ image_keys.T / model.temp, dim=1)
        targets_i2t = alpha * soft_i2t + (1 - alpha) * own
        targets_t2i = alpha * soft_t2i + (1 - alpha) * own
    sim_i2t = image_feat @ text_keys.T / model.temp
    sim_t2i = text_feat @ image_keys.T / model.temp
    loss_i2t = -(F.log_softmax(sim_i2t, dim=1) * targets_i2t).sum(1).mean()
    loss_t2i = -(F.log_softmax(sim_t2i, dim=1) * targets_t2i).sum(1).mean()
    if update_state:
        model.queue.enqueue(image_feat_m, text_feat_m)
    if negatives is None:
        negatives = draw_negatives(sim_i2t.detach(), sim_t2i.detach())
    loss_itm, loss_lm = ground(model, embeds, ids, mask, negatives)
    return (loss_i2t + loss_t2i) / 2, loss_itm, loss_lm


def ground(
    model: BlipForPretraining, embeds: Tensor, ids: Tensor, mask: Tensor, negatives: Negatives
) -> tuple[Tensor, Tensor]:
    """ITM over positives, then over both kinds of negatives, then LM: three passes, four uses."""
    text = model.text_config
    encoder_ids = ids.clone()
    encoder_ids[:, 0] = text.enc_token_id
    image_index, text_index = negatives.image_index, negatives.text_index
    positive = encode_padded(model.encoder, encoder_ids, mask, cross_embeds=embeds)[:, 0]
    negative = encode_padded(
        model.encoder,
        torch.cat([encoder_ids, encoder_ids[text_index]]),
        torch.cat([mask, mask[text_index]]),
        cross_embeds=torch.cat([embeds[image_index], embeds]),
    )[:, 0]
    labels = (torch.arange(3 * len(ids), device=ids.device) < len(ids)).long()
    loss_itm = F.cross_entropy(model.itm_head(torch.cat([positive, negative])), labels)

    decoder_ids = ids.clone()
    decoder_ids[:, 0] = text.dec_token_id
    targets = decoder_ids.masked_fill(mask == 0, -100)
    hidden = encode_padded(model.decoder, decoder_ids, mask, cross_embeds=embeds, causal=True)
    logits = model.lm_head(hidden)[:, :-1].contiguous()
    loss_lm = F.cross_entropy(
        logits.view(-1, logits.shape[-1]),
        targets[:, 1:].reshape(-1),
        label_smoothing=model.label_smoothing,
    )
    return loss_itm, loss_lm
