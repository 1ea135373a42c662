"""One packed pass with shared image K/V equals a pass for each use: float64, all gradients."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from blipfast.models.blip import PackedText
from blipfast.models.config import Sharing, blip_config
from blipfast.models.reference import encode_padded
from blipfast.objectives.itm import Negatives
from blipfast.tasks.contrastive import Contrast
from blipfast.tasks.pretrain import BlipForPretraining

LENGTHS = [5, 11, 2, 8]
SHARING = get_args(Sharing)


def _model(sharing: str) -> BlipForPretraining:
    config = dataclasses.replace(blip_config("blip_tiny"), sharing=sharing)
    model = BlipForPretraining(config, queue_size=8).double().eval()
    with torch.no_grad():  # the small weights of a fresh model would hide a mixed-up image
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(103, 450, mask.shape) * mask
    return torch.randn(len(LENGTHS), 17, 64, dtype=torch.float64), ids, mask


def _packed(model, embeds, ids, mask, negatives):
    contrast = Contrast(torch.zeros(()), negatives)
    text = PackedText.from_padded(ids, mask)
    around = model.surroundings(embeds, ids, mask, contrast, text)
    return model.ground(around, range(len(ids)))


def _per_pass(model, embeds, ids, mask, negatives):
    """Three passes for ITM and one for LM, padded, as the original runs them."""
    text = model.config.text

    def itm(rows: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        hidden = encode_padded(
            model.text_encoder,
            starting(rows, text.enc_token_id),
            mask[rows],
            cross_embeds=embeds[images],
        )
        return model.itm_head(hidden[:, 0])

    def starting(rows: torch.Tensor, token: int) -> torch.Tensor:
        chosen = ids[rows].clone()
        chosen[:, 0] = token
        return chosen

    own = torch.arange(len(ids))
    logits = torch.cat(
        [itm(own, own), itm(own, negatives.image_index), itm(negatives.text_index, own)]
    )
    hidden = encode_padded(
        model.text_decoder,
        starting(own, text.dec_token_id),
        mask,
        cross_embeds=embeds,
        causal=True,
    )
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    predictions = model.text_decoder.lm_head(hidden)[:, :-1]
    loss = F.cross_entropy(
        predictions.flatten(0, 1), labels.flatten(), label_smoothing=0.1, ignore_index=-100
    )
    return logits, loss


@pytest.mark.parametrize("sharing", SHARING)
def test_losses_and_all_gradients(sharing: str) -> None:
    model = _model(sharing)
    embeds, ids, mask = _batch()
    negatives = Negatives(torch.tensor([1, 0, 1, 2]), torch.tensor([3, 3, 0, 1]))
    targets = torch.tensor([1] * 4 + [0] * 8)
    results = []
    for packed in (True, False):
        model.zero_grad(set_to_none=True)
        images = embeds.clone().requires_grad_()
        if packed:
            logits, loss_lm = _packed(model, images, ids, mask, negatives)
        else:
            logits, loss_lm = _per_pass(model, images, ids, mask, negatives)
        (F.cross_entropy(logits, targets) + loss_lm).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits, loss_lm, {**grads, "image_embeds": images.grad}))
    (logits, loss, grads), (ref_logits, ref_loss, ref_grads) = results
    torch.testing.assert_close(logits, ref_logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, ref_loss, rtol=1e-10, atol=1e-12)
    assert grads.keys() == ref_grads.keys()
    assert {"itm_head.weight", "image_embeds"} <= grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, ref_grads[name], rtol=1e-9, atol=1e-11, msg=name)
        assert name.endswith("bias") or grad.abs().max() > 1e-9, f"{name} gets no gradient"


@pytest.mark.parametrize("sharing", SHARING)
def test_what_is_shared(sharing: str) -> None:
    model = _model(sharing)
    encoder, decoder = model.text_encoder.layers[0], model.text_decoder.layers[0]
    same = {
        part: getattr(encoder, part) is getattr(decoder, part)
        for part in ("self_attention", "cross_attention", "feed_forward")
    }
    expected = {
        "all_but_self_attention": (False, True, True),
        "all_but_cross_attention": (True, False, True),
        "all": (True, True, True),
        "nothing": (False, False, False),
    }
    assert tuple(same.values()) == expected[sharing]


def test_a_text_depends_on_the_image_it_names() -> None:
    model = _model("all_but_self_attention")
    embeds, ids, mask = _batch()
    texts = torch.tensor([3, 3, 0, 1])
    one, other = (
        _packed(model, embeds, ids, mask, Negatives(torch.tensor(images), texts))[0]
        for images in ([1, 0, 1, 2], [1, 0, 1, 0])
    )
    changed = (one - other).abs().amax(1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [7]
