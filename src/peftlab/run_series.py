"""The runs of an experiment: each in a process of its own, so that its peak of memory is its own; none is done twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from peftlab.config import RunConfig
from peftlab.errors import RunError
from peftlab.run import RunFolder

_FIRST_FILES = {RunFolder.ENVIRONMENT, RunFolder.PREFLIGHT, RunFolder.EVENTS, "checkpoints", "plots"}
_REFUSED = 2
_LOOK_SECONDS, _END_SECONDS = 0.5, 20.0


def carry_out_run(
    config: RunConfig, configs: Path, *, give_up: Callable[[RunFolder], bool] | None = None
) -> dict[str, Any]:
    """Carry out one run in a process of its own; go on with one that was killed, read one that is finished.

    Args:
        config: The run; its folder is `output.directory` / `run_name()`.
        configs: Where the config file for the process goes; made if needed.
        give_up: Is asked about twice a second whether the run shall be ended; it can be gone on with later.

    Returns:
        As `read_run`; empty where it was given up.

    Raises:
        RunError: The run failed; the message says how the finished ones are kept.
    """
    path = config.output.directory / config.run_name()
    run = RunFolder(path)
    if not run.is_finished:
        if run.has(RunFolder.CONFIG):
            command = ["--resume", str(path)]
        else:
            _clear(path)
            file = configs / f"{path.name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            command = [str(config.save(file))]
        process = _Process([sys.executable, "-m", "peftlab", "run", *command])
        while give_up is not None and process.goes_on(_LOOK_SECONDS):
            if run.has(RunFolder.CONFIG) and give_up(run):
                process.end()
                return {}
        code, said = process.wait()
        if code:
            last = said.strip().splitlines()[-1:]
            raise RunError(
                f"{path.name} failed (exit code {code}): {' '.join(last)}; the finished runs in"
                f" {path.parent} are not done again with --set runs={path.parent}"
            )
    return read_run(run, config)


def carry_out_together(configs: Sequence[RunConfig], folder: Path) -> str:
    """Begin runs together over one base, as far as they have not begun; each ends as alone.

    Args:
        configs: The runs.
        folder: Where config files for the process go; made if needed.

    Returns:
        Why they cannot train together, in the words of `peftlab together`; "" where they did, or there was nothing to do.

    Raises:
        RunError: They began together and failed.
    """
    fresh = []
    for config in configs:
        path = config.output.directory / config.run_name()
        _clear(path)
        if not path.exists():
            file = folder / f"{path.name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh.append(str(config.save(file)))
    if len(fresh) < 2:
        return ""
    code, said = _Process([sys.executable, "-m", "peftlab", "together", *fresh]).wait()
    last = " ".join(said.strip().splitlines()[-1:])
    if code not in (0, _REFUSED):
        raise RunError(f"{len(fresh)} runs together failed (exit code {code}): {last}")
    return last if code else ""


def _clear(path: Path) -> None:
    """Take away a folder in which a run was killed before it wrote what was asked for; else the run would go beside it."""
    if path.is_dir() and {entry.name for entry in path.iterdir()} <= _FIRST_FILES:
        shutil.rmtree(path)


class _Process:
    """A process whose words are kept in files, so that no pipe fills up while nobody reads."""

    def __init__(self, command: Sequence[str]) -> None:
        self._out, self._error = TemporaryFile(), TemporaryFile()  # noqa: SIM115 - closed by `wait`
        self._process = subprocess.Popen(
            command, env=os.environ | {"PYTHONWARNINGS": "ignore"}, stdout=self._out, stderr=self._error
        )

    def goes_on(self, seconds: float) -> bool:
        """Wait a little; whether it still runs."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def end(self) -> None:
        """Ask it to end, and see that it does."""
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()
        self._error.close()

    def wait(self) -> tuple[int, str]:
        """Its exit code and what it said, errors first."""
        try:
            code = self._process.wait()
        except BaseException:  # the person leaves: the run leaves too, and can be gone on with
            self.end()
            raise
        texts = []
        for stream in (self._error, self._out):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace").strip())
            stream.close()
        return code, texts[0] or texts[1]


def read_run(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """What a finished run came to.

    Args:
        run: Its folder.
        config: What was asked for.

    Returns:
        JSON-ready: "run", "learning_rate", "validation_loss" of the kept checkpoint, "metrics" (none where nothing was
        scored), counts of parameters, "steps", "seconds" of training, "tokens_per_second", bytes, "versions".

    Raises:
        RunError: A file is missing or damaged.
    """
    summary = run.summary()
    evaluation = run.evaluation_path()
    after = json.loads(evaluation.read_text(encoding="utf-8"))["after"] if evaluation else None
    adapter = sum(file.stat().st_size for file in run.final_model.rglob("*.safetensors"))
    return {
        "run": run.name,
        "learning_rate": config.training.learning_rate,
        "validation_loss": summary["best_checkpoint"]["validation_loss"],
        "metrics": after["metrics"] if after else {},
        "trainable_parameters": summary["counts"]["trainable_parameters"],
        "total_parameters": summary["counts"]["total_parameters"],
        "steps": summary["steps"],
        "seconds": summary["seconds"]["train"],
        "tokens_per_second": summary["tokens_per_second"],
        "peak_memory_bytes": max(v for v in summary["peak_memory_bytes"].values() if v is not None),
        "adapter_bytes": adapter,
        "versions": run.environment["versions"],
    }


def choose_lowest(tried: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The run of the lowest validation loss, the first of equals; None of none.

    Args:
        tried: Runs of one method at several learning rates.
    """
    return min(tried, key=lambda result: result["validation_loss"], default=None)


def rate_rows(tried: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """The table of learning rates: every one that was tried, its validation loss, and which was chosen.

    Args:
        tried: Method to its runs.

    Returns:
        Rows, the header first.
    """
    rows = [["method", "learning rate", "validation loss", "chosen"]]
    for name, results in tried.items():
        lowest = choose_lowest(results)
        for result in results:
            mark = "yes" if result is lowest else ""
            rows.append([name, f"{result['learning_rate']:g}", f"{result['validation_loss']:.4f}", mark])
    return rows


def edge_note(tried: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Which methods did best at the edge of what was tried; nothing where none did.

    Args:
        tried: Method to its runs, in the order of their learning rates.

    Returns:
        One sentence, or none.
    """
    edges = [
        name
        for name, results in tried.items()
        if len(results) > 2 and choose_lowest(results) in (results[0], results[-1])
    ]
    if not edges:
        return []
    return [
        f"Lowest at the edge of what was tried, so perhaps better beyond: {', '.join(edges)} (--set factors=[...])."
    ]


def render_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown.

    Args:
        rows: The header and the rows; a "|" in a cell is escaped.

    Returns:
        The lines.

    Example:
        >>> print(render_markdown([["a", "b"], ["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
