"""Whole runs on tiny models: rows of the E2E shape written by the test, configs, and runs in processes of their own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny_models

SOURCE = Path(__file__).parents[1] / "src"
_NAMES = (
    "The Mill",
    "Blue Fox",
    "Aromi",
    "Zizzi",
    "Loch Fyne",
    "Giraffe",
    "Cotto",
    "Wildwood",
    "Strada",
    "Bibi",
)
_FOODS = ("Thai", "French", "Indian", "English")


def write_e2e(folder: Path, *, train: int = 24, held_out: int = 6) -> Path:
    """A small data set in E2E's own files.

    Args:
        folder: Where; made if needed.
        train: Meaning representations to train on.
        held_out: Meaning representations of each other split.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"trainset.csv": train, "devset.csv": held_out, "testset_w_refs.csv": held_out}
    number = 0
    for file, size in sizes.items():
        with (folder / file).open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["mr", "ref"])
            for _ in range(size):
                name, food = f"{_NAMES[number % 10]} {number}", _FOODS[number % 4]
                writer.writerow([f"name[{name}], food[{food}]", f"{name} serves {food} food."])
                writer.writerow([f"name[{name}], food[{food}]", f"You can eat {food} food at {name}."])
                number += 1
    return folder


def save_byte_model(folder: Path, name: str = "llama", *, seed: int = 0) -> Path:
    """A tiny model with a tokenizer that can write every text, as a local folder.

    Args:
        folder: Where; made if needed.
        name: A key of `tiny_models.BUILDERS`.
        seed: Seeds the weights.

    Returns:
        The folder.
    """
    tokenizer = tiny_models.tokenizer(byte_level=True)
    model = tiny_models.build(name, seed=seed)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if name == "llama":
        model.config.max_position_embeddings = 512  # rotary: only the config knows a limit
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_values(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Config values of a small run: E2E rows, a byte-level tiny Llama, twelve steps in three phases.

    Args:
        folder: Where model, data and runs go.
        sections: Values that replace those of a section.

    Returns:
        Values for `build_config`.
    """
    model = folder / "model"
    if not model.exists():
        save_byte_model(model)
    data = folder / "data"
    if not data.exists():
        write_e2e(data)
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "device": "cpu"},
        "task": {"name": "e2e_nlg", "data_dir": str(data), "max_length": 160},
        "method": {"name": "lora", "rank": 4, "dropout": 0.1, "targets": "both"},
        "schedule": {"strategy": "both->mlp->attn"},
        "training": {
            "max_steps": 12, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 2,
            "validation_steps": 3, "validation_rows": 6,
        },
        "evaluation": {"num_samples": 3, "max_new_tokens": 4},
        "output": {"directory": str(folder / "runs")},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return values


def environment() -> dict[str, str]:
    """This process's environment for runs in processes of their own: the source on the path, one thread each."""
    path = os.pathsep.join(p for p in (str(SOURCE), os.environ.get("PYTHONPATH")) if p)
    return dict(os.environ) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def peftlab(*arguments: str, folder: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run one command in a process of its own.

    Args:
        arguments: The command line after `peftlab`.
        folder: The working folder.
        timeout: Seconds until it is given up.

    Returns:
        Exit code, output and messages.
    """
    return subprocess.run(
        [sys.executable, "-m", "peftlab", *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
