"""Checkpoints without pickle: adapter, optimizer, schedule position and logs as safetensors and JSON.

A checkpoint is written aside, its checksums are stored with it, and it is renamed into place; the last one that verifies
is the one a run resumes from. Random streams are keyed by step, so there is no random state to keep.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from peftlab.errors import CheckpointError
from peftlab.files import verify_folder, write_json

ADAPTER_FILE = "adapter.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, by step.

    Args:
        folder: A run's checkpoints folder; may be missing.

    Returns:
        (step, path) in rising order; folders still being written are not among them.
    """
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def last_good_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The latest checkpoint whose files are as they were written.

    Args:
        folder: A run's checkpoints folder.

    Returns:
        The checkpoint, None where there is none, and what was wrong with later ones.
    """
    problems = []
    for _, path in reversed(list_checkpoints(folder)):
        try:
            verify_folder(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return path, problems
    return None, problems


def prune_checkpoints(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Delete all but the newest checkpoints and the best one.

    Args:
        folder: A run's checkpoints folder.
        keep: How many of the newest stay.
        best_step: The step of the checkpoint that stays in any case.
    """
    for step, path in list_checkpoints(folder)[:-keep]:
        if step != best_step:
            shutil.rmtree(path)


def save_optimizer(optimizer: Optimizer, names: Mapping[torch.Tensor, str], folder: Path) -> None:
    """Write an optimizer's state, keyed by parameter name.

    Args:
        optimizer: Any torch optimizer.
        names: Each of its parameters' names.
        folder: The checkpoint folder.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[parameter]}|{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                plain.setdefault(names[parameter], {})[key] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    save_file(tensors, folder / OPTIMIZER_FILE)
    write_json(
        folder / "optimizer.json", {"class": type(optimizer).__name__, "state": plain, "param_groups": groups}
    )


def load_optimizer(optimizer: Optimizer, names: Mapping[torch.Tensor, str], folder: Path) -> None:
    """Put a saved state back.

    Args:
        optimizer: An optimizer over the same parameters.
        names: Each of its parameters' names.
        folder: The checkpoint folder.

    Raises:
        CheckpointError: The saved state belongs to other parameters.
    """
    saved = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    own = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if own != [group["params"] for group in saved["param_groups"]]:
        raise CheckpointError(f"{folder}: the optimizer's state belongs to other parameters than this run's")
    by_name = {name: parameter for parameter, name in names.items()}
    on_device = {  # AdamW keeps its step counts on the host, but for these two kinds
        id(p) for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]
    }
    optimizer.state.clear()
    for name, values in saved["state"].items():
        optimizer.state[by_name[name]].update(values)
    for key, tensor in load_file(folder / OPTIMIZER_FILE).items():
        name, _, field = key.rpartition("|")
        parameter = by_name[name]
        on_host = field == "step" and id(parameter) not in on_device
        optimizer.state[parameter][field] = tensor if on_host else tensor.to(parameter.device)
    for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: _tuples(value) for key, value in old.items() if key != "params"})


def load_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter tensors of a checkpoint.

    Args:
        folder: The checkpoint folder.

    Returns:
        Tensors by saved name, on the CPU.

    Raises:
        CheckpointError: There is no adapter in the folder.
    """
    path = folder / ADAPTER_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} holds no {ADAPTER_FILE}")
    tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors


def read_state(folder: Path) -> dict[str, Any]:
    """Where a checkpoint stands: step, phase, best step and loss, whether training had ended early, probe records.

    Args:
        folder: The checkpoint folder.

    Returns:
        The values of `state.json`.
    """
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return state


def has_ended_at(folder: Path, *, total_steps: int) -> bool:
    """Whether training had come to its end with a checkpoint.

    Args:
        folder: The checkpoint folder.
        total_steps: Steps of the run.

    Returns:
        True at the last step, and where it was stopped early.
    """
    state = read_state(folder)
    return bool(state["stopped_early"]) or int(state["step"]) >= total_steps


def _tuples(value: Any) -> Any:
    """Lists back to the tuples that JSON made of them (betas)."""
    return tuple(value) if isinstance(value, list) else value
