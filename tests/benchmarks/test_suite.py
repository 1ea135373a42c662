"""The suite's own parts: the baseline computes the same, the page tells what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import original, readme, workloads
from benchmarks.__main__ import digest, main, merged, slug
from benchmarks.bench_vqa_rank import answer_texts
from benchmarks.flops import count_flops
from benchmarks.memory import extra_peak
from benchmarks.op_cases import SWEEPS
from benchmarks.report import Row, write_page
from blipfast.models.config import blip_config
from blipfast.ops import (
    CrossPlan,
    Packing,
    _native,
    cross_attention,
    dense_attention,
    varlen_attention,
)
from blipfast.tasks.pretrain import BlipForPretraining


def small_model() -> BlipForPretraining:
    return BlipForPretraining(blip_config("blip_tiny"), queue_size=24)


def gradients_of(model: BlipForPretraining, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_baseline_gives_the_same_losses_and_gradients() -> None:
    model = small_model().double().eval()
    batch = (workloads.images(4, 32).double(), *workloads.captions(4, vocab_size=1_001))
    batch[1].clamp_(max=449)
    ours = model(*batch, alpha=0.4, step=3)
    gradients = [gradients_of(model, ours.loss)]
    theirs = original.pretrain_losses(
        model, *batch, alpha=0.4, negatives=ours.negatives, update_state=False
    )
    gradients.append(gradients_of(model, sum(theirs)))
    for found, expected in zip(ours.losses().values(), theirs, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_baseline_moves_twin_and_queue_alike() -> None:
    torch.manual_seed(0)
    models = [small_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        with torch.no_grad():
            model.itm_head.bias.add_(1)
            for parameter in model.vision_proj.parameters():
                parameter.add_(0.1)
    batch = (workloads.images(4, 32), *workloads.captions(4))
    batch[1].clamp_(max=449)
    models[0].train()(*batch, alpha=0.0, step=0)
    original.pretrain_losses(models[1].train(), *batch, alpha=0.0)
    for name, value in models[0].state_dict().items():
        if name.startswith(("twin.", "queue.")):
            torch.testing.assert_close(value, models[1].state_dict()[name], atol=1e-5, rtol=1e-5)


def test_workloads_are_as_natural_as_they_say() -> None:
    lengths = workloads.caption_lengths(2_000)
    assert 13 < sum(lengths) / 2_000 < 14
    assert 9 <= min(lengths) <= max(lengths) <= 30
    ids, mask = workloads.captions(8)
    assert (ids[:, 0] == 101).all()
    assert (ids.gather(1, mask.sum(1, keepdim=True) - 1) == 102).all()
    assert not ids[mask == 0].any()
    ids, mask = answer_texts()
    assert ids.shape == (3_128, 8)
    assert mask.sum(1).min() == 3


def test_peak_memory_of_a_call() -> None:
    """Of what it allocates and frees again, and not of what was freed before."""
    torch.ones(2**24)
    found = extra_peak(lambda: torch.ones(2**23).sum())
    assert 28 < found < 45  # 32 MiB


@pytest.mark.parametrize(
    "attention", [torch.nn.functional.scaled_dot_product_attention, dense_attention]
)
def test_flops_count_attention_on_the_cpu(attention: Any) -> None:
    q = torch.randn(1, 2, 16, 32, requires_grad=True)
    forward = 2 * 2 * 2 * 16 * 16 * 32
    assert count_flops(lambda: attention(q, q, q).sum().backward()) == forward + forward * 5 // 2


@pytest.mark.skipif(not _native.avx512(), reason="the C++ operator needs AVX-512")
def test_flops_count_packed_attention_without_padding() -> None:
    packing = Packing.from_lengths([3, 5])
    qkv = torch.randn(8, 3, 2, 32)
    forward = 2 * 2 * 2 * 32 * (3 * 3 + 5 * 5)
    attend = lambda x: varlen_attention(x, packing, impl="native").sum().backward()  # noqa: E731
    assert count_flops(lambda: attend(qkv.requires_grad_())) == forward + forward * 5 // 2
    plan, keys = CrossPlan.build(packing, [1, 1], 2), torch.randn(2, 2, 7, 32)
    q = torch.randn(8, 2, 32)
    cross = lambda: cross_attention(q, keys, keys, plan, impl="native")  # noqa: E731
    assert count_flops(cross) == 2 * 2 * 2 * 32 * 8 * 7


def entry(group: str, code: str, median: float) -> dict:
    stats = {"median": median, "min": median, "max": median, "rounds": 3}
    return {"group": group, "extra_info": {"code": code, "pairs": 64}, "stats": stats}


def test_page_and_json(tmp_path: Path) -> None:
    raw = {
        "datetime": "2030-01-02T03:04:05",
        "machine_info": {"cpu": {"brand_raw": "A CPU", "family": 6, "model": 7}},
        "benchmarks": [entry("work", "blipfast", 0.5), entry("work", "transformers", 2.0)],
    }
    results = json.loads(json.dumps(digest([raw])))
    page = write_page(results, tmp_path / slug("A CPU")).read_text()
    assert "| work | transformers | 2.000 | 2.000 to 2.000 | 4.00 | pairs 64 |" in page
    assert "A CPU, family 6 model 7" in page
    assert torch.__version__ in page
    assert (tmp_path / "a-cpu.svg").read_text().count("4.0x") == 1
    newer = Row("work", "blipfast", 0.4, 0.4, 0.4, 3).to_dict()
    assert merged(results["rows"], [newer]) == [newer]


def test_a_page_of_a_card_compares_the_cards_own_time(tmp_path: Path) -> None:
    """What a caller waits stands beside it, whoever's host was slow."""
    extra = {"microseconds_on_card": 10.0}
    rows = [Row("op", "triton", 0.002, 0.002, 0.002, 3, extra)]
    rows += [Row("op", "eager", 0.001, 0.001, 0.001, 3, {"microseconds_on_card": 400.0})]
    rows += [Row("step", "blipfast", 0.2, 0.2, 0.2, 3), Row("step", "original", 0.3, 0.3, 0.3, 3)]
    results = {
        "command": "python -m benchmarks", "date": "2030-01-02", "notes": ["Said of it."],
        "machine": {"name": "A card", "details": "1 GiB"}, "versions": {"torch": "3"},
        "rows": [row.to_dict() for row in rows],
    }  # fmt: skip
    page = write_page(results, tmp_path / "card").read_text()
    assert "| op | triton | 0.002 | 0.002 to 0.002 | 10 us | 1.00 |  |" in page
    assert "| op | eager | 0.001 | 0.001 to 0.001 | 400 us | 40.00 |  |" in page
    assert "| step | original | 0.300 | 0.300 to 0.300 |  | 1.50 |  |" in page
    assert "\nSaid of it.\n" in page


def test_every_kernel_runs_through_its_operator_in_the_interpreter(tmp_path: Path) -> None:
    """As a user without a GPU tries them: one command, a fresh process, nothing imported before."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--op", "all", "--small", "--out", str(tmp_path)],
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = tmp_path.glob("*-interpreted.json")
    rows = json.loads(found.read_text())["rows"]
    by_code = {code: {r["group"] for r in rows if r["code"] == code} for code in codes(rows)}
    assert {group.split(",")[0] for group in by_code["triton_interpreter"]} == {
        "add_layer_norm",
        "contrastive_softmax",
        "cross_attention",
        "linear_cross_entropy",
        "sample_hard_negatives",
        "varlen_attention forward",
        "varlen_attention",
    }
    assert all(row["extra"]["share_of_roof"] > 0 for row in rows)
    assert found.with_suffix(".md").read_text().count("share_of_roof") == len(rows)


def test_operators_over_sizes(tmp_path: Path) -> None:
    """As the command is given: time, memory and share of the roof of each size, and a picture."""
    command = [sys.executable, "-m", "benchmarks", "--sweep", "--small", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = tmp_path.glob("*-sweep-interpreted.json")
    results = json.loads(found.read_text())
    rows = results["rows"]
    assert results["command"] == "python -m benchmarks --sweep"
    assert {row["extra"]["op"] for row in rows} == set(SWEEPS)
    for op, sweep in SWEEPS.items():
        sizes = {row["extra"]["size"] for row in rows if row["extra"]["op"] == op}
        assert sizes == set(sweep.small)
    assert all(row["extra"]["peak_mib"] >= 0 for row in rows)
    page, picture = found.with_suffix(".md").read_text(), found.with_suffix(".svg").read_text()
    assert "| cross_attention | texts of one image | torch | 1: " in page
    assert picture.count("MiB on top of the inputs") >= len(SWEEPS)


def codes(rows: list[dict]) -> set[str]:
    return {row["code"] for row in rows}


def test_a_device_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--op", "all", "--device", "cuda"])
    assert "no GPU is visible" in capsys.readouterr().err


def test_the_readme_has_the_results() -> None:
    """As `python -m benchmarks.readme` writes it; the widest machine has a figure in each row."""
    found = readme.machines()
    made = readme.table(found)
    assert made in readme.README.read_text()
    picture = readme.PICTURE.read_text()
    assert readme.updated(readme.README.read_text(), made) == readme.README.read_text()
    for machine in found:
        assert machine["machine"]["name"] in picture
    assert "|  |" not in readme.table(found[:1])
    new = "![times as fast](benchmarks/results/speedups.svg)\n\nnew"
    assert readme.updated(f"a\n{readme.BEGIN}\nold\n{readme.END}\nb", "new") == (
        f"a\n{readme.BEGIN}\n{new}\n{readme.END}\nb"
    )
