"""The loop: what it records, what stops it, and that a resumed run is the same run."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from blipfast.errors import CheckpointError, ConfigError, DataError, TrainingError
from blipfast.train.config import FitConfig
from blipfast.train.engine import fit
from blipfast.train.files import write_whole
from blipfast.train.history import History
from blipfast.train.progress import training_progress

sys.path.insert(0, str(Path(__file__).parent))
from toy import Toy, toy_batches, toy_step

CONFIG = FitConfig(
    epochs=2, steps_per_epoch=6, learning_rate=1e-2, warmup_steps=3, grad_clip=1.0, seed=5
)


def run(model, batches, config=CONFIG, **options):
    return fit(model, batches, toy_step, config, title="toy", **options)


def test_learns_and_records_every_step():
    model = Toy()
    history = run(model, toy_batches(), FitConfig(steps=200, learning_rate=3e-2))
    assert history.steps == list(range(200))
    assert set(history.losses) == {"a", "b"}
    total = [a + b for a, b in zip(history.losses["a"], history.losses["b"], strict=True)]
    assert history.total == pytest.approx(total)
    assert history.mean("a", 20) < 0.5 * sum(history.losses["a"][:20]) / 20
    assert history.seconds == sorted(history.seconds)
    assert history.samples_per_second > 0
    assert history.lr[0] == 3e-2


def test_equals_a_plain_loop():
    model, plain = Toy(), Toy()
    run(model, toy_batches(), FitConfig(steps=6, schedule="constant", learning_rate=1e-2))
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.05)
    for batch in toy_batches()[:6]:
        plain(batch["x"], batch["y"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_clipped():
    batches = toy_batches(2)
    history = run(Toy(), batches, FitConfig(steps=1, grad_clip=1e-3))
    assert history.grad_norm[0] > 1e-2  # recorded as it was before clipping
    clipped, free = Toy(), Toy()
    for model, clip in ((clipped, 1e-9), (free, None)):
        run(model, batches, FitConfig(steps=1, grad_clip=clip, weight_decay=0.0, learning_rate=0.1))
    start = torch.cat([p.flatten() for p in Toy().parameters()])
    moved = [torch.cat([p.flatten() for p in m.parameters()]) - start for m in (clipped, free)]
    assert moved[0].abs().max() < 0.3 * moved[1].abs().max()  # Adam's eps shows at that size


def test_bf16_autocasts():
    seen = []

    def step(model, batch, step, epoch):
        seen.append(torch.nn.functional.linear(batch["x"], batch["x"]).dtype)
        return toy_step(model, batch, step, epoch)

    fit(Toy(), toy_batches(), step, FitConfig(steps=2, precision="bf16"), title="toy")
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("stop_after", [1, 6, 7])
def test_resumed_equals_uninterrupted_bitwise(tmp_path, stop_after):
    whole = Toy()
    expected = run(whole, toy_batches())

    def interrupted(model, batch, step, epoch):
        if step == stop_after:
            raise RuntimeError("the machine went down")
        return toy_step(model, batch, step, epoch)

    every = FitConfig(**{**CONFIG.__dict__, "checkpoint_every": 1})
    with pytest.raises(RuntimeError, match="went down"):
        fit(Toy(), toy_batches(), interrupted, every, title="toy", checkpoint_dir=tmp_path)
    torch.manual_seed(99)
    resumed = Toy()
    with torch.no_grad():
        resumed.body[0].weight.zero_()
    got = run(resumed, toy_batches(), checkpoint_dir=tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert (got.total, got.lr, got.steps) == (expected.total, expected.lr, expected.steps)
    assert got.seconds == sorted(got.seconds)
    assert all(p.name.startswith("step-") for p in tmp_path.iterdir())


def test_a_finished_run_resumes_to_its_history(tmp_path):
    first = run(Toy(), toy_batches(), checkpoint_dir=tmp_path)
    again = run(Toy(), toy_batches(), checkpoint_dir=tmp_path, resume=True)
    assert again == first


def test_checkpoint_in_the_way_needs_resume(tmp_path):
    run(Toy(), toy_batches(), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="there already"):
        run(Toy(), toy_batches(), checkpoint_dir=tmp_path)


def test_resume_with_other_settings_names_them(tmp_path):
    run(Toy(), toy_batches(), checkpoint_dir=tmp_path)
    other = FitConfig(**{**CONFIG.__dict__, "learning_rate": 0.5})
    with pytest.raises(ConfigError, match=r"fit\.learning_rate 0\.01, now it is 0\.5"):
        run(Toy(), toy_batches(), other, checkpoint_dir=tmp_path, resume=True)


def test_resume_with_another_model(tmp_path):
    run(Toy(), toy_batches(), checkpoint_dir=tmp_path)
    other = Toy()
    other.body.append(torch.nn.Linear(1, 1))
    other.body[0] = torch.nn.Linear(4, 8, bias=False)
    with pytest.raises(CheckpointError, match="of another model") as caught:
        run(other, toy_batches(), checkpoint_dir=tmp_path, resume=True)
    assert "lacks model.body.4.weight" in str(caught.value)
    assert "has model.body.0.bias" in str(caught.value)
    wider = Toy()
    wider.queue = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r"model.queue is \(4,\) there, \(5,\) here"):
        run(wider, toy_batches(), checkpoint_dir=tmp_path, resume=True)


def newest(folder: Path) -> Path:
    return max(folder.glob("step-*"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\xff" * 64])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    run(Toy(), toy_batches(), checkpoint_dir=tmp_path)
    [tensors] = newest(tmp_path).glob("*.safetensors")
    tensors.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000012 is damaged.*the one before it"):
        run(Toy(), toy_batches(), checkpoint_dir=tmp_path, resume=True)
    (newest(tmp_path) / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000012 is no checkpoint"):
        run(Toy(), toy_batches(), checkpoint_dir=tmp_path, resume=True)


def test_nothing_is_pickled(tmp_path):
    run(Toy(), toy_batches(), checkpoint_dir=tmp_path)
    names = {p.name for p in newest(tmp_path).iterdir()}
    assert all(name.endswith((".safetensors", ".json")) for name in names)


def test_the_newest_are_kept(tmp_path):
    config = FitConfig(**{**CONFIG.__dict__, "checkpoint_every": 1, "keep_checkpoints": 2})
    run(Toy(), toy_batches(), config, checkpoint_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000011", "step-00000012"]


def test_nan_stops_and_names_step_loss_and_records(tmp_path):
    model = Toy()
    with pytest.raises(TrainingError, match=r"toy: step 3: the loss is not finite") as caught:
        run(model, toy_batches(bad=3), checkpoint_dir=tmp_path)
    assert "a nan" in str(caught.value)
    assert "r3-0, r3-1" in str(caught.value)
    assert all(p.isfinite().all() for p in model.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["nonfinite.jsonl"]
    entry = json.loads((tmp_path / "nonfinite.jsonl").read_text())
    assert entry == {"step": 3, "loss": "nan", "keys": [f"r3-{i}" for i in range(5)]}


def test_nan_skipped_leaves_no_trace():
    model = Toy()
    config = FitConfig(**{**CONFIG.__dict__, "on_nonfinite": "skip"})
    history = run(model, toy_batches(bad=3), config)
    assert history.skipped == [3]
    assert history.steps == [0, 1, 2, *range(4, 12)]
    assert all(math.isfinite(value) for value in history.total)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_infinite_gradient_of_a_finite_loss_stops():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    def step(model, batch, step, epoch):
        output = toy_step(model, batch, step, epoch)
        output.a = Bad.apply(output.a)
        return output

    with pytest.raises(TrainingError, match="the gradient is not finite"):
        fit(Toy(), toy_batches(), step, CONFIG, title="toy")


def test_skipping_for_ever_stops():
    batches = toy_batches(1, bad=0)
    config = FitConfig(steps=50, on_nonfinite="skip", max_skips=4)
    with pytest.raises(TrainingError, match="step 5 in a row"):
        run(Toy(), batches, config)


def test_data_that_end():
    with pytest.raises(TrainingError, match="ended after 3 batches"):
        run(Toy(), iter(toy_batches(3)))
    with pytest.raises(TrainingError, match="ended after 0 batches"):
        run(Toy(), [])


def test_a_generator_is_enough_when_long_enough():
    history = run(Toy(), itertools.islice(toy_batches(20), 12))
    assert len(history.steps) == 12


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    config = FitConfig(**{**CONFIG.__dict__, "checkpoint_every": 4})
    real = os.fsync
    synced = []

    def fsync(descriptor):
        synced.append(descriptor)
        if "step-00000008" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TrainingError, match=r"step-00000008.*: the disk is full"):
        run(Toy(), toy_batches(), config, checkpoint_dir=tmp_path)
    monkeypatch.undo()
    assert synced
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    resumed = run(Toy(), toy_batches(), config, checkpoint_dir=tmp_path, resume=True)
    assert resumed.total == run(Toy(), toy_batches()).total


def test_a_really_full_device(tmp_path):
    if not Path("/dev/full").exists():
        pytest.fail("this test needs /dev/full, which Linux has")

    def write(file):
        with open("/dev/full", "wb", buffering=0) as full:
            file.file = full
            torch.save({"w": torch.zeros(100_000)}, file)

    target = tmp_path / "x.pt"
    with pytest.raises(TrainingError, match="the disk is full"):
        write_whole(target, write)
    assert not list(target.parent.iterdir())


def test_other_write_errors_say_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot write .*file"):
        run(Toy(), toy_batches(), checkpoint_dir=tmp_path / "file")


def test_progress_given_or_not(capsys):
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    progress = training_progress(console)
    with progress:
        run(Toy(), toy_batches(), FitConfig(steps=4, log_every=2), progress=progress)
    text = console.file.getvalue()
    assert "toy  step 2/4  a " in text
    assert "toy  step 4/4" in text
    assert progress.tasks[0].completed == 4
    assert "a " in progress.tasks[0].fields["losses"]


def test_history_json(tmp_path):
    history = run(Toy(), toy_batches())
    history.to_json(tmp_path / "history.json")
    assert History.from_json(tmp_path / "history.json") == history
    assert json.loads(history.to_json())["title"] == "toy"
    with pytest.raises(DataError, match="cannot read the history"):
        History.from_json(tmp_path / "none.json")
    (tmp_path / "odd.json").write_text('{"colour": 1}')
    with pytest.raises(DataError, match="no training history"):
        History.from_json(tmp_path / "odd.json")


def test_frozen_model_is_refused():
    with pytest.raises(TrainingError, match="requires gradients"):
        run(Toy().requires_grad_(False), toy_batches())


@pytest.mark.slow
def test_compiled_equals_eager():
    eager, compiled = Toy(), Toy()
    for model in (eager, compiled):
        model.body[2].p = 0.0  # its draws differ when compiled
    first = run(eager, toy_batches())
    second = run(compiled, toy_batches(), FitConfig(**{**CONFIG.__dict__, "compile": True}))
    assert second.total == pytest.approx(first.total, rel=1e-4)
