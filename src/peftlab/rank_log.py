"""The record of effective ranks: one row per allocation, for methods that give ranks to modules while they train.

Two files in a run folder:

- `ranks.csv`: step, budget, and the effective rank of each module (its singular values that are not zero);
- `ranks.summary.json`: where each module lies (stack, layer, role), its first and last rank, and statistics.

There is a row for the first step after which a singular value is not zero (all are, until the learning rate is not), for
every step at which ranks were taken, as they stood right after it, and for the last step. Between two allocations taken
ranks may come back to life, as in the paper. The budget is the number of ranks that all modules together may keep.

Source: Zhang et al. 2023, arXiv 2303.10512, section 3.3 (budget and effective rank).
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.errors import DataError, RunError
from peftlab.files import write_json, write_text

if TYPE_CHECKING:
    from peftlab.gradients import Reading

RANK_FILE, RANK_SUMMARY_FILE = "ranks.csv", "ranks.summary.json"


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a module lies.

    Attributes:
        role: What it is for, e.g. "attention.query".
        stack: The stack of blocks, "" outside the stacks.
        layer: Index of its block in the stack, None outside the stacks.
    """

    role: str
    stack: str = ""
    layer: int | None = None


class RankLog:
    """Effective ranks by optimizer step.

    Args:
        places: Path of each module in the base to where it lies, in the model's order.

    Attributes:
        places: As given.
        steps: The recorded optimizer steps, counted from 1, rising.
        budgets: For each row, how many ranks all modules together may keep.
        ranks: Module path to its effective rank in each row.

    Example:
        >>> log = RankLog({"layers.0.q_proj": RankPlace("attention.query", "layers", 0)})
        >>> log.append(1, 6, {"layers.0.q_proj": 6})
        >>> log.append(9, 2, {"layers.0.q_proj": 2})
        >>> log.ranks["layers.0.q_proj"], log.mean_ranks()
        ([6, 2], [6.0, 2.0])
    """

    def __init__(self, places: Mapping[str, RankPlace]) -> None:
        self.places = dict(places)
        self.steps: list[int] = []
        self.budgets: list[int] = []
        self.ranks: dict[str, list[int]] = {path: [] for path in self.places}

    def __len__(self) -> int:
        return len(self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankLog) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        span = f"steps {self.steps[0]} to {self.steps[-1]}" if self.steps else "no steps"
        return f"RankLog({len(self)} rows, {span}, {len(self.places)} modules)"

    def append(self, step: int, budget: int, ranks: Mapping[str, int]) -> None:
        """Add one row.

        Args:
            step: The optimizer step, counted from 1; 0 is the start. Later than the last row's.
            budget: How many ranks all modules together may keep.
            ranks: Effective rank of every module.

        Raises:
            RunError: The step is not later, or the modules are not the log's.
        """
        if self.steps and step <= self.steps[-1]:
            raise RunError(
                f"ranks of step {step} came after those of step {self.steps[-1]}; truncate the log first"
            )
        if ranks.keys() != self.ranks.keys():
            wrong = ", ".join(sorted(ranks.keys() ^ self.ranks.keys())[:5])
            raise RunError(f"ranks of step {step} are of other modules than the log's: {wrong}")
        for path, values in self.ranks.items():
            values.append(int(ranks[path]))
        self.steps.append(int(step))
        self.budgets.append(int(budget))

    def truncate(self, step: int) -> None:
        """Drop rows, for going on from a checkpoint.

        Args:
            step: Rows of later steps are dropped.
        """
        keep = sum(s <= step for s in self.steps)
        for values in (self.steps, self.budgets, *self.ranks.values()):
            del values[keep:]

    def totals(self) -> list[int]:
        """The sum of all effective ranks, one per row."""
        return [sum(row) for row in self._rows()]

    def mean_ranks(self) -> list[float]:
        """The mean effective rank of a module, one per row."""
        return [total / len(self.places) for total in self.totals()]

    def lowest(self) -> list[int]:
        """The lowest effective rank of a module, one per row."""
        return [min(row) for row in self._rows()]

    def highest(self) -> list[int]:
        """The highest effective rank of a module, one per row."""
        return [max(row) for row in self._rows()]

    def _rows(self) -> list[tuple[int, ...]]:
        """The ranks of all modules, row by row."""
        return list(zip(*self.ranks.values(), strict=True))

    def summarize(self) -> dict[str, Any]:
        """What the ranks came to.

        Returns:
            JSON-ready. `num_rows`; `first` and `last`: step, budget, total, mean, min and max of that row, None without
            rows; `modules`: for each its role, stack, layer, `first_rank` and `last_rank`, None without rows.
        """
        modules = {}
        for path, place in self.places.items():
            values = self.ranks[path]
            ends = {"first_rank": values[0], "last_rank": values[-1]} if values else _NO_ENDS
            modules[path] = asdict(place) | ends
        return {
            "num_rows": len(self),
            "rank": "singular values that are not zero, right after the step's allocation",
            "first": self._describe(0) if self.steps else None,
            "last": self._describe(-1) if self.steps else None,
            "modules": modules,
        }

    def _describe(self, row: int) -> dict[str, Any]:
        """Step, budget and statistics of one row."""
        return {
            "step": self.steps[row],
            "budget": self.budgets[row],
            "total": self.totals()[row],
            "mean": self.mean_ranks()[row],
            "min": self.lowest()[row],
            "max": self.highest()[row],
        }

    # -- files ----------------------------------------------------------------------------------------------------

    def write(self, folder: str | Path) -> None:
        """Write the two files, each atomically.

        Args:
            folder: An existing folder.

        Raises:
            OutputError: The disk is full or the folder cannot be written.
        """
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(["step", "budget", *self.ranks])
        writer.writerows(zip(self.steps, self.budgets, *self.ranks.values(), strict=True))
        write_text(Path(folder) / RANK_FILE, stream.getvalue())
        write_json(Path(folder) / RANK_SUMMARY_FILE, self.summarize())

    @classmethod
    def read(cls, folder: str | Path) -> RankLog:
        """Read what `write` wrote; equal to what was written.

        Args:
            folder: The run folder.

        Returns:
            The log.

        Raises:
            DataError: One of the files is not there.
            RunError: A file is damaged.
        """
        table, summary = Path(folder) / RANK_FILE, Path(folder) / RANK_SUMMARY_FILE
        missing = ", ".join(path.name for path in (table, summary) if not path.exists())
        if missing:
            raise DataError(
                f"{folder} has no {missing}; a run of a method that gives ranks to modules, such as adalora, writes"
                " them when training ends"
            )
        header, rows = _read_table(table)
        try:
            described = json.loads(summary.read_text(encoding="utf-8"))["modules"]
            record = {
                "modules": {p: {k: described[p][k] for k in ("role", "stack", "layer")} for p in header[2:]},
                "steps": [row[0] for row in rows],
                "budgets": [row[1] for row in rows],
                "ranks": {path: [row[i] for row in rows] for i, path in enumerate(header[2:], 2)},
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{summary} is damaged: {type(error).__name__} {error}") from error
        try:
            return cls.from_json(record)
        except RunError as error:
            raise RunError(f"{table}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The whole log as JSON-ready values, for checkpoints."""
        return {
            "modules": {path: asdict(place) for path, place in self.places.items()},
            "steps": list(self.steps),
            "budgets": list(self.budgets),
            "ranks": {path: list(values) for path, values in self.ranks.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RankLog:
        """A log from what `to_json` gave.

        Args:
            record: That record.

        Returns:
            An equal log.

        Raises:
            RunError: The record is damaged.
        """
        try:
            log = cls({path: RankPlace(**place) for path, place in record["modules"].items()})
            log.steps = [int(step) for step in record["steps"]]
            log.budgets = [int(budget) for budget in record["budgets"]]
            log.ranks = {path: [int(v) for v in record["ranks"][path]] for path in log.places}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"a record of ranks is damaged: {type(error).__name__} {error}") from error
        if {len(values) for values in (log.budgets, *log.ranks.values())} != {len(log)}:
            raise RunError("a record of ranks is damaged: its columns have different lengths")
        if any(later <= step for step, later in zip(log.steps, log.steps[1:], strict=False)):
            raise RunError("a record of ranks is damaged: its steps do not rise")
        return log


class RankRecord:
    """A running probe that keeps a `RankLog`; the method itself writes the rows. Satisfies `probe.RunningProbe`.

    Args:
        places: Path of each module in the base to where it lies.

    Attributes:
        log: The log so far.
    """

    def __init__(self, places: Mapping[str, RankPlace]) -> None:
        self.log = RankLog(places)

    def wants_gradients(self, step: int) -> bool:
        """Never: ranks are read when they are taken, not when gradients are seen.

        Args:
            step: An optimizer step.
        """
        return False

    def on_gradients(self, reading: Reading, *, step: int, phase: str) -> None:
        """Nothing to see.

        Args:
            reading: Norms per tensor.
            step: The optimizer step.
            phase: Its phase.
        """

    def state(self) -> Any:
        """JSON-ready record, for checkpoints."""
        return self.log.to_json()

    def restore(self, state: Any, *, step: int) -> None:
        """Go on from a checkpoint's record.

        Args:
            state: As `state` gave it.
            step: Rows after this step are dropped.

        Raises:
            RunError: The record is damaged, or of other modules.
        """
        log = RankLog.from_json(state)
        if log.places != self.log.places:
            raise RunError("a record of ranks is of other modules than this adapter's; start a new run")
        log.truncate(step)
        self.log = log

    def write(self, folder: Path) -> None:
        """Write the two files.

        Args:
            folder: The run folder.
        """
        self.log.write(folder)


def load_rank_log(path: str | os.PathLike[str]) -> RankLog:
    """Read a rank log.

    Args:
        path: A run folder, or its `ranks.csv`.

    Returns:
        The log.

    Raises:
        DataError: There is none.
        RunError: A file is damaged.
    """
    place = Path(path)
    if place.name in (RANK_FILE, RANK_SUMMARY_FILE):
        place = place.parent
    if not place.is_dir():
        raise DataError(f"{path} holds no ranks; give a run folder or its {RANK_FILE}")
    return RankLog.read(place)


def _read_table(path: Path) -> tuple[list[str], Sequence[Sequence[str]]]:
    """Header and rows of `ranks.csv`."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            lines = list(csv.reader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    header, rows = (lines[0], lines[1:]) if lines else ([], [])
    if header[:2] != ["step", "budget"] or len(header) == 2 or len(set(header)) != len(header):
        raise RunError(f"{path} is damaged: its columns are {header[:4]}, expected step, budget and modules")
    if any(len(row) != len(header) for row in rows):
        raise RunError(f"{path} is damaged: a row has not the {len(header)} cells of its header")
    return header, rows


_NO_ENDS = {"first_rank": None, "last_rank": None}
