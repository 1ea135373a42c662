"""Options, sampling's properties, results and bad input."""

from __future__ import annotations

import pytest
import torch

from blipfast.data.text import BlipTokenizer
from blipfast.errors import ConfigError, ShapeError
from blipfast.generation import GenerationOptions, caption_images
from blipfast.generation.logits import nucleus, penalise_repetition
from blipfast.generation.sampling import nucleus_chooser, uniform_draws


def test_nucleus_distribution() -> None:
    scores = torch.randn(6, 400, dtype=torch.float64) * 3
    full = scores.softmax(-1)
    for top_k, top_p in [(50, 0.9), (50, 1.0), (3, 0.5), (0, 0.9), (1000, 0.05)]:
        probs, ids = nucleus(scores, top_k=top_k, top_p=top_p)
        assert ids.shape[1] == min(top_k or 400, 400)
        torch.testing.assert_close(probs.sum(-1), torch.ones(6, dtype=torch.float64))
        assert (probs.diff(dim=-1) <= 0).all()  # likeliest first
        assert (ids[:, 0] == scores.argmax(-1)).all()
        kept = (probs > 0).sum(-1)
        top = full.gather(1, ids)
        share = top.cumsum(-1) / top.sum(-1, keepdim=True)
        for row, n in enumerate(kept.tolist()):
            assert share[row, n - 1] >= top_p - 1e-12  # reaches the mass,
            assert n == 1 or share[row, n - 2] < top_p  # and no smaller set does
            torch.testing.assert_close(probs[row, :n], top[row, :n] / top[row, :n].sum())


def test_repetition_penalty_by_hand() -> None:
    scores = torch.tensor([[2.0, -1.0, 0.5, 4.0]])
    out = penalise_repetition(scores, torch.tensor([[0, 1, 0]]), 2.0)
    assert out.tolist() == [[1.0, -2.0, 0.5, 4.0]]
    assert scores.tolist() == [[2.0, -1.0, 0.5, 4.0]]  # left alone


def test_draws_follow_the_distribution() -> None:
    """A chi-squared statistic of 20,000 inverse-CDF draws, far above any chance when wrong."""
    count = 20_000
    options = GenerationOptions(method="nucleus", top_k=8, top_p=0.95)
    scores = (torch.randn(40) * 1.5).expand(count, -1)
    uniforms = uniform_draws(5, range(count), samples=1, steps=1)
    drawn = nucleus_chooser(options, uniforms, None)(scores, torch.arange(count), 0)
    probs, ids = nucleus(scores[:1], top_k=8, top_p=0.95)
    kept = probs[0] > 0
    observed = torch.bincount(drawn, minlength=40)[ids[0]]
    assert observed.sum() == count
    assert (observed[~kept] == 0).all()
    expected = probs[0][kept].double() * count
    statistic = ((observed[kept] - expected) ** 2 / expected).sum()
    assert statistic < 30  # at most 7 degrees of freedom: 24.3 is passed once in a thousand


def test_captions_do_not_depend_on_the_batch(make_captioner, image_embeds, prompt_ids) -> None:
    model = make_captioner()
    options = {"prompt_ids": prompt_ids, "method": "nucleus", "num_return_sequences": 2, "seed": 11}
    whole = model.generate(image_embeds=image_embeds, **options)
    parts = []
    for chosen in ([4, 1], [0], [2, 3]):
        out = model.generate(image_embeds=image_embeds[chosen], image_ids=chosen, **options)
        rows = out.new_tokens(sep_token_id=102)
        parts += [(i, rows[2 * place : 2 * place + 2]) for place, i in enumerate(chosen)]
    rows = whole.new_tokens(sep_token_id=102)
    assert dict(parts) == {i: rows[2 * i : 2 * i + 2] for i in range(5)}
    assert any(rows[2 * i] != rows[2 * i + 1] for i in range(5))
    other = model.generate(image_embeds=image_embeds, **{**options, "seed": 12})
    assert other.new_tokens(sep_token_id=102) != rows


def test_seed_comes_from_the_generator(captioner, image_embeds, prompt_ids) -> None:
    def run(**source):
        return captioner.generate(
            image_embeds=image_embeds, prompt_ids=prompt_ids, method="nucleus", **source
        ).sequences.tolist()

    first, second = (torch.Generator().manual_seed(s) for s in (1, 1))
    assert run(generator=first) == run(generator=second)
    torch.manual_seed(4)
    without = run()
    assert without != run()
    torch.manual_seed(4)
    assert run() == without
    with pytest.raises(ConfigError, match="not both"):
        run(seed=1, generator=first)


def test_defaults_are_the_papers(reference) -> None:
    options = GenerationOptions()
    assert (options.method, options.num_beams) == ("beam", 3)
    assert (options.max_length, options.min_length, options.penalty) == (20, 5, 1.0)
    sampling = GenerationOptions(method="nucleus")
    assert (sampling.top_p, sampling.top_k, sampling.penalty) == (0.9, 50, 1.1)
    assert GenerationOptions(method="nucleus", repetition_penalty=1.0).penalty == 1.0


def test_result(captioner, image_embeds, prompt_ids) -> None:
    out = captioner.generate(
        image_embeds=image_embeds, prompt_ids=prompt_ids, num_return_sequences=3
    )
    assert out.sequences.shape == (15, int(out.lengths.max()))
    assert (out.sequences[:, :4] == prompt_ids).all()
    assert (out.scores.view(5, 3).diff(dim=1) <= 0).all()  # best first
    for row, length in zip(out.sequences, out.lengths.tolist(), strict=True):
        assert (row[length:] == 0).all()
        assert row[length - 1] == 102 or length == 20
        assert 102 not in row[: length - 1]
    assert not out.sequences.is_inference()  # usable in training afterwards


def test_scores_are_log_likelihoods(make_captioner, image_embeds, prompt_ids) -> None:
    """Teacher forcing gives the same: sampling's score, and beam search's before the length."""
    from blipfast.models.blip import PackedText

    model = make_captioner(dtype=torch.float64)
    embeds = image_embeds.double()
    for options in ({"method": "greedy"}, {"method": "nucleus", "seed": 0}, {"num_beams": 3}):
        out = model.generate(image_embeds=embeds, prompt_ids=prompt_ids, min_length=0, **options)
        mask = torch.arange(out.sequences.shape[1]) < out.lengths[:, None]
        inputs, labels = PackedText.from_padded(out.sequences, mask.long()).shifted()
        log_probs = model.lm_head(model.decode(embeds, inputs)).log_softmax(-1)
        gains = log_probs.gather(1, labels[:, None])[:, 0]
        gains = gains * (inputs.packing.positions >= prompt_ids.numel() - 1)
        total = torch.stack([part.sum() for part in gains.split(list(inputs.packing.lengths))])
        if "num_beams" in options:
            ended = out.sequences.gather(1, out.lengths[:, None] - 1)[:, 0] == 102
            total = total / (out.lengths - ended.long())
        torch.testing.assert_close(out.scores.double(), total, rtol=1e-5, atol=1e-5)


def test_caption_images(reference, vocab_file) -> None:
    model, golden, meta = reference("caption")
    tokenizer = BlipTokenizer.from_file(vocab_file)
    recorded = meta["generate"]["beam3"]
    found = caption_images(model, tokenizer, golden["image"], **recorded["args"])
    sequences = golden["out.beam3.ids"][:, golden["prompt_ids"].shape[1] :].tolist()
    assert found == [tokenizer.decode(row) for row in sequences]
    embeds = model.encode_image(golden["image"])
    again = caption_images(model, tokenizer, image_embeds=embeds, **recorded["args"])
    assert again == found
    assert len(caption_images(model, tokenizer, golden["image"], prompt="", max_length=6)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"min_length": 21}, "min_length must not exceed max_length"),
        ({"min_length": -1}, "min_length must not be negative"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"max_length": 4, "min_length": 0}, "no room"),
        ({"max_length": 65}, "64 positions"),
        ({"method": "nucleus", "top_p": 0.0}, "top_p must lie in"),
        ({"method": "nucleus", "top_p": 1.5}, "top_p must lie in"),
        ({"method": "nucleus", "top_p": float("nan")}, "top_p must lie in"),
        ({"method": "nucleus", "top_k": -1}, "top_k"),
        ({"method": "nucleus", "image_ids": [1]}, "1 image_ids came with 5 images"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"length_penalty": float("inf")}, "length_penalty"),
        ({"method": "beams"}, "method must be one of beam, greedy, nucleus"),
        ({"beam_length": "all"}, "beam_length must be one of"),
        ({"num_return_sequences": 4}, "must not exceed num_beams"),
        ({"method": "greedy", "num_return_sequences": 2}, "must be 1 in greedy"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
        ({"num_beam": 3}, "unknown generation option 'num_beam'"),
        ({"num_beams": 227}, "half the vocabulary"),
        ({"prompt_ids": torch.zeros(0, dtype=torch.long)}, "at least one"),
        ({"prompt_ids": torch.zeros(2, 3, dtype=torch.long)}, "prompt_ids must be"),
        ({"prompt_ids": torch.zeros(3)}, "as integers"),
        ({"prompt_ids": torch.tensor([0, 452])}, "outside the vocabulary"),
    ],
)
def test_bad_arguments(captioner, image_embeds, prompt_ids, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        captioner.generate(image_embeds=image_embeds, **{"prompt_ids": prompt_ids, **options})


def test_images_are_needed(captioner, image_embeds) -> None:
    with pytest.raises(ShapeError, match="either"):
        captioner.generate()
    with pytest.raises(ShapeError, match="either"):
        captioner.generate(torch.zeros(1, 3, 32, 32), image_embeds=image_embeds)
    with pytest.raises(ConfigError, match="at least one image"):
        captioner.generate(image_embeds=image_embeds[:0])
    with pytest.raises(ShapeError, match="pixel_values must be"):
        captioner.generate(torch.zeros(1, 3, 16, 16))
