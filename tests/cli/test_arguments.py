"""Help, and errors that name the key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import blipfast
import blipfast.cli.info as info
from blipfast.cli import COMMANDS, main


def test_help_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(name in out for name in COMMANDS)
    assert "examples:" in out
    assert run()[0] == 2
    assert blipfast.__version__ in run("--version")[1]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_command_has_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"blipfast {command}" in out
    assert "examples:" in out
    assert "<class" not in out


def test_help_does_not_wait_for_torch():
    script = (
        "import sys, blipfast.cli\n"
        "blipfast.cli.main(['--help'])\n"
        "try: blipfast.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "learning_rate" in done.stdout


def test_unknown_command(run):
    status, _, err = run("captoin")
    assert status == 2
    assert err == "blipfast: error: no command 'captoin'; did you mean caption?\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fit.learning_rat", "1"], "--fit.learning_rat 1; did you mean fit.learning_rate?"),
        (["--fit.learning_rate", "fast"], "fit.learning_rate: expected float, got fast"),
        (["--fit.steps", "2.5"], "fit.steps: expected int or null, got 2.5"),
        (["--fit.betas", "3"], "fit.betas: expected tuple, got 3"),
        (["--task", "dance"], "task: expected one of 'pretrain'"),
        (["--resume", "perhaps"], "resume: "),
        (["--fit.learning_rate", "-1"], "fit.learning_rate is -1.0; it must be"),
        (["--data.batch_size", "0"], "data.batch_size is 0"),
        (["--config", "caption_cocoo"], "neither a file nor one of capfilt_captioner"),
        (["--config", "none.yaml"], "config: File does not exist"),
    ],
)
def test_bad_arguments_are_named(arguments, words, run):
    status, out, err = run("train", *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.startswith("blipfast: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fit: {learning_rat: 1}", "unknown key fit.learning_rat; did you mean fit.learning_rate?"),
        ("learning_rate: 1", "unknown key learning_rate; did you mean fit.learning_rate?"),
        ("fit: {steps: many}", "fit.steps: expected int or null, got many"),
        ("data: {crop_scale: [0.1, wide]}", "data.crop_scale: expected float, got wide"),
        ("fit: {steps: [1", "Problems parsing config"),
        ("- 1", "Unexpected config"),
    ],
)
def test_bad_yaml_is_named(text, words, tmp_path, run):
    (tmp_path / "run.yaml").write_text(text)
    status, _, err = run("train", "--config", str(tmp_path / "run.yaml"))
    assert status == 2
    assert words in err
    assert err.count("\n") == 1


def test_debug_shows_the_trace(monkeypatch):
    monkeypatch.setenv("BLIPFAST_DEBUG", "1")
    with pytest.raises(blipfast.errors.ConfigError):
        main(["train", "--fit.steps", "x"])


def test_ctrl_c_is_130(monkeypatch, run):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "main", interrupted)
    assert run("info")[0] == 130


@pytest.mark.parametrize("script", ["pretrain", "caption", "retrieval", "vqa", "nlvr"])
def test_scripts_are_their_recipes(script):
    name = script if script == "pretrain" else f"finetune_{script}"
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    command = [sys.executable, str(path), "--fit.seed", "9", "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"task: {script}\n" in done.stdout
    assert "seed: 9\n" in done.stdout
