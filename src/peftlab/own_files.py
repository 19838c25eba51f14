"""A person's own files of rows, whatever their format: columns, splits, labels.

The folder holds `train`, and where there are any `validation` (or `valid`, `val`, `dev`) and `test`; or one file of any
name, which is then split. Rows have one of three shapes, told by the columns of the first one:

| columns | what is trained |
|---|---|
| prompt, completion | the completion, after the prompt |
| text, label | the class; a number is a name too, so that classes 1 to 5 need no class 0 |
| text | the whole text; nothing can be scored by asking, the validation loss tells |

Other columns are passed over and named in the notes. Classes are sorted by name, numbers as numbers; white space around a
name does not count, its case does. A setting that has no effect on these files is an error.

For a model that writes on, a space stands between a prompt and its completion, always: "2+2=" and "4" are learnt, and
scored, as "2+2= 4"; a prompt that ends in a space of its own has two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from peftlab.data_files import Record, sort_labels
from peftlab.errors import ConfigError, DataError, did_you_mean
from peftlab.settings import Settings
from peftlab.task import Example, Splits

STEMS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


class OwnFileSettings(Settings):
    """How the columns are called, and how one file is split."""

    prompt: str = "prompt"
    """Column with what the model is given."""
    completion: str = "completion"
    """Column with what it is to answer."""
    text: str = "text"
    """Column with a text, to be classified or learnt whole."""
    label: str = "label"
    """Column with the class of a text."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share for validation where there is no file for it; equal prompts stay together."""
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share for test where one file holds everything."""


@dataclass(frozen=True, slots=True)
class OwnRow:
    """One row, checked.

    Attributes:
        where: File and line.
        key: What must not stand in two splits: the prompt, or a text.
        source: What the model is given.
        answer: What it is to write; "" where there is a label.
        label: The class, "" where there is none.
    """

    where: str
    key: str
    source: str
    answer: str = ""
    label: str = ""


def find_files(data_dir: Path | None, suffix: str, *, task: str) -> dict[str, Path]:
    """The files of a folder by split.

    Args:
        data_dir: The folder.
        suffix: End of the files' names, e.g. ".jsonl".
        task: The task's name, for messages.

    Returns:
        "train", and what there is of "validation" and "test"; or "all" alone for one file of any name.

    Raises:
        DataError: There is no folder, no such file, or several and none of them is train.
    """
    expected = f"expected train{suffix}, and where there are any validation{suffix} and test{suffix}; or one {suffix} file"
    if data_dir is None:
        raise DataError(
            f"the task '{task}' reads your own files: give their folder with --data-dir; {expected}"
        )
    if not data_dir.is_dir():
        raise DataError(f"{data_dir} is not a folder; {expected}")
    there = sorted(path for path in data_dir.glob(f"*{suffix}") if path.is_file())
    found: dict[str, Path] = {}
    for split, stems in STEMS.items():
        named = [path for path in there if path.name.removesuffix(suffix).lower() in stems]
        if len(named) > 1:
            raise DataError(
                f"{data_dir} holds {split} twice: {', '.join(p.name for p in named)}; keep one of them"
            )
        if named:
            found[split] = named[0]
    if "train" in found:
        return found
    if len(there) == 1 and not found:
        return {"all": there[0]}
    names = ", ".join(path.name for path in there) or f"no {suffix} file"
    raise DataError(f"{data_dir} holds {names}; {expected}")


def load_own(
    data_dir: Path | None,
    settings: OwnFileSettings,
    read: Callable[[Path], Iterable[Record]],
    *,
    suffix: str,
    task: str,
    seed: int,
) -> Splits:
    """The splits of a person's own files.

    Args:
        data_dir: The folder.
        settings: Columns and fractions.
        read: From a file to its rows.
        suffix: End of the files' names.
        task: The task's name, for messages.
        seed: Seeds the split of what has no file of its own.

    Returns:
        The splits. Rows of one prompt are one example with all their completions.

    Raises:
        DataError: A file is missing, empty or malformed, columns are missing, or a label is unknown.
        ConfigError: A setting has no effect on these files.
    """
    files = find_files(data_dir, suffix, task=task)
    notes: list[str] = []
    rows: dict[str, list[OwnRow]] = {}
    for split, path in files.items():
        rows[split], told = _checked(path, list(read(path)), settings)
        notes += told
    kinds = {(bool(row.source), bool(row.label)) for part in rows.values() for row in part}
    if len(kinds) > 1:
        raise DataError(
            f"{', '.join(map(str, files.values()))}: the files have rows of different shapes; use one"
        )
    _check_settings(settings, files, *kinds.pop())
    asked = any(
        row.source for part in rows.values() for row in part
    )  # a text to be learnt whole is nothing to be asked for
    parts, told = divide(
        rows, settings.validation_fraction, settings.test_fraction, seed=seed, test_wanted=asked
    )
    labels = sort_labels({row.label for part in rows.values() for row in part if row.label})
    _check_labels(rows, labels)
    notes += _alike(labels)
    if not asked:
        parts["test"] = []
        told.append(
            "test: empty, as texts to be learnt whole cannot be asked for; the validation loss tells (--no_eval)"
        )
    made = {split: _examples(split, part, labels) for split, part in parts.items()}
    return Splits(
        made["train"],
        made["validation"],
        made["test"],
        files=tuple(files.values()),
        notes=(*notes, *told),
        labels=labels,
    )


def _checked(
    path: Path, records: Sequence[Record], settings: OwnFileSettings
) -> tuple[list[OwnRow], list[str]]:
    """The rows of one file, all of one shape."""
    if not records:
        raise DataError(f"{path}: no rows; the file is empty")
    first = records[0].values
    shapes = ((settings.prompt, settings.completion), (settings.text, settings.label), (settings.text,))
    shape = next((s for s in shapes if all(column in first for column in s)), None)
    if shape is None:
        missing = [column for pair in shapes[:2] for column in pair if column not in first]
        hint = next((h for h in (did_you_mean(c, list(map(str, first))) for c in missing) if h), "")
        raise DataError(
            f"{records[0].where}: expected the columns {settings.prompt} and {settings.completion}, or {settings.text} and"
            f" {settings.label}, or {settings.text} alone; found {', '.join(map(str, first)) or 'nothing'}{hint}; name yours"
            " with task.settings, such as --set task.settings.prompt=question"
        )
    rows = [_row(record, shape, labelled=shape == shapes[1]) for record in records]
    unused = sorted({str(key) for record in records for key in record.values} - set(shape))
    told = [f"{path.name}: columns passed over: {', '.join(unused)}"] if unused else []
    num_equal = len(rows) - len({(row.source, row.answer, row.label) for row in rows})
    return rows, told + ([f"{path.name}: duplicate rows kept: {num_equal:,}"] if num_equal else [])


def _row(record: Record, shape: Sequence[str], *, labelled: bool) -> OwnRow:
    """One row of a known shape."""
    values = []
    for column in shape:
        value = record.values.get(column)
        if labelled and column == shape[1]:
            value = _label(record, column)
        text = record.text(column) if not isinstance(value, str) else value
        if not text.strip():
            raise DataError(f"{record.where}: '{column}' is empty; fill it or leave the row out")
        values.append(text)
    if len(shape) == 1:
        return OwnRow(record.where, values[0], "", answer=values[0])
    if labelled:
        return OwnRow(record.where, values[0], values[0], label=values[1])
    return OwnRow(record.where, values[0], values[0], answer=values[1])


def _label(record: Record, column: str) -> str:
    """A class's name, which may be written as a number."""
    value = record.values.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:  # in many data sets -1 says that nobody knows the class
            raise DataError(
                f"{record.where}: '{column}' is {value}, which is no class; leave the row out, or give class names"
            )
        return str(value)
    return record.text(column).strip()


def _alike(labels: Sequence[str]) -> list[str]:
    """What a person is told of class names that may be meant to be one."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(" ".join(label.casefold().split()), []).append(label)
    same = [", ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    return (
        [f"labels that differ in case or white space alone are different classes: {'; '.join(same)}"]
        if same
        else []
    )


def _check_settings(
    settings: OwnFileSettings, files: Mapping[str, Path], is_asked: bool, is_labelled: bool
) -> None:
    """Refuse settings that these files give no effect."""
    usual = OwnFileSettings()
    read = ("text", "label") if is_labelled else ("prompt", "completion") if is_asked else ("text",)
    idle = {
        name: f"the rows are read as {' and '.join(read)}"
        for name in ("prompt", "completion", "text", "label")
    }
    idle = {name: why for name, why in idle.items() if name not in read}
    if "validation" in files:
        idle["validation_fraction"] = f"{files['validation'].name} is the validation split"
    if "all" not in files:
        idle["test_fraction"] = f"what is scored stands in a file of its own beside {files['train'].name}"
    elif not is_asked:
        idle["test_fraction"] = "texts to be learnt whole are not scored by asking"
    for name, why in idle.items():
        if getattr(settings, name) != getattr(usual, name):
            raise ConfigError(
                f"task.settings.{name} {getattr(settings, name)!r} has no effect: {why}; leave it out"
            )


def divide(
    rows: Mapping[str, Sequence[OwnRow]],
    validation: float,
    test: float,
    *,
    seed: int,
    test_wanted: bool = True,
) -> tuple[dict[str, list[OwnRow]], list[str]]:
    """Rows by split: what has no file is taken from train, and what stands in a later split leaves the earlier ones.

    Args:
        rows: By file: "all" alone, or "train" with what there is of the others.
        validation: Share of different keys for validation.
        test: Share for test.
        seed: Seeds the choice.
        test_wanted: Whether one file is to give a test split.

    Returns:
        All three splits, and notes.

    Raises:
        DataError: Nothing is left of a split.
    """
    parts = {split: list(rows.get(split, ())) for split in STEMS}
    notes: list[str] = []
    if "all" in rows:
        parts["train"] = list(rows["all"])
        if test_wanted:
            parts["train"], parts["test"] = _hold_out(parts["train"], test, f"{seed}:test")
    elif test_wanted and "test" not in rows:
        notes.append("test: no file, so nothing is scored; add one, or turn evaluation off (--no_eval)")
    for split, other in (("validation", "test"), ("train", "test"), ("train", "validation")):
        taken = {row.key for row in parts[other]}
        kept = [row for row in parts[split] if row.key not in taken]
        if parts[split] and not kept:
            raise DataError(f"every row of {split} also stands in {other}; check that the files differ")
        if len(kept) < len(parts[split]):
            notes.append(
                f"{split}: rows dropped because they also stand in {other}: {len(parts[split]) - len(kept):,}"
            )
        parts[split] = kept
    if not parts["validation"]:
        parts["train"], parts["validation"] = _hold_out(parts["train"], validation, f"{seed}:validation")
        if "all" not in rows:
            notes.append(f"validation: no file, so {len(parts['validation']):,} rows of train")
    return parts, notes


def _hold_out(rows: Sequence[OwnRow], fraction: float, seed: str) -> tuple[list[OwnRow], list[OwnRow]]:
    """Rows without a share of their keys, and that share; independent of the rows' order."""
    keys = sorted(
        {row.key for row in rows},
        key=lambda k: hashlib.sha256(f"{seed}:{k}".encode("utf-8", "surrogatepass")).digest(),
    )
    wanted = max(1, round(fraction * len(keys)))
    if wanted >= len(keys):
        raise DataError(
            f"{len(keys)} different rows leave nothing to train on after {wanted} are held out; give more"
        )
    chosen = set(keys[:wanted])
    return [row for row in rows if row.key not in chosen], [row for row in rows if row.key in chosen]


def _check_labels(rows: Mapping[str, Sequence[OwnRow]], labels: Sequence[str]) -> None:
    """Refuse one class alone, and a class that cannot be learnt because train lacks it."""
    if not labels:
        return
    if len(labels) < 2:
        raise DataError(
            f"every row has the label '{labels[0]}'; a classifier needs rows of at least two classes"
        )
    known = {row.label for row in rows.get("train", rows.get("all", ()))}
    for part in rows.values():
        for row in part:
            if row.label not in known:
                hint = did_you_mean(row.label, known)
                raise DataError(
                    f"{row.where}: unknown label '{row.label}'{hint}; train has {', '.join(sorted(known)[:10])}"
                )


def _examples(split: str, rows: Sequence[OwnRow], labels: Sequence[str]) -> tuple[Example, ...]:
    """One example for each prompt with all its completions; one for each text."""
    numbers = {name: index for index, name in enumerate(labels)}
    if labels:
        return tuple(
            Example(f"{split}-{index}", row.source, label=numbers[row.label])
            for index, row in enumerate(rows)
        )
    grouped: dict[str, list[OwnRow]] = {}
    for row in rows:
        grouped.setdefault(row.key, []).append(row)
    return tuple(
        Example(f"{split}-{index}", same[0].source, tuple(dict.fromkeys(row.answer for row in same)))
        for index, same in enumerate(grouped.values())
    )
