"""Captioning, VQA and NLVR2 equal the original's: losses, logits, gradients, ranked answers."""

from __future__ import annotations

import pytest
import torch

from blipfast.models.blip import PackedText
from blipfast.models.streams import run_streams


def test_caption(golden, checkpoint, load, check) -> None:
    g = golden("caption")
    model = load(checkpoint("caption"))
    ids, mask = g.text()
    prompt_length = g["prompt_ids"].shape[1]
    out = model(g["image"][:2], ids, mask, prompt_length=prompt_length)
    check.loss(out.loss_lm, g["out.loss_lm"])
    out.loss.backward()
    check.gradients(model, g)
    with torch.no_grad():
        embeds = model.encode_image(g["image"])
        check.features(embeds, g["out.image_embeds"])
        text = g.packed()
        logits = model.text_decoder.lm_head(model.decode(embeds[:2], text))
        check.features(logits, text.packing.unpad(g["out.lm_logits"]))
        prompt = PackedText.from_padded(g["prompt_ids"], torch.ones_like(g["prompt_ids"]))
        logits = model.text_decoder.lm_head(model.decode(embeds, prompt))
        check.features(prompt.packing.pad(logits), g["out.prompt_logits"])


def test_vqa_training(golden, checkpoint, load, check) -> None:
    g = golden("vqa")
    model = load(checkpoint("vqa"))
    question, answers = g.text("train.question"), g.text("train.answer")
    out = model(
        g["image"][:2],
        *question,
        *answers,
        answers_per_question=g["train.n"].tolist(),
        weights=g["train.weights"],
    )
    check.loss(out.loss, g["out.loss"])
    torch.testing.assert_close(out.loss_per_answer, g["out.loss_per_answer"], rtol=1e-5, atol=0)
    out.loss.backward()
    check.gradients(model, g)
    with torch.no_grad():
        states = model.encode_question(g["image"][:2], *question)
    mask = question[1].bool()
    check.features(states.embeds[0][mask], g["out.question_states"][mask])


@pytest.mark.parametrize("k", [8, 22])
def test_vqa_ranking(golden, checkpoint, load, k: int) -> None:
    g = golden("vqa")
    model = load(checkpoint("vqa"))
    answers = g.packed("rank.answers")
    with torch.no_grad():
        states = model.encode_question(g["image"], *g.text("rank.question"))
        ranked = model.rank(states, answers, k=k)
        first = model.first_token_logits(states).softmax(-1)
        best = model.best(states, answers, k=k)
    assert torch.equal(ranked.answer_ids[:, 0], g[f"out.rank_k{k}.best"])
    assert torch.equal(best.answer_ids, ranked.answer_ids[:, 0])
    first_tokens = answers.input_ids[answers.packing.first_tokens + 1]
    theirs = g[f"out.rank_k{k}.topk_ids"]
    for i in range(3):
        ours = ranked.answer_ids[i].tolist()
        probs = first[i][first_tokens[ours]].sort(descending=True).values
        expected = g[f"out.rank_k{k}.topk_prob_first_token"][i].sort(descending=True).values
        torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-8)
        # Answers that tie with the last candidate in stage one may stand in for one another.
        last = expected[-1] * (1 + 1e-5)
        sure = {
            j
            for j, p in zip(theirs[i].tolist(), first[i][first_tokens[theirs[i]]], strict=True)
            if p > last
        }
        assert sure <= set(ours)
        loss_of = dict(
            zip(theirs[i].tolist(), g[f"out.rank_k{k}.sum_loss"][i].tolist(), strict=True)
        )
        both = [j for j in ours if j in loss_of]
        assert len(both) >= len(sure)
        scores = dict(zip(ours, ranked.log_likelihood[i].tolist(), strict=True))
        for j in both:
            assert -scores[j] == pytest.approx(loss_of[j], rel=1e-5)
        assert both == sorted(both, key=loss_of.__getitem__)


def test_nlvr(golden, checkpoint, load, check) -> None:
    g = golden("nlvr")
    model = load(checkpoint("nlvr"))
    pairs = torch.stack(g["image"].chunk(2), dim=1)  # first images, then second images
    out = model(pairs, *g.text(), labels=g["targets"])
    check.features(out.logits, g["out.logits"])
    check.loss(out.loss, g["out.loss"])
    out.loss.backward()
    check.gradients(model, g)


def test_nlvr_tells_its_images_apart(golden, checkpoint, load) -> None:
    g = golden("nlvr")
    model = load(checkpoint("nlvr"))
    pairs = torch.stack(g["image"].chunk(2), dim=1)
    with torch.no_grad():
        swapped = model(pairs.flip(1), *g.text()).logits
    assert not torch.allclose(swapped, g["out.logits"], atol=1e-3)


def test_decoder_sees_nothing_ahead(golden, checkpoint, load) -> None:
    g = golden("caption")
    model = load(checkpoint("caption"))
    text = g.packed()
    changed = text.input_ids.clone()
    last = text.packing.first_tokens + text.packing.lengths_tensor - 1
    changed[last] = 7
    with torch.no_grad():
        states = model.image_states(model.encode_image(g["image"][:2]), decoder=True)
        one, other = (
            run_streams([model.decoder_stream(PackedText(ids, text.packing), range(2))], states)[0]
            for ids in (text.input_ids, changed)
        )
    keep = torch.ones_like(text.input_ids, dtype=torch.bool)
    keep[last] = False
    torch.testing.assert_close(one[keep], other[keep], atol=1e-6, rtol=0)
    assert not torch.allclose(one[last], other[last], atol=1e-3)
