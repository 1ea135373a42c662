"""Equal to transformers' BLIP classes on the same random weights, read from their directories."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from blipfast import load_model
from blipfast.checkpoints import save_hf
from blipfast.data import BlipTokenizer, EvalTransform
from blipfast.models.blip import PackedText
from blipfast.models.config import blip_config
from blipfast.tasks.caption import BlipForCaptioning

VOCAB = Path(__file__).parents[1] / "fixtures" / "reference" / "vocab.txt"
DEC, ENC = 150, 151
TINY = {
    "text": {
        "vocab_size": 152, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 40, "bos_token_id": DEC,
        "eos_token_id": 102, "label_smoothing": 0.1,
    },
    "vision": {
        "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    },
}  # fmt: skip
BASE = {
    "text": {
        "num_attention_heads": 12, "hidden_size": 768, "label_smoothing": 0.1,
        "num_hidden_layers": 12,
    },
    "vision": {"image_size": 224},
}  # fmt: skip


def _theirs(name: str, sizes: dict, folder: Path):
    config = transformers.BlipConfig(
        text_config=sizes["text"], vision_config=sizes["vision"], image_text_hidden_size=16
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():  # away from the tiny weights and zero biases of a fresh model
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def _batch(sizes: dict, first: int, lengths: list[int]):
    dec = sizes["text"].get("vocab_size", 30_524) - 2
    size = sizes["vision"]["image_size"]
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(103, dec, mask.shape)
    ids[:, 0] = dec + first
    return torch.randn(len(lengths), 3, size, size), ids * mask, mask


def _close(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


def _check_caption(sizes: dict, lengths: list[int], folder: Path, atol: float) -> None:
    theirs = _theirs("BlipForConditionalGeneration", sizes, folder)
    ours, report = load_model(folder, return_report=True)
    assert not report.fresh
    assert not report.copied
    pixels, ids, mask = _batch(sizes, 0, lengths)
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels)
        out = ours(pixels, ids, mask)
        text = PackedText.from_padded(ids, mask)
        embeds = ours.encode_image(pixels)
        _close(embeds, expected.last_hidden_state, atol)
        logits = ours.text_decoder.lm_head(ours.decode(embeds, text))
    theirs_loss = expected.loss
    assert out.loss.item() == pytest.approx(theirs_loss.item(), rel=1e-5)
    _close(logits, text.packing.unpad(expected.logits), atol)


def test_captioning(tmp_path: Path) -> None:
    _check_caption(TINY, [9, 4, 6], tmp_path, 1e-5)


@pytest.mark.slow
def test_captioning_at_base_size(tmp_path: Path) -> None:
    _check_caption(BASE, [12, 7], tmp_path, 2e-3)


def test_retrieval(tmp_path: Path) -> None:
    theirs = _theirs("BlipForImageTextRetrieval", TINY, tmp_path)
    ours, report = load_model(tmp_path, return_report=True)
    assert report.fresh == {"temperature": ["temp"]}
    pixels, ids, mask = _batch(TINY, 1, [9, 4, 6])
    text = PackedText.from_padded(ids, mask)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels, attention_mask=mask).itm_score
        embeds = ours.encode_image(pixels)
        _close(ours.match(text, ours.image_states(embeds), range(3)), expected, 1e-5)
        ids[:, 0] = 101
        expected = theirs(
            input_ids=ids, pixel_values=pixels, attention_mask=mask, use_itm_head=False
        ).itm_score
        _close(ours.image_features(embeds) @ ours.text_features(text).T, expected, 1e-5)


def test_question_answering(tmp_path: Path) -> None:
    """Question by question: transformers' cross-attention drops the mask of padded questions."""
    theirs = _theirs("BlipForQuestionAnswering", TINY, tmp_path)
    ours = load_model(tmp_path)
    question_lengths, answer_lengths = [9, 4, 6], [3, 5, 4]
    pixels, ids, mask = _batch(TINY, 1, question_lengths)
    _, answer_ids, answer_mask = _batch(TINY, 0, answer_lengths)
    with torch.no_grad():
        losses = ours(
            pixels,
            ids,
            mask,
            answer_ids,
            answer_mask,
            answers_per_question=[1, 1, 1],
            weights=torch.ones(3),
        ).loss_per_answer
        for i, (question, answer) in enumerate(zip(question_lengths, answer_lengths, strict=True)):
            expected = theirs(
                input_ids=ids[i : i + 1, :question],
                pixel_values=pixels[i : i + 1],
                attention_mask=mask[i : i + 1, :question],
                decoder_input_ids=answer_ids[i : i + 1, :answer],
                decoder_attention_mask=answer_mask[i : i + 1, :answer],
                labels=answer_ids[i : i + 1, :answer],
            )
            mean = losses[i].item() / (answer - 1)
            assert mean == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "name",
    ["BlipForConditionalGeneration", "BlipForQuestionAnswering", "BlipForImageTextRetrieval"],
)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Theirs, ours, and theirs again: no key missing or unexpected, every bit the same."""
    theirs = _theirs(name, TINY, tmp_path / "theirs")
    save_hf(load_model(tmp_path / "theirs"), tmp_path / "ours")
    again, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, expected = again.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, expected[key]), key
    for part in ("text_config", "vision_config"):
        before, after = (getattr(m.config, part).to_dict() for m in (theirs, again))
        differing = {k for k in before if before[k] != after.get(k)}
        ignored = {"dtype"}  # written where it was implied
        if name == "BlipForImageTextRetrieval":
            ignored.add("label_smoothing")  # it has no language model
        assert differing <= ignored, differing


def test_shards_and_pickles(tmp_path: Path) -> None:
    theirs = _theirs("BlipForConditionalGeneration", TINY, tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    state = theirs.state_dict()
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, old / "pytorch_model.bin")
    whole = load_model(tmp_path / "whole").state_dict()
    for folder in ("shards", "old"):
        model, report = load_model(tmp_path / folder, return_report=True)
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, whole[key]), key
        assert set(report.unused) == ({"position ids"} if folder == "old" else set())


def test_their_processor_reads_what_we_write(tmp_path: Path) -> None:
    """The same pixels as ours but for the last bit of bicubic rounding, and the same ids."""
    tokenizer = BlipTokenizer.from_file(VOCAB)
    model = BlipForCaptioning(blip_config("blip_tiny"))
    save_hf(model, tmp_path / "hf", tokenizer)
    processor = transformers.BlipProcessor.from_pretrained(tmp_path / "hf")
    picture = Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    text = "a picture of two cats"
    theirs = processor(images=picture, text=text, return_tensors="pt")
    size = model.config.vision.image_size
    pixels = EvalTransform(size)(picture)
    assert theirs["pixel_values"][0].shape == pixels.shape
    torch.testing.assert_close(theirs["pixel_values"][0], pixels, atol=0.02, rtol=0)
    assert theirs["input_ids"].tolist() == tokenizer(text).input_ids.tolist()
