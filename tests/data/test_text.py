"""Clean-up and tokenisation against the recorded pairs of the original, and bad input."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blipfast.data import BlipTokenizer, load_tokenizer, pre_caption, pre_question
from blipfast.errors import ConfigError, DataError

REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"
PAIRS = json.loads((REFERENCE / "text_and_schedules.json").read_text(encoding="utf-8"))
VOCAB = REFERENCE / "vocab.txt"
TOKENIZER = BlipTokenizer.from_file(VOCAB)


@pytest.mark.parametrize("pair", PAIRS["pre_caption_and_question"])
def test_clean_up_equals_the_original(pair: dict[str, str]) -> None:
    assert pre_caption(pair["text"], 30) == pair["caption_30"]
    assert pre_caption(pair["text"], 50) == pair["caption_50"]
    assert pre_question(pair["text"], 50) == pair["question"]
    assert pre_question(pair["text"], 10) == pair["question_10"]


@pytest.mark.parametrize("pair", PAIRS["tokenisation"])
def test_tokenisation_equals_the_original(pair: dict[str, object]) -> None:
    batch = TOKENIZER([str(pair["text"])], max_length=64, kind="raw", allow_empty=True)
    assert batch.input_ids.tolist() == [pair["ids"]]
    assert batch.attention_mask.all()


def test_special_ids_stand_where_bert_has_them() -> None:
    assert (TOKENIZER.pad_token_id, TOKENIZER.cls_token_id, TOKENIZER.sep_token_id) == (0, 101, 102)
    assert (TOKENIZER.dec_token_id, TOKENIZER.enc_token_id) == (450, 451)
    assert TOKENIZER.vocab_size == 452


def test_batch_is_padded_right_and_cut_with_sep_kept() -> None:
    texts = ["a dog", "a dog sitting on the street by the old house"]
    batch = TOKENIZER(texts, max_length=6)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.input_ids.tolist()[0] == [101, 142, 211, 102, 0, 0]
    assert batch.input_ids[1, 0] == 101
    assert batch.input_ids[1, 5] == 102
    assert batch.lengths.tolist() == [4, 6]
    assert len(batch) == 2
    wide = TOKENIZER(texts[:1], max_length=30, padding="max_length")
    assert wide.input_ids.shape == (1, 30)
    assert int(wide.attention_mask.sum()) == 4
    assert TOKENIZER([]).input_ids.shape == (0, 2)
    assert TOKENIZER("a dog").to("cpu").input_ids.shape == (1, 4)


def test_kinds_clean_up_differently() -> None:
    text = "12:30"
    assert TOKENIZER.decode(TOKENIZER(text).input_ids[0]) == "12 30"
    assert TOKENIZER(text, kind="question").input_ids.shape[1] > 3
    assert TOKENIZER.vocab.index(":") in TOKENIZER(text, kind="raw").input_ids[0].tolist()


def test_special_words_in_a_text_stay_text() -> None:
    ids = TOKENIZER("a [SEP] [DEC] dog [PAD]", kind="raw").input_ids[0].tolist()
    assert ids.count(102) == 1
    assert ids[-1] == 102
    assert 0 not in ids
    assert 450 not in ids


def test_decode_round_trip() -> None:
    text = "two women -- near a red car"
    ids = TOKENIZER(text).input_ids
    assert TOKENIZER.decode(ids[0]) == "two women - - near a red car"
    assert TOKENIZER.decode(ids[0], skip_special_tokens=False).startswith("[CLS] two")
    assert TOKENIZER.batch_decode(ids) == ["two women - - near a red car"]
    assert TOKENIZER.decode([]) == ""
    with pytest.raises(DataError, match="452"):
        TOKENIZER.decode([452])


@pytest.mark.parametrize("empty", ["", "...", "  ", "\n", "\u200b"])
def test_empty_caption_names_its_place(empty: str) -> None:
    with pytest.raises(DataError, match="text 1 is empty"):
        TOKENIZER(["a dog", empty])
    batch = TOKENIZER(["a dog", empty], allow_empty=True)
    assert batch.input_ids[1].tolist() == [101, 102, 0, 0]


def test_bytes_and_broken_text() -> None:
    assert TOKENIZER("café".encode()).input_ids.tolist() == TOKENIZER("café").input_ids.tolist()
    for broken in ("café".encode("latin-1"), "caf\udce9"):
        with pytest.raises(DataError, match=r"text 1 .*convert"):
            TOKENIZER(["a dog", broken])
    with pytest.raises(DataError, match="text 0 is a int"):
        TOKENIZER([3])  # type: ignore[list-item]


def test_bad_options() -> None:
    with pytest.raises(DataError, match="at least 3"):
        TOKENIZER("a dog", max_length=2)
    with pytest.raises(DataError, match="kind"):
        TOKENIZER("a dog", kind="essay")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="padding"):
        TOKENIZER("a dog", padding="left")  # type: ignore[arg-type]


def test_save_and_load(tmp_path: Path) -> None:
    file = TOKENIZER.save(tmp_path)
    assert file == tmp_path / "vocab.txt"
    for again in (BlipTokenizer.from_file(file), BlipTokenizer.from_pretrained_dir(tmp_path)):
        assert again.vocab == TOKENIZER.vocab
    assert pickle.loads(pickle.dumps(TOKENIZER)).vocab == TOKENIZER.vocab
    assert [p.name for p in tmp_path.iterdir()] == ["vocab.txt"]
    with pytest.raises(DataError, match="cannot write"):
        TOKENIZER.save(tmp_path / "none" / "vocab.txt")


def test_the_vocabulary_given_or_the_one_beside_a_model(tmp_path: Path) -> None:
    bare, model = tmp_path / "bare", tmp_path / "model"
    for folder in (bare, model):
        folder.mkdir()
    weights = model / "model.safetensors"
    file = TOKENIZER.save(model)
    for found in (
        load_tokenizer(file),
        load_tokenizer(model, bare),
        load_tokenizer(None, None, bare, model),
        load_tokenizer(None, weights),
    ):
        assert found.vocab == TOKENIZER.vocab
    with pytest.raises(ConfigError, match=r"no vocab.txt beside the checkpoint .*bare"):
        load_tokenizer(None, bare)
    with pytest.raises(ConfigError, match="no vocabulary"):
        load_tokenizer(None)
    with pytest.raises(DataError, match="cannot read"):
        load_tokenizer(bare / "vocab.txt", model)


def test_tokenizer_json(tmp_path: Path) -> None:
    TOKENIZER._backend.save(str(tmp_path / "tokenizer.json"))
    assert BlipTokenizer.from_pretrained_dir(tmp_path).vocab == TOKENIZER.vocab
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match="not a WordPiece"):
        BlipTokenizer.from_pretrained_dir(tmp_path)
    with pytest.raises(DataError, match="neither"):
        BlipTokenizer.from_pretrained_dir(tmp_path / "none")


def test_bad_vocabulary_files(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    with pytest.raises(DataError, match="cannot read"):
        BlipTokenizer.from_file(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        BlipTokenizer.from_file(file)
    file.write_text("dog\ncat\n")
    with pytest.raises(DataError, match=r"vocab.txt: .*\[PAD\]"):
        BlipTokenizer.from_file(file)
    file.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\ndog\ndog\n")
    with pytest.raises(DataError, match="twice"):
        BlipTokenizer.from_file(file)


def test_agrees_with_transformers() -> None:
    import transformers

    theirs = transformers.BertTokenizerFast(str(VOCAB), do_lower_case=True)
    for pair in PAIRS["pre_caption_and_question"]:
        text = pair["caption_30"]
        ours = TOKENIZER(text, max_length=64, kind="raw", allow_empty=True).input_ids[0]
        assert ours.tolist() == theirs(text)["input_ids"]
        assert TOKENIZER.decode(ours) == theirs.decode(ours, skip_special_tokens=True)


WORDS = st.sampled_from([p for p in TOKENIZER.vocab if p.isalpha()])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(WORDS, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=4))
def test_subset_tokenises_like_its_base(texts: list[str]) -> None:
    small, rows = BlipTokenizer.subset(texts, TOKENIZER)
    assert rows.shape == (small.vocab_size - 2,)
    assert rows.tolist() == sorted(rows.tolist())
    assert [small.pad_token_id, small.cls_token_id, small.sep_token_id] == [0, 101, 102]
    assert [TOKENIZER.vocab[i] for i in rows] == list(small.vocab[:-2])
    full = torch.cat([rows, torch.tensor([TOKENIZER.dec_token_id, TOKENIZER.enc_token_id])])
    ours, base = small(texts, kind="raw"), TOKENIZER(texts, kind="raw")
    assert torch.equal(full[ours.input_ids], base.input_ids)


def test_subset_is_smaller_and_spells_new_words() -> None:
    small, _ = BlipTokenizer.subset(["a dog"], VOCAB)
    assert small.vocab_size < 250
    ids = small("xylophone", kind="raw").input_ids[0].tolist()
    assert small.vocab.index("[UNK]") not in ids
    assert small.decode(ids) == "xylophone"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_clean_up_properties(text: str) -> None:
    cleaned = pre_caption(text)
    assert not set(cleaned) & set('.!"()*#:;~')
    assert not cleaned.startswith(" ")
    assert "  " not in cleaned
    assert pre_caption(text, 3).count(" ") <= 2
    batch = TOKENIZER(text, max_length=12, allow_empty=True)
    assert batch.input_ids[0, 0] == 101
    assert batch.input_ids[0, -1] == 102
    assert batch.input_ids.shape[1] <= 12
