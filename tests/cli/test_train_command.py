"""`blipfast train`: from shards to a model that captions, and what may stop it."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from shards import VOCABULARY, captions, write

import blipfast
from blipfast.cli import main
from blipfast.train.checkpoints import read_facts


def train(folder: Path, *more: str) -> list[str]:
    options = """--config caption_coco --model.preset blip_tiny --model.image_size 32
        --data.batch_size 4 --data.threads 1 --device cpu""".split()  # noqa: SIM905
    return [
        "train", *options, "--data.shards", str(folder / "shards"), "--data.vocabulary",
        str(VOCABULARY), "--output", str(folder / "run"), *more,
    ]  # fmt: skip


def test_train_then_caption_with_what_it_wrote(tmp_path, pictures, run):
    write(tmp_path / "shards", captions(8))
    status, out, _ = run(*train(tmp_path, "--fit.steps", "3"))
    model = out.splitlines()[-1]
    assert (status, model) == (0, str(tmp_path / "run" / "model"))
    assert run("caption", str(pictures), "--checkpoint", model, "--device", "cpu")[0] == 0
    status, _, err = run(*train(tmp_path, "--fit.steps", "3"))
    assert status == 2
    assert "holds a run already" in err


def test_printed_config_reads_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "vqa", "--fit.seed", "11", "--print_config"])
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "mine.yaml"), "--print_config"])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "mine.yaml").read_text()
    assert "seed: 11" in printed


def test_a_nan_stops_with_the_records_named(tmp_path, run):
    write(tmp_path / "shards", captions(8))
    argv = train(tmp_path, "--fit.steps", "60", "--fit.learning_rate", "1e30")
    status, _, err = run(*argv)
    assert status == 2
    assert "is not finite" in err
    assert "r00" in err
    assert not (tmp_path / "run" / "model").exists()


def test_sigint_leaves_whole_files_and_a_run_to_resume(tmp_path):
    write(tmp_path / "shards", captions(8))
    command = [sys.executable, "-m", "blipfast.cli", *train(tmp_path, "--fit.log_every", "1")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--fit.steps", "100000", "--fit.epochs", "null"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "step 3/" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "stopped by Ctrl-C" in err
    assert "Traceback" not in err
    files = sorted(p.relative_to(tmp_path / "run") for p in (tmp_path / "run").rglob("*.*"))
    [saved] = (tmp_path / "run" / "checkpoint").glob("step-*")
    assert {f.parts[0] for f in files} == {"checkpoint", "tensorboard", "train.json"}
    reached = read_facts(saved)["step"]
    more = ["--fit.epochs", "null", "--fit.steps", str(reached + 2), "--resume", "true"]
    assert main(train(tmp_path, *more)) == 0
    assert blipfast.load_model(tmp_path / "run" / "model") is not None


def test_output_closed_early_is_no_crash():
    command = f"{sys.executable} -m blipfast.cli info --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_full_disk_while_writing_the_model(tmp_path, monkeypatch, run):
    write(tmp_path / "shards", captions(8))

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    real = open

    def opener(path, mode="r", *args, **kwargs):
        full = mode == "wb" and "state.json" in str(path)
        return Full(path, mode) if full else real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", opener)
    status, _, err = run(*train(tmp_path, "--fit.steps", "2"))
    assert status == 2
    assert "the disk is full" in err
    assert not any((tmp_path / "run" / "checkpoint").iterdir())
