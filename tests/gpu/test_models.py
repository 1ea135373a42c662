"""Models on a card give what they give on a CPU: losses, gradients, draws, texts, scores."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from blipfast.models.blip import PackedText
from blipfast.models.config import BlipConfig, blip_config
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.tasks.retrieval import BlipForRetrieval
from blipfast.tasks.vqa import BlipForVQA
from blipfast.train.compiled import compile_regions

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
PRESETS = ["blip_tiny", "blip_base"]


def config_of(preset: str, dropout: float = 0.0) -> BlipConfig:
    config = blip_config(preset)
    text = dataclasses.replace(config.text, dropout=dropout, attention_dropout=dropout)
    return dataclasses.replace(config, text=text)


def batch_of(preset: str, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    config = blip_config(preset)
    size, words = config.vision.image_size, config.text.vocab_size - 10
    lengths = torch.randint(3, 12, (count,))
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(103, words, (count, 12)) * mask
    return torch.randn(count, 3, size, size), ids, mask


def on_card(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(DEVICE) for t in tensors)


def step(model: Any, batch: tuple[Tensor, ...]) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    """Losses, gradients and what else came out, all on the CPU."""
    out = model(*batch, alpha=0.4, step=3)
    out.loss.backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return [x.detach().cpu() for x in out.losses().values()], grads, out


def assert_close_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], most: float) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(g.norm()) for g in theirs.values())
    for name, expected in theirs.items():
        error = float((ours[name].float() - expected.float()).norm())
        assert error <= most * float(expected.norm()) + 1e-2 * most * largest, name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_pretraining_step_in_float32(preset: str) -> None:
    there = BlipForPretraining(config_of(preset), queue_size=64).train()
    here = copy.deepcopy(there)
    there.to(DEVICE)
    batch = batch_of(preset)
    losses, grads, out = step(there, on_card(*batch))
    expected, gradients, same = step(here, batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.negatives.image_index.cpu(), same.negatives.image_index)
    assert torch.equal(out.negatives.text_index.cpu(), same.negatives.text_index)
    assert_close_gradients(grads, gradients, 1e-3)
    for name, tensor in there.twin.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), here.twin.state_dict()[name])
    torch.testing.assert_close(there.queue.image_queue.cpu(), here.queue.image_queue)


@pytest.mark.parametrize("preset", PRESETS)
def test_texts_known_to_the_card_alone(preset: str) -> None:
    """The same step, for which the host never waits, forward or backward."""
    model = BlipForPretraining(config_of(preset), queue_size=64).train()
    other = copy.deepcopy(model)
    model.to(DEVICE)
    other.to(DEVICE)
    pixels, ids, mask = on_card(*batch_of(preset))
    losses, gradients, out = step(model, (pixels, ids, mask))
    lengths, alpha = mask.sum(1), torch.tensor(0.4, device=DEVICE)
    room, number = int(lengths.sum()) + 17, torch.tensor(3, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        text = PackedText.with_room(ids, lengths, room)
        same = other(pixels, text, alpha=alpha, step=number)
        same.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close([x.cpu() for x in same.losses().values()], losses)
    assert torch.equal(same.negatives.text_index, out.negatives.text_index)
    found = {n: p.grad.cpu() for n, p in other.named_parameters() if p.grad is not None}
    assert_close_gradients(found, gradients, 1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_pretraining_step_in_bf16(preset: str) -> None:
    model = BlipForPretraining(config_of(preset), queue_size=64).to(DEVICE).train()
    batch = on_card(*batch_of(preset))
    other = copy.deepcopy(model)
    expected, gradients, _ = step(model, batch)
    with torch.autocast("cuda", torch.bfloat16):
        losses, grads, _ = step(other, batch)
    torch.testing.assert_close(losses[1:], expected[1:], rtol=5e-2, atol=2e-2)
    assert_close_gradients(grads, gradients, 0.35)


def test_blocks_compiled_give_the_same() -> None:
    model = BlipForPretraining(config_of("blip_tiny"), queue_size=64).to(DEVICE).train()
    other = copy.deepcopy(model)
    compile_regions(other)
    for seed in range(2):
        torch.manual_seed(seed)
        batch = on_card(*batch_of("blip_tiny"))
        expected, gradients, _ = step(model, batch)
        losses, grads, _ = step(other, batch)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
        plain = {name.replace("_orig_mod.", ""): g for name, g in grads.items()}
        assert_close_gradients(plain, gradients, 1e-2)


def test_dropout_and_bf16_lower_the_loss() -> None:
    """What the recipe trains with, some steps of it on one batch."""
    torch.manual_seed(0)
    config = config_of("blip_base", dropout=0.1)
    model = BlipForPretraining(config, queue_size=64).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    batch = on_card(*batch_of("blip_base", 8))
    lm = []
    for number in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            out = model(*batch, alpha=0.0, step=number)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        lm.append(out.loss_lm.item())
    assert lm[-1] < 0.7 * lm[0], lm


def test_captions_scores_and_answers() -> None:
    pixels, ids, mask = batch_of("blip_tiny")
    prompt = torch.tensor([102, 37, 210])
    captioner = BlipForCaptioning(config_of("blip_tiny")).eval()
    options: list[dict[str, Any]] = [{}, {"method": "nucleus", "seed": 3}]
    here = [captioner.generate(pixels, prompt_ids=prompt, **o).sequences for o in options]
    captioner.to(DEVICE)
    for o, expected in zip(options, here, strict=True):
        found = captioner.generate(pixels.to(DEVICE), prompt_ids=prompt.to(DEVICE), **o)
        assert torch.equal(found.sequences.cpu(), expected)

    scorer = BlipForRetrieval(config_of("blip_tiny")).eval()
    with torch.no_grad():
        here = scorer.match_pairs(pixels, PackedText.from_padded(ids, mask))
        scorer.to(DEVICE)
        text = PackedText.from_padded(*on_card(ids, mask))
        there = scorer.match_pairs(pixels.to(DEVICE), text)
    torch.testing.assert_close([x.cpu() for x in there], list(here), atol=1e-5, rtol=1e-5)

    answerer = BlipForVQA(config_of("blip_tiny")).eval()
    _, answer_ids, answer_mask = batch_of("blip_tiny", 30)
    ranked = []
    for device in (torch.device("cpu"), DEVICE):
        answerer.to(device)
        answers = PackedText.from_padded(answer_ids.to(device), answer_mask.to(device))
        with torch.no_grad():
            states = answerer.encode_question(*(x.to(device) for x in (pixels, ids, mask)))
            ranked.append(answerer.rank(states, answers, k=30))
    for row in range(len(pixels)):
        scores = [
            torch.empty(30).index_copy(0, r.answer_ids[row].cpu(), r.log_likelihood[row].cpu())
            for r in ranked
        ]
        torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=1e-5)
