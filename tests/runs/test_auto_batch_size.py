"""A run that splits its steps into batches that fit into memory: the same training in other portions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DynamicOutputShapeException

import whole_runs
from peftlab import execute
from peftlab.cli import main
from peftlab.config import RunConfig, build_config
from peftlab.errors import ConfigError, ModelError
from peftlab.files import read_yaml
from peftlab.memory import fitting, prediction, splitting
from peftlab.memory.budget import Budget
from peftlab.run import RunFolder


def make_config(folder: Path, **training: Any) -> RunConfig:
    """A run of eight rows a step, without dropout, so that its training does not depend on the portions."""
    values = whole_runs.make_values(
        folder,
        training={"max_steps": 4, "warmup_steps": 0, "validation_steps": 4, "batch_size": 8} | training,
        method={"dropout": 0.0},
        evaluation={"enabled": False},
    )
    del values["evaluation"]["num_samples"], values["schedule"]
    return build_config(values)


def peak(config: RunConfig) -> int:
    """The predicted peak of its longest batch, in bytes."""
    needed: int = execute.plan(config)["memory"]["prediction"]["peak_bytes"]
    return needed


def run(config: RunConfig) -> tuple[RunFolder, dict[str, torch.Tensor]]:
    """A finished run and its adapter."""
    done = execute.execute(config, show=lambda line: None)
    return done, load_file(done.path / "final_model" / "adapter_model.safetensors")


def test_steps_are_split_so_that_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = run(make_config(tmp_path))
    room = int(peak(make_config(tmp_path, batch_size=4, accumulation_steps=2)) * 1.06)
    monkeypatch.setattr(fitting, "find_budget", lambda device, memory=None: Budget(room, "as given", 0.05))
    done, parted = run(make_config(tmp_path, auto_batch_size=True))
    ran = build_config(read_yaml(done.path / "config.yaml")).training
    assert (ran.batch_size, ran.accumulation_steps, ran.auto_batch_size) == (4, 2, False)
    (note,) = [note for note in done.preflight["notes"] if note.startswith("auto_batch_size")]
    assert note.startswith("auto_batch_size: 4 rows x 2 forward passes a step; predicted peak")
    assert ", measured " in note
    for name, tensor in whole.items():
        torch.testing.assert_close(parted[name], tensor, atol=2e-5, rtol=1e-4)
    again = execute.plan(make_config(tmp_path, auto_batch_size=True))
    assert again["memory"]["prediction"]["shape"]["rows"] == 4
    assert any("4 rows x 2" in note and "measured" not in note for note in again["notes"])
    larger = Budget(100 * room, "a larger machine", 0.05)
    monkeypatch.setattr(fitting, "find_budget", lambda device, memory=None: larger)
    given_back = execute.plan(build_config(read_yaml(done.path / "config.yaml")))
    assert given_back["memory"]["prediction"]["shape"]["rows"] == 4
    assert not any(note.startswith("auto_batch_size") for note in given_back["notes"])


def test_a_model_whose_memory_cannot_be_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cannot(attachment: Any, config: RunConfig, shape: Any, **given: Any) -> Any:
        raise DynamicOutputShapeException(torch.ops.aten.nonzero.default)

    monkeypatch.setattr(prediction, "rehearse", cannot)
    config = make_config(tmp_path)
    reason = "(llama) cannot be predicted: what it computes depends on data (DynamicOutputShapeException: aten.nonzero"
    planned = execute.plan(config)
    assert planned["steps"]["rows_per_step"] == 8
    assert planned["memory"].keys() == {"verdict", "reason"}
    assert planned["memory"]["verdict"] == "not predicted"
    assert reason in planned["memory"]["reason"]
    saved = config.save(tmp_path / "asked.yaml")
    assert main(["plan", str(saved)]) == 0
    said = capsys.readouterr().out
    assert "4 steps, " in said
    assert "\nmemory of a training step not predicted: the memory of " in said
    assert reason in said
    assert main(["plan", str(saved), "--auto_batch_size"]) == 2
    assert reason in (refused := capsys.readouterr().err)
    assert "--auto_batch_size" in refused
    with pytest.raises(ModelError, match=r"finds no batch size: the memory of .* cannot be predicted"):
        run(make_config(tmp_path, auto_batch_size=True))


def test_what_cannot_be_split_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, auto_batch_size=True)
    with pytest.raises(ModelError, match="not even one row of"):
        execute.plan(config, memory=1000)
    monkeypatch.setattr(splitting, "num_processes", lambda: 2)
    with pytest.raises(ConfigError, match="looks at the memory of one process, and this run has 2"):
        execute.plan(config)
