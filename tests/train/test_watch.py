"""What is written of a run can be read back, and what is not installed is named."""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blipfast.errors import ConfigError
from blipfast.train.config import FitConfig, WatchConfig
from blipfast.train.engine import fit
from blipfast.train.watch import StepTimer, Watch

sys.path.insert(0, str(Path(__file__).parent))
from toy import Toy, toy_batches, toy_step


def run(watch: Watch | None, steps: int = 8, **options):
    config = FitConfig(steps=steps, learning_rate=1e-2)
    return fit(Toy(), toy_batches(), toy_step, config, title="toy", watch=watch, **options)


def test_tensorboard_has_every_loss_and_rate(tmp_path):
    history = run(Watch(WatchConfig(every=2), tmp_path, {}), timer=StepTimer(1e3, 1e9))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {"loss/a", "loss/b", "loss/total", "optimizer/lr", "optimizer/grad_norm"}
    names |= {"rate/samples_per_second", "rate/data_wait", "rate/mfu"}
    assert set(events.Tags()["scalars"]) == names
    written = events.Scalars("loss/a")
    assert [event.step for event in written] == [2, 4, 6, 8]
    assert [event.value for event in written] == pytest.approx(history.losses["a"][1::2])


def test_a_trace_of_some_steps(tmp_path):
    run(Watch(WatchConfig(tensorboard=False, profile=2), tmp_path, {}))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert "aten::addmm" in names
    assert sum("Optimizer.step" in str(name) for name in names) == 1
    assert not (tmp_path / "tensorboard").exists()


def test_weights_and_biases(tmp_path, monkeypatch):
    logged = []
    fake = types.ModuleType("wandb")
    one = types.SimpleNamespace(
        log=lambda scalars, step: logged.append((step, scalars["loss/a"])),
        finish=lambda: logged.append("finished"),
    )
    fake.init = lambda project, dir, config: logged.append((project, config)) or one
    fake.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = WatchConfig(tensorboard=False, wandb="mine", every=4)
    history = run(Watch(config, tmp_path, {"seed": 1}))
    assert logged == [
        ("mine", {"seed": 1}), (4, history.losses["a"][3]), (8, history.losses["a"][7]), "finished",
    ]  # fmt: skip


def test_what_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        Watch(WatchConfig(tensorboard=False, wandb="mine"), tmp_path, {})
    Watch(WatchConfig(), tmp_path, {})
    assert "blipfast[tensorboard]" in capsys.readouterr().err


def test_time_spent_waiting_for_data():
    def slow():
        for batch in toy_batches(6):
            time.sleep(0.02)
            yield batch

    timer = StepTimer()
    run(None, 6, timer=timer)
    fast = timer.rates().data_wait
    timer = StepTimer()
    fit(Toy(), slow(), toy_step, FitConfig(steps=6), title="toy", timer=timer)
    rates = timer.rates()
    assert rates.data_wait > 0.5 > fast
    assert 0 < rates.samples < 5 / 0.02
    assert rates.mfu is None


def test_mfu_is_flops_over_peak():
    timer = StepTimer(flops=2e6, peak=1e9)
    for _ in range(3):
        time.sleep(0.01)
        timer.done(4)
    rates = timer.rates()
    assert rates.mfu == pytest.approx(rates.samples * 2e6 / 1e9)


@pytest.mark.parametrize("values", [{"every": 0}, {"profile": -1}])
def test_settings_out_of_range(values):
    with pytest.raises(ConfigError, match=r"watch\.every"):
        WatchConfig(**values)
