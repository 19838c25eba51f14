"""Answers on disk: a log that grows while a model answers, and files of answers that somebody else's system made."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from peftlab.errors import DataError, OutputError
from peftlab.files import write_text
from peftlab.task import Example


class PredictionLog:
    """A file that takes answers as they come, so that a killed evaluation goes on where it was.

    The first line names what was asked: model, prompts and decoding. Answers to something else are not taken over.

    Args:
        path: The file; its folder must be there.
        asked: Everything that decides the answers, JSON-ready.

    Attributes:
        found: Answers that an earlier, killed evaluation left, by example.
        probabilities: What the model gave them, for those where it chose among labels.
        seconds: Time that they took.

    Raises:
        OutputError: The file cannot be read or written.
    """

    def __init__(self, path: Path, asked: Any) -> None:
        self.path = path
        self.key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        self.found: dict[str, str] = {}
        self.probabilities: dict[str, float] = {}
        self._stream: IO[str] | None = None
        self.seconds = self._began = 0.0

    def __enter__(self) -> PredictionLog:
        """Read what is there and open the file for more."""
        try:
            lines = self._whole_lines()
            if not lines or lines[0] != {"asked": self.key}:
                lines = [{"asked": self.key}]
            self.found = {line["id"]: line["prediction"] for line in lines if "id" in line}
            self.seconds = max((float(line["seconds"]) for line in lines if "seconds" in line), default=0.0)
            sure = [line for line in lines[1:] if "probability" in line]
            self.probabilities = {line["id"]: line["probability"] for line in sure}
            # whole beside its place first: a kill here leaves the old file
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            self._stream = self.path.open("a", encoding="utf-8", newline="\n")
            self._began = time.perf_counter()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; it stays until `remove`."""
        if self._stream is not None:
            self._stream.close()

    def add(self, answers: Mapping[str, str], probabilities: Mapping[str, float] | None = None) -> None:
        """Keep answers; they are on the disk when this returns.

        Args:
            answers: By the example's id.
            probabilities: What the model gave them, where it chose among labels.

        Raises:
            OutputError: The disk is full.
        """
        try:
            sure = {name: {"probability": p} for name, p in (probabilities or {}).items()}
            rows = [{"id": n, "prediction": text} | sure.get(n, {}) for n, text in answers.items()]
            self._write([*rows, {"seconds": self.seconds + time.perf_counter() - self._began}])
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def remove(self) -> None:
        """Take the file away, once the answers are kept elsewhere."""
        self.path.unlink(missing_ok=True)

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines and flush them to the disk."""
        if self._stream is None:
            raise OutputError(f"{self.path} is not open")
        self._stream.writelines(json.dumps(line) + "\n" for line in lines)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _whole_lines(self) -> list[dict[str, Any]]:
        """The lines up to the first that a kill has torn."""
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            line = _parse(text) if text.endswith("\n") else None
            if line is None:
                break
            lines.append(line)
        return lines


def _parse(text: str) -> dict[str, Any] | None:
    """One line of the log, None where it is torn."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    known = ({"asked"}, {"seconds"}, {"id", "prediction"}, {"id", "prediction", "probability"})
    return line if isinstance(line, dict) and line.keys() in known else None


def make_folder(path: Path) -> None:
    """Make a folder for scores and answers.

    Args:
        path: The folder; it may be there.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {path} cannot be made: {error.strerror or error}") from None


def read_predictions(path: Path, examples: Sequence[Example]) -> list[str]:
    """The answers in a file, one for each example, in the examples' order.

    Args:
        path: A .jsonl file of rows with "id" and "prediction" in any order of rows, other keys are passed over; or any
            other text file with one answer on each line, in the order of the split. An answer may be empty.
        examples: The split, or the part of it that is scored.

    Returns:
        The answers.

    Raises:
        DataError: The file cannot be read, a row is malformed, an id is unknown or there twice, or there are not as
            many answers as examples.
    """
    text = _read(path)
    if not text:
        raise DataError(
            f"{path} is empty, and {len(examples)} examples are to be answered; write one answer on each line, or rows"
            " with 'id' and 'prediction' in a .jsonl file"
        )
    if path.suffix.lower() != ".jsonl":
        lines = text.split("\n")
        lines = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
        if len(lines) != len(examples):
            raise DataError(
                f"{path} has {len(lines)} lines for {len(examples)} examples; write one answer on each line, an empty"
                " line for an empty answer, or rows with 'id' and 'prediction' in a .jsonl file"
            )
        return lines
    known = {example.id for example in examples}
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            name, answer = _prediction(f"{path}, line {number}", line)
            if name not in known:
                raise DataError(
                    f"{path}, line {number}: there is no example '{name}' among the {len(known)} that are scored, such"
                    f" as '{examples[0].id}'; check --split, --num_samples and the data"
                )
            if name in found:
                raise DataError(f"{path}, line {number}: example '{name}' has an answer already")
            found[name] = answer
    missing = [example.id for example in examples if example.id not in found]
    if missing:
        raise DataError(
            f"{path} has {len(found)} answers for {len(examples)} examples; there is none for {', '.join(missing[:5])}"
            + (", ..." if len(missing) > 5 else "")
        )
    return [found[example.id] for example in examples]


def _read(path: Path) -> str:
    """A text file without its byte order mark."""
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"the predictions {path} cannot be read: {error.strerror or error}; --predictions names a file"
        ) from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _prediction(place: str, line: str) -> tuple[str, str]:
    """The id and the answer of one row."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise DataError(f"{place}: cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("id", "prediction")):
        raise DataError(f"{place}: expected a row with the texts 'id' and 'prediction', got {line[:80]}")
    if any("\ud800" <= character <= "\udfff" for character in row["prediction"]):
        raise DataError(
            f"{place}: the prediction holds half of a character (a lone surrogate), which is no text; write the file"
            " anew as UTF-8"
        )
    return row["id"], row["prediction"]
