"""Two processes with half the batch are one process with the whole batch."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import whole_runs
from peftlab.config import build_config
from peftlab.execute import execute
from peftlab.run import RunFolder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_two(place: Path, values: dict[str, object]) -> RunFolder:
    config = build_config(values)
    config.save(place / "two.yaml")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
            "-m", "peftlab", "run", str(place / "two.yaml"),
        ],
        cwd=place, env=whole_runs.environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = [p for p in (place / "two").iterdir() if p.is_dir()]
    return RunFolder(folder)


def test_two_processes_equal_one_with_phases_and_accumulation(tmp_path: Path) -> None:
    dropout = {"method": {"dropout": 0.0}}
    one = execute(
        build_config(
            whole_runs.make_values(
                tmp_path,
                **dropout,
                training={"batch_size": 4, "accumulation_steps": 2, "save_steps": 12},
                output={"directory": str(tmp_path / "one")},
            )
        ),
        show=lambda line: None,
    )
    two = run_two(
        tmp_path,
        whole_runs.make_values(
            tmp_path,
            **dropout,
            training={"batch_size": 2, "accumulation_steps": 2, "save_steps": 12},
            output={"directory": str(tmp_path / "two")},
        ),
    )
    assert two.is_finished
    first, second = (load_file(r.path / "final_model" / "adapter_model.safetensors") for r in (one, two))
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert worst <= 1e-5
    moved = max(float(tensor.abs().max()) for name, tensor in first.items() if "lora_B" in name)
    assert moved > 1e-2  # the bar is meaningful: B started at zero
    losses = [[e["loss"] for e in r.events() if e["event"] == "step"] for r in (one, two)]
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-5)
