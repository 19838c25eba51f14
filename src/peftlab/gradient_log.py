"""The record of gradient norms: one row per measured optimizer step, blank where nothing was active.

Three files in a run folder:

- `gradient_analysis.group_norms.csv`: step, phase, and the L2 norm of each group's gradient;
- `gradient_analysis.layer_norms.csv`: step, and the same for each layer's attention and MLP;
- `gradient_analysis.summary.json`: statistics, see `GradientNormLog.summarize`.

A blank cell means that no tensor was active. `nan` and `inf` are measurements: they are kept in the CSV files, left out
of the statistics and counted there as `non_finite_steps`. Floats are written so that they read back bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from peftlab.errors import DataError, RunError
from peftlab.gradient_files import (
    GROUP_FILE,
    GROUPS,
    LAYER_FILE,
    PREFIX,
    SUMMARY_FILE,
    beside,
    natural_order,
    read_files,
    write_files,
)
from peftlab.measurements import describe, finite, ratio_of_means


class GradientNormLog:
    """Gradient norms by optimizer step.

    Args:
        clipped: Whether gradients were measured after clipping (a stock Trainer clips first).

    Attributes:
        clipped: As given.
        steps: The measured optimizer steps, counted from 1, rising.
        phases: The phase of each row, or None.
        layer_data: Layer column to one value per row; None where the layer had no active tensor.
        num_parameters: For each row, group to the number of its parameters that had a gradient; empty if not counted.

    Example:
        >>> log = GradientNormLog()
        >>> log.append(1, {f"{group}_norm": None for group in GROUPS} | {"mlp_norm": 0.5, "layer_data": {}})
        >>> log.mlp_norm, log.attention_norm
        ([0.5], [None])
    """

    def __init__(self, clipped: bool = False) -> None:
        self.clipped = clipped
        self.steps: list[int] = []
        self.phases: list[str | None] = []
        self.layer_data: dict[str, list[float | None]] = {}
        self.num_parameters: list[dict[str, int]] = []
        self._norms: dict[str, list[float | None]] = {group: [] for group in GROUPS}

    def __len__(self) -> int:
        return len(self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GradientNormLog) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        span = f"steps {self.steps[0]} to {self.steps[-1]}" if self.steps else "no steps"
        return f"GradientNormLog({len(self)} rows, {span}, {len(self.layer_data)} layer columns)"

    @property
    def attention_norm(self) -> list[float | None]:
        """Norms of the attention group, one per row."""
        return self._norms["attention"]

    @property
    def mlp_norm(self) -> list[float | None]:
        """Norms of the MLP group, one per row."""
        return self._norms["mlp"]

    @property
    def embed_norm(self) -> list[float | None]:
        """Norms of the embeddings, one per row."""
        return self._norms["embed"]

    @property
    def lm_head_norm(self) -> list[float | None]:
        """Norms of the output head, one per row."""
        return self._norms["lm_head"]

    @property
    def other_norm(self) -> list[float | None]:
        """Norms of everything else, one per row."""
        return self._norms["other"]

    @property
    def total_norm(self) -> list[float | None]:
        """Norms over all groups, one per row."""
        return self._norms["total"]

    def norms(self, group: str) -> list[float | None]:
        """Norms of one group, one per row.

        Args:
            group: One of `GROUPS`.
        """
        return self._norms[group]

    def append(self, step: int, norms: Mapping[str, Any]) -> None:
        """Add one row.

        Args:
            step: The optimizer step, counted from 1; later than the last row's.
            norms: As `measure_gradient_norms` gives them, and optionally "phase". Layer columns that are new are blank
                in earlier rows; known ones that are missing are blank in this row.

        Raises:
            RunError: The step is not later, a norm is missing, or a layer column's name has another form.
        """
        if self.steps and step <= self.steps[-1]:
            raise RunError(
                f"gradient norms of step {step} came after those of step {self.steps[-1]}; truncate the log first"
            )
        missing = [f"{group}_norm" for group in GROUPS if f"{group}_norm" not in norms]
        if missing:
            raise RunError(f"gradient norms of step {step} lack {', '.join(missing)}")
        layers = {column: _number(value) for column, value in norms.get("layer_data", {}).items()}
        groups = {group: _number(norms[f"{group}_norm"]) for group in GROUPS}
        counts = {group: int(count) for group, count in norms.get("num_parameters", {}).items()}
        for column in natural_order(layers.keys() - self.layer_data.keys()):
            self.layer_data[column] = [None] * len(self)
        for column, values in self.layer_data.items():
            values.append(layers.get(column))
        for group, values in self._norms.items():
            values.append(groups[group])
        self.num_parameters.append(counts)
        self.phases.append(norms.get("phase") or None)
        self.steps.append(int(step))

    def truncate(self, step: int) -> None:
        """Drop rows, for going on from a checkpoint.

        Args:
            step: Rows of later steps are dropped.
        """
        keep = sum(s <= step for s in self.steps)
        for values in self._columns():
            del values[keep:]

    def _columns(self) -> list[list[Any]]:
        """Every list that has one value per row."""
        columns: list[list[Any]] = [self.steps, self.phases, self.num_parameters]
        return [*columns, *self._norms.values(), *self.layer_data.values()]

    # -- statistics -----------------------------------------------------------------------------------------------

    def summarize(self) -> dict[str, Any]:
        """Statistics over the run.

        Returns:
            JSON-ready. `groups` and `layers`: for each column its mean, std (of the population: the measured steps), max,
            min, `peak_step` (first step of the maximum), `count` of finite active rows and `non_finite_steps`; None
            where there is nothing to count. `attention_to_mlp_ratio`: mean attention norm / mean MLP norm over the
            steps where both are active and finite, None where there is no such step or the MLP mean is 0.
            `attention_to_mlp_ratio_per_parameter`: the same of norm / sqrt(parameters with a gradient), the root mean
            square of the gradient's entries, which does not grow with a group's size. `num_parameters`: those counts,
            from each step at which they change.
        """
        attention, mlp = self.attention_norm, self.mlp_norm
        return {
            "num_steps": len(self),
            "first_step": self.steps[0] if self.steps else None,
            "last_step": self.steps[-1] if self.steps else None,
            "clipped": self.clipped,
            "norm": "L2 of the gradient of a whole optimizer step",
            "std_is_over": "population",
            "groups": {group: describe(self.steps, values) for group, values in self._norms.items()},
            "attention_to_mlp_ratio": ratio_of_means(attention, mlp),
            "attention_to_mlp_ratio_per_parameter": ratio_of_means(
                self._per_parameter("attention"), self._per_parameter("mlp")
            ),
            "num_parameters": self._counts_by_step(),
            "layers": {c: describe(self.steps, self.layer_data[c]) for c in natural_order(self.layer_data)},
        }

    def _per_parameter(self, group: str) -> list[float | None]:
        """Norm / sqrt(parameters), None where a row has no norm or no count."""
        rows = zip(self._norms[group], self.num_parameters, strict=True)
        return [
            value / counts[group] ** 0.5 if value is not None and counts.get(group) else None
            for value, counts in rows
        ]

    def _counts_by_step(self) -> list[dict[str, Any]]:
        """Parameter counts, from each step at which they change."""
        runs = groupby(zip(self.steps, self.num_parameters, strict=True), key=lambda row: row[1])
        return [{"from_step": next(rows)[0], "counts": counts} for counts, rows in runs]

    # -- files ----------------------------------------------------------------------------------------------------

    def write(self, folder: str | Path) -> None:
        """Write the three files, each atomically.

        Args:
            folder: An existing folder.

        Raises:
            OutputError: The disk is full or the folder cannot be written.
        """
        write_files(Path(folder) / PREFIX, self._record(), self.summarize())

    @classmethod
    def read(cls, folder: str | Path) -> GradientNormLog:
        """Read what `write` wrote; equal to what was written.

        Args:
            folder: The run folder.

        Returns:
            The log.

        Raises:
            DataError: One of the files is not there.
            RunError: A file is damaged.
        """
        place = Path(folder)
        missing = [
            n for n in (GROUP_FILE, LAYER_FILE, SUMMARY_FILE) if not (place / f"{PREFIX}.{n}").exists()
        ]
        if missing:
            names = ", ".join(f"{PREFIX}.{name}" for name in missing)
            raise DataError(f"{place} has no {names}; a run writes the gradient norms when training ends")
        return _from_files(place / PREFIX)

    def to_json(self) -> dict[str, Any]:
        """The whole log as JSON-ready values, for checkpoints; NaN and infinities are strings."""
        exact: dict[str, Any] = finite(self._record())
        return exact

    def _record(self) -> dict[str, Any]:
        """The whole log as plain values; the columns are not copied."""
        return {
            "clipped": self.clipped,
            "steps": list(self.steps),
            "phases": list(self.phases),
            "norms": self._norms,
            "layers": {column: self.layer_data[column] for column in natural_order(self.layer_data)},
            "num_parameters": self._counts_by_step(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> GradientNormLog:
        """A log from what `to_json` gave.

        Args:
            record: That record.

        Returns:
            An equal log.

        Raises:
            RunError: The record is damaged.
        """
        try:
            log = cls(clipped=bool(record["clipped"]))
            log.steps = [int(step) for step in record["steps"]]
            log.phases = list(record["phases"])
            log._norms = {group: [_number(v) for v in record["norms"][group]] for group in GROUPS}
            log.layer_data = {c: [_number(v) for v in record["layers"][c]] for c in record["layers"]}
            log.num_parameters = _counts_by_row(log.steps, record["num_parameters"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"a record of gradient norms is damaged: {type(error).__name__} {error}"
            ) from error
        if {len(values) for values in log._columns()} != {len(log)}:
            raise RunError("a record of gradient norms is damaged: its columns have different lengths")
        return log


def load_gradient_log(path: str | Path) -> GradientNormLog:
    """Read a gradient log from a run folder or from its files.

    Args:
        path: A run folder, or one of `*.group_norms.csv`, `*.layer_norms.csv`, `*.summary.json`. With a file, the group
            file must be beside it; the other two are read where they are there.

    Returns:
        The log.

    Raises:
        DataError: The files are not there, or the name is not one of theirs.
        RunError: A file is damaged.
    """
    place = Path(path)
    if place.is_dir():
        return GradientNormLog.read(place)
    for name in (GROUP_FILE, LAYER_FILE, SUMMARY_FILE):
        if place.name.endswith(f".{name}"):
            stem = place.with_name(place.name.removesuffix(f".{name}"))
            if not beside(stem, GROUP_FILE).exists():
                raise DataError(f"there is no {beside(stem, GROUP_FILE)}; it holds the measured steps")
            return _from_files(stem)
    raise DataError(
        f"{place} holds no gradient norms; give a run folder or its {PREFIX}.{GROUP_FILE}"
        + ("" if place.exists() else " (there is no such folder or file)")
    )


def _from_files(stem: Path) -> GradientNormLog:
    """The log of the files that begin with a stem."""
    record = read_files(stem)
    try:
        return GradientNormLog.from_json(record)
    except RunError as error:
        raise RunError(f"{beside(stem, GROUP_FILE)} or a file beside it: {error}") from error


def _number(value: Any) -> float | None:
    """A norm, None for none; reads the strings of non-finite numbers too."""
    return None if value is None else float(value)


def _counts_by_row(steps: Sequence[int], runs: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """Parameter counts of every row, from the steps at which they change."""
    rows: list[dict[str, int]] = []
    waiting: Iterator[Mapping[str, Any]] = iter(runs)
    current: dict[str, int] = {}
    upcoming = next(waiting, None)
    for step in steps:
        while upcoming is not None and upcoming["from_step"] <= step:
            current, upcoming = dict(upcoming["counts"]), next(waiting, None)
        rows.append(current)
    return rows
