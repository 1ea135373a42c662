"""Batches from shards: complete, repeatable, resumable, and unbothered by bad records."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blipfast.data import View
from blipfast.errors import ConfigError, DataError
from blipfast.train.batches import ShardBatches, count_samples
from blipfast.train.config import DataConfig

sys.path.insert(0, str(Path(__file__).parent))
from shards import captions, dialogues, pairs, picture, questions, record, tokenizer, write


def make(folder, records, task="pretrain", **values):
    write(folder, records)
    config = DataConfig(shards=str(folder), batch_size=4, threads=2, **values)
    return ShardBatches(config, tokenizer(), 32, task)


def keys(batches):
    return [batch["keys"] for batch in batches]


def test_an_epoch_has_every_sample_once(tmp_path):
    batches = make(tmp_path, captions(20, each=2), drop_last=False)
    epoch = list(batches.epoch(0))
    seen = sorted(itertools.chain(*keys(epoch)))
    assert seen == sorted(f"r{n:03d}" for n in range(20) for _ in range(2))
    assert count_samples(batches.config, "pretrain") == 40
    batch = epoch[0]
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["image_ids"].tolist() == [int(key[1:]) for key in batch["keys"]]
    assert batch["input_ids"].shape[1] <= 30


def test_drop_last(tmp_path):
    batches = make(tmp_path, captions(10))
    assert len(list(batches.epoch(0))) == 2
    kept = ShardBatches(replace(batches.config, drop_last=False), tokenizer(), 32, "pretrain")
    assert [len(names) for names in keys(kept.epoch(0))] == [4, 4, 2]


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path):
    first = make(tmp_path, captions(20), shuffle_buffer=8)
    more_threads = ShardBatches(replace(first.config, threads=5), tokenizer(), 32, "pretrain")
    other_seed = ShardBatches(replace(first.config, seed=1), tokenizer(), 32, "pretrain")
    reference = list(first.epoch(0))
    assert keys(reference) == keys(more_threads.epoch(0))
    for ours, theirs in zip(reference, more_threads.epoch(0), strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert keys(reference) != keys(other_seed.epoch(0))
    assert keys(reference) != keys(first.epoch(1))


def test_no_shuffling_keeps_the_order(tmp_path):
    batches = make(tmp_path, captions(12), shuffle_buffer=0)
    assert list(itertools.chain(*keys(batches.epoch(3)))) == [f"r{n:03d}" for n in range(12)]


@pytest.mark.parametrize("after", [1, 4, 5, 7])
def test_a_stream_goes_on_where_it_was(tmp_path, after):
    records = captions(18)
    records[3] = record(3, [("a dog", "human")], image=picture(3)[:200])  # truncated
    batches = make(tmp_path, records, max_bad_fraction=0.2)
    whole = list(itertools.islice(batches, 9))
    rest = list(itertools.islice(batches.stream(whole[after - 1]["position"]), 9 - after))
    assert keys(rest) == keys(whole[after:])
    for ours, theirs in zip(rest, whole[after:], strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_bad_records_are_named_and_the_others_go_on(tmp_path):
    records = captions(20)
    records[5] = record(5, [("a dog", "human")], image=picture(5)[:300])
    records[9] = record(9, [("...", "human")])
    batches = make(tmp_path, records, max_bad_fraction=0.2, drop_last=False)
    seen = set(itertools.chain(*keys(batches.epoch(0))))
    assert seen == {f"r{n:03d}" for n in range(20)} - {"r005", "r009"}
    reasons = {bad.key: bad.reason for bad in batches.quarantine}
    assert set(reasons) == {"r005", "r009"}
    assert "truncated" in reasons["r005"]
    assert "empty after clean-up" in reasons["r009"]


def test_too_many_bad_records_end_it(tmp_path):
    records = captions(20)
    records[5] = record(5, [("a dog", "human")], image=picture(5)[:300])
    batches = make(tmp_path, records)
    with pytest.raises(DataError, match=r"1 of 20 samples .* r005: .*truncated"):
        list(batches.epoch(0))


def test_ranks_share_an_epoch_and_others_go_on(tmp_path):
    """Two ranks, one with bad samples, are stopped; three go on: every sample comes once."""
    records = captions(50)
    for n in (3, 17, 18):
        records[n] = record(n, [("a dog", "human")], image=picture(n)[:200])
    config = make(tmp_path, records, max_bad_fraction=0.2, shuffle_buffer=20).config
    seen, positions = [], []
    for rank in range(2):
        part = ShardBatches(config, tokenizer(), 32, "pretrain", rank, 2)
        batches = list(itertools.islice(part.stream(None), 2))
        seen += itertools.chain(*keys(batches))
        positions.append(json.loads(json.dumps(batches[-1]["position"])))
    state = json.loads(json.dumps(ShardBatches.combine_positions(positions)))
    for rank in range(3):
        part = ShardBatches(replace(config, batch_size=1), tokenizer(), 32, "pretrain", rank, 3)
        for batch in part.stream(state):
            if batch["position"]["epoch"] > 0:
                break
            seen += batch["keys"]
    assert sorted(seen) == [f"r{n:03d}" for n in range(50) if n not in (3, 17, 18)]


def test_sets_are_mixed_by_weight(tmp_path):
    write(tmp_path / "a", captions(12))
    write(tmp_path / "b", [record(n, [("a cat", "web")]) for n in range(100, 104)])
    mix = {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 3.0}
    config = DataConfig(mix=mix, batch_size=4, drop_last=False)
    batches = ShardBatches(config, tokenizer(), 32, "pretrain")
    assert count_samples(config, "pretrain") == 24
    times = Counter(itertools.chain(*keys(batches.epoch(0))))
    assert times == {
        **{f"r{n:03d}": 1 for n in range(12)},
        **{f"r{n:03d}": 3 for n in range(100, 104)},
    }
    with pytest.raises(ConfigError, match="not both"):
        DataConfig(shards="a", mix=mix)
    with pytest.raises(ConfigError, match="must be > 0"):
        DataConfig(mix={"a": 0.0})


def test_batches_are_even_in_tokens(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 20, 64)
    records = [record(n, [("dog " * int(k), "web")]) for n, k in enumerate(lengths)]
    even = make(tmp_path, records, augment=False)
    plain = ShardBatches(replace(even.config, even_lengths=False), tokenizer(), 32, "pretrain")
    spread = [
        np.std([int(batch["attention_mask"].sum()) for batch in batches.epoch(0)])
        for batches in (even, plain)
    ]
    assert spread[0] < 0.3 * spread[1]


def test_too_few_samples_for_a_batch(tmp_path):
    with pytest.raises(DataError, match="do not fill one batch of 4"):
        next(iter(make(tmp_path, captions(3))))


def test_no_shards(tmp_path):
    with pytest.raises(DataError, match="no shard matches"):
        ShardBatches(DataConfig(shards=str(tmp_path / "x-*.tar")), tokenizer(), 32, "pretrain")


def test_one_drawn_text_per_image(tmp_path):
    batches = make(tmp_path, captions(12, each=3), texts="random", augment=False)
    assert count_samples(batches.config, "pretrain") == 12
    assert sorted(itertools.chain(*keys(batches.epoch(0)))) == [f"r{n:03d}" for n in range(12)]
    epochs = [batch for e in range(3) for batch in batches.epoch(e)]
    texts = [tuple(row.tolist()) for batch in epochs for row in batch["input_ids"]]
    assert len(set(texts)) > 12


def test_captions_start_with_the_prompt(tmp_path):
    batches = make(tmp_path, captions(4), "caption", prompt="a picture of ", max_length=40)
    batch = next(iter(batches))
    prompt = tokenizer()("a picture of", kind="raw").input_ids[0, :-1]
    assert batch["prompt_length"] == len(prompt)
    for row in batch["input_ids"]:
        assert torch.equal(row[: len(prompt)], prompt)


def test_vqa_weighs_answers_by_annotators(tmp_path):
    genome = record(3, [("What is it?", "question"), ("a dog", "genome_answer")])
    batches = make(tmp_path, [*questions(3), genome], "vqa", shuffle_buffer=0)
    batch = next(iter(batches))
    assert batch["answers_per_question"] == [2, 2, 2, 1]
    expected = [0.75, 0.25, 0.75, 0.25, 0.75, 0.25, 0.2]
    assert batch["weights"].tolist() == pytest.approx(expected)
    assert batch["answer_ids"].shape[0] == 7
    assert count_samples(batches.config, "vqa") == 4


def test_vqa_without_an_answer_is_set_aside(tmp_path):
    odd = record(9, [("Is it?", "question")])
    batches = make(tmp_path, [*questions(4), odd], "vqa", max_bad_fraction=0.5)
    list(batches.epoch(0))
    assert [bad.key for bad in batches.quarantine] == ["r009"]
    assert "at least one answer" in batches.quarantine[0].reason


def test_visdial_draws_a_round_with_a_wrong_answer(tmp_path):
    batches = make(tmp_path, dialogues(4), "visdial", shuffle_buffer=0, augment=False)
    seen = set()
    for epoch in range(6):
        batch = next(batches.epoch(epoch))
        assert tokenizer().decode(batch["input_ids"][0]) == "a dog in the snow"
        assert batch["image_index"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert batch["labels"].tolist() == [1, 0] * 4
        texts = [tokenizer().decode(row) for row in batch["dialogue_ids"]]
        for right, wrong in zip(texts[0::2], texts[1::2], strict=True):
            number = int(right.rpartition("dog ")[2][0])
            assert right.endswith(f"is it dog {number} yes {number}")
            assert wrong.endswith((f"is it dog {number} no", f"is it dog {number} red"))
            history = " ".join(f"is it dog {n} yes {n}" for n in range(1, number))
            assert right.startswith(history)
            seen.add(wrong)
    assert len(seen) == 6, "all rounds and wrong answers are drawn"


def test_a_long_dialogue_loses_its_beginning(tmp_path):
    batches = make(
        tmp_path, dialogues(4, rounds=9), "visdial", max_dialogue_length=16, augment=False
    )
    for epoch in range(4):
        batch = next(batches.epoch(epoch))
        assert batch["dialogue_ids"].shape[1] <= 16
        for row in batch["dialogue_ids"][0::2]:
            assert " yes " in tokenizer().decode(row)


def test_a_dialogue_without_options_is_set_aside(tmp_path):
    odd = record(9, [("a dog", "caption"), ("is it", "question"), ("yes", "answer")])
    batches = make(tmp_path, [*dialogues(4), odd], "visdial", max_bad_fraction=0.5)
    list(batches.epoch(0))
    assert [bad.key for bad in batches.quarantine] == ["r009"]
    assert "another option" in batches.quarantine[0].reason


@pytest.mark.parametrize("task", ["pretrain", "nlvr"])
def test_pixels_are_made_on_the_device(tmp_path, task):
    """A device without contents shows that they go there, and the texts do not."""
    records = pairs(8) if task == "nlvr" else captions(8)
    batches = make(tmp_path, records, task)
    batches.device = torch.device("meta")
    batch = next(batches.epoch(0))
    assert batch["pixel_values"].device.type == "meta"
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].shape[-3:] == (3, 32, 32)
    assert batch["input_ids"].device.type == "cpu"


def test_nlvr_pairs_change_sides_with_their_words(tmp_path):
    batches = make(tmp_path, pairs(16), "nlvr", augment=False, shuffle_buffer=0)
    plain = list(batches.epoch(0))
    assert plain[0]["pixel_values"].shape == (4, 2, 3, 32, 32)
    assert plain[0]["labels"].tolist() == [0, 1, 0, 1]
    batches.config = replace(batches.config, augment=True)
    batches._transform.plan = lambda width, height, rng: View(32, (0, 0, width, height))
    swapped = 0
    for before, after in zip(plain, batches.epoch(0), strict=True):
        for i in range(4):
            same = torch.equal(before["pixel_values"][i], after["pixel_values"][i])
            assert torch.equal(after["pixel_values"][i], before["pixel_values"][i].flip(0)) != same
            text = tokenizer().decode(after["input_ids"][i])
            assert ("left" in text) == same
            swapped += not same
    assert 0 < swapped < 16
    assert count_samples(batches.config, "nlvr") == 16


def test_nlvr_without_a_partner_is_set_aside(tmp_path):
    records = pairs(4)
    del records[4]
    batches = make(tmp_path, records, "nlvr", max_bad_fraction=0.5)
    list(batches.epoch(0))
    assert [bad.key for bad in batches.quarantine] == ["r005"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch_size": 0}, r"data\.batch_size"),
        ({"max_length": 2}, r"data\.max_length"),
        ({"shuffle_buffer": -1}, r"data\.shuffle_buffer"),
        ({"max_bad_fraction": 1.5}, r"data\.max_bad_fraction"),
    ],
)
def test_settings_out_of_range(values, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(**values)
