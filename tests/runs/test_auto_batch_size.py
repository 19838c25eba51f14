"""A run that splits its steps into batches that fit into memory: the same training in other portions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import whole_runs
from peftlab import execute
from peftlab.config import RunConfig, build_config, read_yaml
from peftlab.errors import ConfigError, ModelError
from peftlab.memory import fitting, splitting
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
    room = int(peak(make_config(tmp_path, batch_size=4)) * 1.06)
    monkeypatch.setattr(fitting, "find_budget", lambda device, memory=None: Budget(room, "as given", 0.05))
    done, parted = run(make_config(tmp_path, auto_batch_size=True))
    ran = build_config(read_yaml(done.path / "config.yaml")).training
    assert (ran.batch_size, ran.accumulation_steps) == (4, 2)
    (note,) = [note for note in done.preflight["notes"] if note.startswith("auto_batch_size")]
    assert note.startswith("auto_batch_size: 4 rows x 2 forward passes a step; predicted peak")
    assert ", measured " in note
    for name, tensor in whole.items():
        torch.testing.assert_close(parted[name], tensor, atol=2e-5, rtol=1e-4)
    again = execute.plan(make_config(tmp_path, auto_batch_size=True))
    assert again["memory"]["prediction"]["shape"]["rows"] == 4
    assert any("4 rows x 2" in note and "measured" not in note for note in again["notes"])


def test_what_cannot_be_split_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, auto_batch_size=True)
    with pytest.raises(ModelError, match="not even one row of"):
        execute.plan(config, memory=1000)
    monkeypatch.setattr(splitting, "num_processes", lambda: 2)
    with pytest.raises(ConfigError, match="looks at the memory of one process, and this run has 2"):
        execute.plan(config)
