"""One pre-training step equals the original's: losses, gradients, momentum, queue."""

from __future__ import annotations

import pytest
import torch

from blipfast.checkpoints import original_state_dict
from blipfast.models.streams import run_streams


def _step(model, golden):
    return model(
        golden["image"],
        *golden.text(),
        alpha=golden.meta["alpha"],
        step=0,
        negatives=golden.negatives(),
        update_state=True,
    )


def test_step_on_two_pairs(golden, checkpoint, load, check) -> None:
    g = golden("pretrain")
    model = load(checkpoint("pretrain"))
    before = model.text_decoder.lm_head(
        run_streams(
            [model.decoder_stream(g.packed(), range(2))],
            model.image_states(model.encode_image(g["image"])),
        )[0]
    )
    out = _step(model, g)
    check.loss(out.loss_itc, g["out.loss_ita"])
    check.loss(out.loss_itm, g["out.loss_itm"])
    check.loss(out.loss_lm, g["out.loss_lm"])
    check.features(out.itm_logits, g["out.itm_logits"])
    packing = g.packed().packing
    logits = packing.pad(before)[:, :8]
    mask = packing.mask[:, :8]
    check.features(logits[mask], g["out.lm_logits_first8"][mask])
    out.loss.backward()
    check.gradients(model, g)


def test_state_after_the_step(golden, checkpoint, load, check) -> None:
    g = golden("pretrain")
    model = load(checkpoint("pretrain"))
    with torch.no_grad():
        _step(model, g)
        image_embeds, text = model.encode_image(g["image"]), g.packed()
        check.features(image_embeds, g["after.image_embeds"])
        check.features(model.image_features(image_embeds), g["after.image_feat"])
        check.features(model.text_features(text), g["after.text_feat"])
        hidden = model.encode_text(text)
        check.features(hidden, text.packing.unpad(g["after.text_hidden"]))
        image_feat_m, text_feat_m = model.twin.features(g["image"], text)
        check.features(image_feat_m, g["after.image_feat_m"])
        check.features(text_feat_m, g["after.text_feat_m"])
    check.features(model.queue.image_queue.T, g["out.image_queue"])
    check.features(model.queue.text_queue.T, g["out.text_queue"])
    assert model.queue.ptr.item() == g["out.queue_ptr"].item()
    state = original_state_dict(model)
    full = [n.removeprefix("out.momentum.") for n in g.tensors if n.startswith("out.momentum.")]
    for name in full:
        torch.testing.assert_close(state[name], g[f"out.momentum.{name}"], atol=1e-6, rtol=1e-5)
    ours = {name for name in state if "_m." in name}
    theirs = {n for n in g.meta["momentum_after"] if ".crossattention." not in n}
    assert ours == theirs, "the twin holds all of the original's but its unused cross-attention"
    for name in ours:
        expected = g.meta["momentum_after"][name]
        assert state[name].double().norm().item() == pytest.approx(expected["norm"], rel=1e-6)
        assert state[name].double().sum().item() == pytest.approx(
            expected["sum"], rel=1e-5, abs=1e-4
        )


def test_step_on_four_pairs_with_the_queue_wrapping(golden, checkpoint, load, check) -> None:
    g = golden("pretrain_batch4")
    model = load(checkpoint("pretrain"))
    model.queue.ptr.fill_(g.meta["queue_ptr_before"])
    out = _step(model, g)
    check.loss(out.loss_itc, g["out.loss_ita"])
    check.loss(out.loss_itm, g["out.loss_itm"])
    check.loss(out.loss_lm, g["out.loss_lm"])
    check.features(out.itm_logits, g["out.itm_logits"])
    assert model.queue.ptr.item() == g["out.queue_ptr"].item()
    out.loss.backward()
    check.gradients(model, g)


@pytest.mark.parametrize("size", [24, 48])
def test_positions_at_another_image_size(golden, checkpoint, load, check, size: int) -> None:
    g = golden("pos_embed_interpolation")
    model, report = load(checkpoint("pretrain"), image_size=size, return_report=True)
    assert report.interpolated == ["visual_encoder.pos_embed", "twin.visual_encoder.pos_embed"]
    check.features(model.visual_encoder.pos_embed, g[f"out.pos_embed_{size}"])
    with torch.no_grad():
        embeds = model.encode_image(g[f"image_{size}"])
    check.features(embeds, g[f"out.image_embeds_{size}"])


def test_feature_extractor(golden, checkpoint, load, check) -> None:
    g = golden("feature_extractor")
    model = load(checkpoint("pretrain"), "features")
    with torch.no_grad():
        ids, mask = g.text()
        check.features(model.image(g["image"]), g["out.image"])
        check.features(model.text(ids, mask), g["out.text"])
        check.features(model.multimodal(g["image"], ids, mask), g["out.multimodal"])
