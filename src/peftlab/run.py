"""A run folder: what its files are called, reading them back, making a new one, finding an old one.

```
NAME/
  config.yaml               what was asked for, resolved; given back to `peftlab run` it repeats the run
  environment.json          versions, hardware, git state, command
  preflight.json            rows, tokens, steps, phases, parameters, before anything heavy
  events.jsonl              what happened, one JSON object per line
  checkpoints/              to go on from
  gradient_analysis.*       gradient norms per group and layer
  ranks.*                   effective rank of each module at every allocation, for methods that allocate
  TASK_evaluation.json      scores before and after; predictions.*.jsonl hold the answers
  results_summary.json      what it came to
  plots/  report.html       drawn from the above
  final_model/              the adapter
  DONE                      written last
```
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.errors import OutputError, RunError, UnknownNameError
from peftlab.files import write_text
from peftlab.measurements import finite

if TYPE_CHECKING:
    from peftlab.gradient_log import GradientNormLog

LAST = "last"
"""Stands for the run that was started or resumed last."""
_STARTS_FROM_ZERO = ("phase_started", "phase_resumed")
"""Events whose step is counted from 0: they speak of the optimizer step after it."""


class RunFolder:
    """One run on disk, finished or not.

    Args:
        path: The folder.
    """

    CONFIG = "config.yaml"
    ENVIRONMENT = "environment.json"
    PREFLIGHT = "preflight.json"
    EVENTS = "events.jsonl"
    SUMMARY = "results_summary.json"
    EVALUATION_SUFFIX = "_evaluation.json"
    GRADIENTS = "gradient_analysis.group_norms.csv"
    REPORT = "report.html"
    DONE = "DONE"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    # -- names ----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The folder's name, also where the path is "." or ends in a link."""
        return self.path.absolute().name or self.path.resolve().name

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        """Where charts lie."""
        return self.path / "plots"

    @property
    def final_model(self) -> Path:
        """Where the adapter lies."""
        return self.path / "final_model"

    @property
    def report(self) -> Path:
        """The page of this run."""
        return self.path / self.REPORT

    @property
    def is_finished(self) -> bool:
        """Whether everything was written."""
        return (self.path / self.DONE).exists()

    @property
    def has_ended(self) -> bool:
        """Whether its work is done: finished, or all but the page and `DONE` are written."""
        if self.is_finished:
            return True
        events = self.timeline()
        return bool(events) and events[-1]["event"] == "run_finished"

    def has(self, name: str) -> bool:
        """Whether a file is there yet.

        Args:
            name: A file name, e.g. `RunFolder.SUMMARY`.
        """
        return (self.path / name).exists()

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """What was asked for, resolved."""
        import yaml

        text = self._text(self.CONFIG)
        try:
            return _mapping(yaml.safe_load(text), self.path / self.CONFIG)
        except yaml.YAMLError as error:
            raise RunError(f"{self.path / self.CONFIG} is damaged: {' '.join(str(error).split())}") from error

    @property
    def environment(self) -> dict[str, Any]:
        """What it ran on."""
        return self._json(self.ENVIRONMENT)

    @property
    def preflight(self) -> dict[str, Any]:
        """What was counted before anything heavy."""
        return self._json(self.PREFLIGHT)

    def summary(self) -> dict[str, Any]:
        """What it came to.

        Raises:
            RunError: It is not there yet, or damaged.
        """
        return self._json(self.SUMMARY)

    def evaluation_path(self) -> Path | None:
        """`{task}_evaluation.json` of the run's own task; None where there is none yet."""
        found = sorted(self.path.glob(f"*{self.EVALUATION_SUFFIX}"))
        if len(found) > 1 and self.has(self.CONFIG):
            task = str(self.config.get("task", {}).get("name", "")).rpartition(".")[2]
            found = [p for p in found if p.name == task + self.EVALUATION_SUFFIX] or found
        return found[0] if found else None

    def evaluation(self) -> dict[str, Any]:
        """Scores before and after.

        Raises:
            RunError: It is not there yet, or damaged.
        """
        path = self.evaluation_path()
        return self._json(f"TASK{self.EVALUATION_SUFFIX}" if path is None else path.name)

    def predictions(self, name: str) -> list[dict[str, Any]]:
        """The answers of one evaluation.

        Args:
            name: The file's name, as the evaluation gives it.

        Returns:
            One mapping per test example: id, source, prompt, prediction, references.

        Raises:
            RunError: The file is missing or damaged.
        """
        lines = self._text(name).splitlines()
        return [_parse(line, self.path / name, number) for number, line in enumerate(lines, 1) if line]

    def gradient_log(self) -> GradientNormLog:
        """The record of gradient norms.

        Raises:
            DataError: It is not there (it is written when training ends).
            RunError: It is damaged.
        """
        from peftlab.gradient_log import GradientNormLog

        return GradientNormLog.read(self.path)

    def events(self) -> Iterator[dict[str, Any]]:
        """Everything that was logged, in order; a last line that is still being written is left out.

        Yields:
            Mappings with "event", "time" and mostly "step".

        Raises:
            RunError: A line is damaged; names file and line.
        """
        path = self.path / self.EVENTS
        text = self._text(self.EVENTS) if path.exists() else ""
        whole, _, _ = text.rpartition("\n")
        for number, line in enumerate(whole.split("\n"), 1):
            if line.strip():
                yield _parse(line, path, number)

    def timeline(self) -> list[dict[str, Any]]:
        """The events that still hold: without those of attempts that a restart or a resume has replaced."""
        kept: list[dict[str, Any]] = []
        for event in self.events():
            if event.get("event") == "run_started":
                kept = []
            elif event.get("event") == "resumed":
                kept = [e for e in kept if not _is_after(e, event["step"])]
            kept.append(event)
        return kept

    # -- writing --------------------------------------------------------------------------------------------------

    def append_event(self, event: str, /, **fields: Any) -> None:
        """Log that something happened: one line, written at once.

        Args:
            event: What, e.g. "step".
            **fields: JSON-ready details; NaN and infinities are written as "nan", "inf" and "-inf".

        Raises:
            OutputError: The disk is full or the file cannot be written.
        """
        from datetime import UTC, datetime

        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps(
            finite({"event": event, "time": now, **fields}), ensure_ascii=False, allow_nan=False
        )
        path = self.path / self.EVENTS
        try:
            with path.open("ab+") as stream:
                _cut_torn_line(stream)
                stream.write(line.encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    def drop_events_after(self, step: int) -> None:
        """Forget what a resumed run will do again.

        Args:
            step: The optimizer step it goes on after. Events of later steps go, and so does the start of a phase
                whose first step is the next one; events without a step stay.

        Raises:
            RunError: A line is damaged.
            OutputError: The file cannot be written.
        """
        kept = [e for e in self.events() if not _is_after(e, step)]
        lines = [json.dumps(e, ensure_ascii=False, allow_nan=False) + "\n" for e in kept]
        write_text(self.path / self.EVENTS, "".join(lines))

    @classmethod
    def create(cls, directory: str | Path, name: str) -> RunFolder:
        """Make a new run folder; an old one is never touched.

        Args:
            directory: Where run folders lie; made where missing.
            name: The wanted name; `-2`, `-3` ... is added where it is taken.

        Returns:
            The new, empty folder.

        Raises:
            OutputError: The folder cannot be made, or the name is not a folder name.
        """
        if name in ("", ".", "..", LAST) or any(mark in name for mark in ("/", "\\", "\0")):
            raise OutputError(f"'{name}' cannot name a run folder; use letters, digits, '-', '_' and '.'")
        place, number = Path(directory).expanduser(), 1
        try:
            place.mkdir(parents=True, exist_ok=True)
            while True:
                path = place / (name if number == 1 else f"{name}-{number}")
                try:
                    os.mkdir(path)
                except FileExistsError:
                    number += 1
                else:
                    return cls(path)
        except OSError as error:
            raise OutputError(
                f"cannot make a run folder in {place}: {error.strerror or error}; choose another output.directory"
            ) from error

    @classmethod
    def find(cls, reference: str | Path, directory: str | Path) -> RunFolder:
        """A run by path, by name or as "last".

        Args:
            reference: A run folder's path, its name in `directory`, or "last", the one whose config or events are newest.
            directory: Where run folders lie.

        Returns:
            The run.

        Raises:
            OutputError: There are no runs, or the path is a folder of another kind.
            UnknownNameError: No run has that name; says which there are.
        """
        place = Path(directory).expanduser()
        known = {run.name: run for run in cls.all_in(place)}
        text = str(reference)
        if text == LAST and known:
            return max(known.values(), key=_last_activity)
        for path in (Path(text).expanduser(), place / text):
            if text != LAST and (path / cls.CONFIG).is_file():
                return cls(path)
        if text != LAST and Path(text).expanduser().is_dir():
            raise OutputError(f"{text} is not a run folder: it has no {cls.CONFIG}")
        if not known:
            raise OutputError(f"there is no run in {place}/ yet; `peftlab run` makes one")
        raise UnknownNameError("run", text, [LAST, *known])

    @classmethod
    def all_in(cls, directory: Path) -> list[RunFolder]:
        """The run folders of a directory, by name.

        Args:
            directory: Where run folders lie.
        """
        if not directory.is_dir():
            return []
        return [cls(path) for path in sorted(directory.iterdir()) if (path / cls.CONFIG).is_file()]

    # -- inside ---------------------------------------------------------------------------------------------------

    def _text(self, name: str) -> str:
        """A file's text."""
        path = self.path / name
        try:
            return path.read_bytes().decode()
        except FileNotFoundError:
            raise RunError(f"{path} is not there; the run has not got that far, or it was removed") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error

    def _json(self, name: str) -> dict[str, Any]:
        """A JSON file's mapping."""
        return _parse(self._text(name), self.path / name)


def _parse(text: str, path: Path, line: int | None = None) -> dict[str, Any]:
    """One JSON object of a file."""
    where = f"{path} line {line}" if line is not None else f"{path}"
    try:
        return _mapping(json.loads(text), where)
    except ValueError as error:
        raise RunError(f"{where} is damaged: {error}") from error


def _mapping(value: Any, where: str | Path) -> dict[str, Any]:
    """A value that must be a mapping."""
    if not isinstance(value, dict):
        raise RunError(f"{where} is damaged: a mapping is expected, not {type(value).__name__}")
    return value


def _is_after(event: dict[str, Any], step: int) -> bool:
    """Whether an event belongs to what comes after an optimizer step."""
    own = event.get("step")
    if own is None:
        return False
    return bool(own >= step if event.get("event") in _STARTS_FROM_ZERO else own > step)


def _last_activity(run: RunFolder) -> int:
    """When a run was last carried on, in nanoseconds; drawing a report does not count."""
    files = (run.path / name for name in (run.CONFIG, run.EVENTS))
    return max(path.stat().st_mtime_ns for path in files if path.exists())


def _cut_torn_line(stream: Any) -> None:
    """Remove what a killed process left after the last line end."""
    end = stream.seek(0, os.SEEK_END)
    if end == 0:
        return
    stream.seek(end - 1)
    if stream.read(1) == b"\n":
        return
    stream.seek(0)
    stream.truncate(stream.read().rfind(b"\n") + 1)
