"""VQA accuracy, NLVR2 and VisDial metrics by worked examples, and whole runs on small shards."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blipfast.checkpoints import save_model
from blipfast.checkpoints.load import build
from blipfast.cli import main
from blipfast.errors import DataError
from blipfast.evaluation.nlvr import nlvr_metrics
from blipfast.evaluation.visdial import Round, ndcg, ranks_of, visdial_metrics
from blipfast.evaluation.vqa import accuracy_by_type, normalise_answer, vqa_accuracy
from blipfast.models.config import blip_config

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from shards import dialogues, pairs, questions, record, tokenizer, write


@pytest.mark.parametrize(
    ("given", "compared"),
    [
        ("The Dog", "dog"), ("two", "2"), ("none", "0"), ("dont", "don't"), ("yes.", "yes"),
        ("couldn'tve", "couldn't've"), ("couldnt've", "couldn't've"), ("red, white", "red white"),
        ("1,000", "1000"), ("3.5", "3.5"), ("black/white", "black white"),
        ("a  t-shirt\n", "t shirt"),
    ],
)  # fmt: skip
def test_answers_are_compared_as_the_official_scorer_does(given, compared):
    assert normalise_answer(given) == compared


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)
def test_accuracy_of_an_answer_that_so_many_gave(count, expected):
    """The published table: 0, 30, 60, 90, 100 percent."""
    annotators = ["yes"] * count + [f"other {n}" for n in range(10 - count)]
    assert vqa_accuracy("Yes", annotators if count < 10 else ["Yes"] * 10) == pytest.approx(
        expected
    )


def test_where_all_agree_answers_are_compared_as_they_are():
    assert vqa_accuracy("the dog", ["dog"] * 10) == 0.0
    assert vqa_accuracy("the dog", ["dog"] * 9 + ["cat"]) == 1.0
    with pytest.raises(DataError, match="without answers"):
        vqa_accuracy("dog", [])


def test_accuracy_by_type():
    got = accuracy_by_type([1.0, 0.0, 0.6], ["yes/no", "other", "other"])
    assert got == pytest.approx({"overall": 160 / 3, "other": 30.0, "yes/no": 100.0})


def test_nlvr_consistency_needs_all_pairs_of_a_sentence():
    got = nlvr_metrics([True, False, True, True], [1, 0, 1, 0], ["a", "a", "b", "b"])
    assert got == {"accuracy": 75.0, "consistency": 50.0}


def test_ndcg_by_hand():
    relevance = (0.0, 1.0, 0.5, 0.0)
    best = 1 + 0.5 / math.log2(3)
    assert ndcg([3, 1, 2, 4], relevance) == pytest.approx(1.0)
    assert ndcg([1, 2, 3, 4], relevance) == pytest.approx((1 / math.log2(3)) / best)
    assert ndcg([1, 3, 4, 2], relevance) == 0.0
    assert ndcg([1, 2], (0.0, 0.0)) == 0.0


def test_ranks_and_metrics():
    assert ranks_of(torch.tensor([0.1, 0.9, 0.1, 0.5])) == [3, 1, 4, 2]
    one = Round(1, ("q",), tuple("abcdefgh"), 2, None)
    rounds = [one, replace(one, right=0), replace(one, right=None, relevance=(1.0,) + (0.0,) * 7)]
    ranks = [[1, 2, 6, 3, 4, 5, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]]
    got = visdial_metrics(rounds, ranks)
    expected = {
        "ndcg": 100,
        "mrr": 50 * (1 / 6 + 1),
        "r@1": 50,
        "r@5": 50,
        "r@10": 100,
        "mean_rank": 3.5,
    }
    assert got == pytest.approx(expected)


def checkpoint(folder: Path, task: str) -> str:
    torch.manual_seed(0)
    made = blip_config("blip_tiny", image_size=32)
    config = replace(made, text=replace(made.text, vocab_size=tokenizer().vocab_size))
    save_model(build(task, config, {}), folder / task)
    tokenizer().save(folder / task)
    return str(folder / task)


def evaluate(tmp_path: Path, capsys, what: str, task: str, *more: str) -> dict:
    argv = ["evaluate", what, "--shards", str(tmp_path / "shards"), "--device", "cpu"]
    argv += ["--checkpoint", checkpoint(tmp_path, task), "--batch_size", "3"]
    status = main([*argv, "--output", str(tmp_path / "out"), *more])
    out, err = capsys.readouterr()
    if status:
        raise DataError(err)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == json.loads(out)
    return json.loads(out)


def test_vqa_by_ranking_and_by_generation(tmp_path, capsys):
    records = [
        replace(r, ids={**r.ids, "question": 50 + n, "answer_type": "yes/no" if n % 2 else "other"})
        for n, r in enumerate(questions(5))
    ]
    write(tmp_path / "shards", records)
    (tmp_path / "answers.json").write_text(json.dumps(["yes", "no", "red"]))
    got = evaluate(tmp_path, capsys, "vqa", "vqa", "--answers", str(tmp_path / "answers.json"))
    rows = json.loads((tmp_path / "out" / "vqa_result.json").read_text())
    assert [row["question_id"] for row in rows] == [50, 51, 52, 53, 54]
    assert {row["answer"] for row in rows} <= {"yes", "no", "red"}
    own = {"yes": 3, "no": 1, "red": 0}  # of four annotators
    share = {a: (min(1, (n - 1) / 3) * n + min(1, n / 3) * (4 - n)) / 4 for a, n in own.items()}
    expected = 100 * sum(share[row["answer"]] for row in rows) / 5
    assert got["accuracy"]["overall"] == pytest.approx(expected)
    assert set(got["accuracy"]) == {"overall", "yes/no", "other"}
    argv = ["evaluate", "vqa", "--shards", str(tmp_path / "shards"), "--device", "cpu"]
    assert main([*argv, "--checkpoint", str(tmp_path / "vqa")]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 5


def test_a_test_part_gives_a_file_for_the_server(tmp_path, capsys):
    write(tmp_path / "shards", [record(n, [("is it?", "question")], question=n) for n in range(3)])
    got = evaluate(tmp_path, capsys, "vqa", "vqa")
    assert got.pop("speed")["pairs_per_second"] > 0
    assert got == {"images": 3, "questions": 3, "bad_records": 0}
    assert len(json.loads((tmp_path / "out" / "vqa_result.json").read_text())) == 3


def test_vqa_ranking_beside_a_pass_for_each_pair(tmp_path, capsys):
    write(tmp_path / "shards", questions(4))
    (tmp_path / "answers.json").write_text(json.dumps(["yes", "no", "dog", "two", "red dog"]))
    more = ["--answers", str(tmp_path / "answers.json"), "--k", "3", "--reference_pairs", "7"]
    got = evaluate(tmp_path, capsys, "vqa", "vqa", *more)["reference"]
    assert got["pairs"] == 6  # two questions
    assert 2 <= got["scored"] <= 6
    assert got["largest_difference_of_log_likelihoods"] < 1e-4
    assert got["times_as_fast"] > 0


def test_nlvr2(tmp_path, capsys):
    write(
        tmp_path / "shards",
        [replace(r, ids={**r.ids, "identifier": f"dev-{r.ids['pair']}"}) for r in pairs(4)],
    )
    got = evaluate(tmp_path, capsys, "nlvr2", "nlvr")
    lines = (tmp_path / "out" / "nlvr2_predictions.csv").read_text().splitlines()
    judged = dict(line.split(",") for line in lines)
    assert set(judged) == {f"dev-{n}" for n in range(4)}
    right = sum((judged[f"dev-{n}"] == "True") == bool(n % 2) for n in range(4))
    assert got["accuracy"] == 25.0 * right
    assert got["pairs"] == 4


def test_a_broken_image_takes_its_partner_out_and_ends_nothing(tmp_path, capsys):
    records = list(pairs(6))
    broken = records[5]  # the second image of the third statement
    records[5] = replace(broken, image=broken.image[: len(broken.image) // 2])
    write(tmp_path / "shards", records)
    got = evaluate(tmp_path, capsys, "nlvr2", "nlvr", "--max_bad_fraction", "0.2")
    assert got["pairs"] == 5
    assert got["bad_records"] == 2
    lines = (tmp_path / "out" / "nlvr2_predictions.csv").read_text().splitlines()
    assert len(lines) == 5
    shutil.rmtree(tmp_path / "nlvr")
    with pytest.raises(DataError, match="partner cannot be used"):
        evaluate(tmp_path, capsys, "nlvr2", "nlvr", "--max_bad_fraction", "0.1")


def test_nlvr2_out_of_step_is_named(tmp_path, capsys):
    records = pairs(3)
    records[1], records[2] = records[2], records[1]
    write(tmp_path / "shards", records)
    with pytest.raises(DataError, match="are no pair"):
        evaluate(tmp_path, capsys, "nlvr2", "nlvr")


def test_visdial(tmp_path, capsys):
    records = [
        replace(r, ids={**r.ids, "relevance_round": 2, "relevance": "1.0 0.0 0.5"})
        for r in dialogues(3)
    ]
    write(tmp_path / "shards", records)
    got = evaluate(tmp_path, capsys, "visdial", "visdial")
    assert got["rounds"] == 9
    rows = json.loads((tmp_path / "out" / "visdial_ranks.json").read_text())
    assert all(sorted(row["ranks"]) == [1, 2, 3] for row in rows)
    right = [row["ranks"][0] for row in rows]
    assert got["mean_rank"] == pytest.approx(sum(right) / 9)
    assert got["r@5"] == 100.0
    dense = [ndcg(row["ranks"], (1.0, 0.0, 0.5)) for row in rows if row["round_id"] == 2]
    assert got["ndcg"] == pytest.approx(100 * sum(dense) / 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [('["yes", "yes"]', "'yes' twice"), ("[]", "a list of answers"), ("[1]", "a list of answers")],
)
def test_an_answer_list_that_cannot_be_used(tmp_path, capsys, content, message):
    write(tmp_path / "shards", questions(3))
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(DataError, match=message):
        evaluate(tmp_path, capsys, "vqa", "vqa", "--answers", str(tmp_path / "answers.json"))


def test_a_checkpoint_of_another_task_is_named(tmp_path, capsys):
    write(tmp_path / "shards", questions(3))
    argv = ["evaluate", "vqa", "--shards", str(tmp_path / "shards"), "--device", "cpu"]
    assert main([*argv, "--checkpoint", checkpoint(tmp_path, "nlvr")]) == 2
    assert "vqa" in capsys.readouterr().err
