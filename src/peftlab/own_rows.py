"""A person's own rows: what they must look like, and how they are split.

Rows are mappings, all of one of two shapes, {"prompt", "completion"} or {"text", "label"}.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.data_files import is_text, sort_labels
from peftlab.errors import DataError, did_you_mean
from peftlab.task import Example, Splits

SHAPES = (("prompt", "completion"), ("text", "label"))
Row = Mapping[str, Any]


def from_rows(
    rows: Sequence[Row],
    *,
    seed: int,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    places: Sequence[str] = (),
) -> Splits:
    """Split rows into train, validation and test.

    Which split a row goes to depends on its prompt, the seed and how many different prompts there are, never on the
    order of the rows; equal prompts stay together. Rows with the same prompt become one example with all their
    completions as references; label rows stay one example each.

    Args:
        rows: All of the shape {"prompt", "completion"} or all of the shape {"text", "label"}.
        seed: Seeds the split.
        validation_fraction: Share of different prompts for validation, in (0, 1); at least one prompt.
        test_fraction: Share of different prompts for test, in (0, 1); at least one prompt.
        places: Where each row stands, for messages; "row 0", "row 1" ... where empty.

    Returns:
        The splits, examples in the order of their rows, ids "row-<index of the first row>", with the class names of
        label rows.

    Raises:
        DataError: A row is malformed, a fraction is out of range, or there are too few different prompts.

    Example:
        >>> splits = from_rows([{"prompt": f"say {n}", "completion": str(n)} for n in range(10)], seed=1)
        >>> len(splits.train), len(splits.validation), len(splits.test)
        (8, 1, 1)
    """
    for name, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise DataError(f"{name} must lie between 0 and 1, both excluded; got {fraction}")
    shape = _check(rows, places)
    examples = _text_examples(rows) if shape == SHAPES[0] else _label_examples(rows)
    prompts = sorted({e.source for e in examples}, key=lambda prompt: _digest(prompt, seed))
    num_test = max(1, round(test_fraction * len(prompts)))
    num_held_out = num_test + max(1, round(validation_fraction * len(prompts)))
    if num_held_out >= len(prompts):
        raise DataError(
            f"{len(prompts)} different prompts leave nothing to train on after {num_test} for test and "
            f"{num_held_out - num_test} for validation; give more rows or smaller fractions"
        )
    test, validation = set(prompts[:num_test]), set(prompts[num_test:num_held_out])
    return Splits(
        train=tuple(e for e in examples if e.source not in test | validation),
        validation=tuple(e for e in examples if e.source in validation),
        test=tuple(e for e in examples if e.source in test),
        notes=_notes(rows, shape),
        labels=labels_of(rows) if shape == SHAPES[1] else (),
    )


def labels_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The class names of label rows, in the order of their indices.

    Args:
        rows: Rows of the shape {"text", "label"}.

    Returns:
        Sorted names for string labels, as numbers where all are digits; "0", "1", ... for integer ones.

    Raises:
        DataError: A row is malformed, the rows have no labels, there are fewer than two classes, or integer labels
            leave gaps.

    Example:
        >>> labels_of([{"text": "dull", "label": "no"}, {"text": "fine", "label": "yes"}, {"text": "ok", "label": "yes"}])
        ('no', 'yes')
    """
    if _check(rows) != SHAPES[1]:
        raise DataError(
            "these rows have no 'label': expected {'text', 'label'}, got {'prompt', 'completion'}"
        )
    found = {row["label"] for row in rows}
    if len(found) < 2:
        raise DataError(
            f"every row has the label {found.pop()!r}; a classifier needs rows of at least two classes"
        )
    if all(isinstance(label, str) for label in found):
        return sort_labels(found)
    missing = sorted(set(range(len(found))) - found)
    if missing:
        raise DataError(
            f"integer labels must be 0 to {len(found) - 1} for {len(found)} classes, got {_listed(sorted(found))}; "
            "number them without gaps or give class names"
        )
    return tuple(str(label) for label in sorted(found))


def _listed(items: Sequence[object], most: int = 10) -> str:
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def _digest(prompt: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{prompt}".encode()).digest()


def _check(rows: Sequence[Row], places: Sequence[str] = ()) -> tuple[str, str]:
    """The shape of the rows, after all of them were found to be well formed."""
    if not rows:
        raise DataError("there are no rows; give at least three with different prompts")
    first = rows[0]
    shape = next(
        (s for s in SHAPES if isinstance(first, Mapping) and any(key in first for key in s)), SHAPES[0]
    )
    kinds: set[type] = set()
    for index, row in enumerate(rows):
        place = places[index] if places else f"row {index}"
        if not isinstance(row, Mapping):
            raise DataError(f"{place}: expected a mapping with {_keys(shape)}, got {type(row).__name__}")
        for key in row:
            if key not in shape:
                hint = did_you_mean(str(key), shape)
                raise DataError(
                    f"{place}: unknown key {key!r}{hint}; expected {_keys(shape)} and nothing else"
                )
        for key in shape:
            if key not in row:
                raise DataError(f"{place}: '{key}' is missing; expected {_keys(shape)}")
            kinds |= _check_value(place, key, row[key])
        if len(kinds) > 1:
            raise DataError(
                f"{place}: 'label' is a {type(row['label']).__name__}, unlike those before; use names or indices"
            )
    return shape


def _check_value(place: str, key: str, value: object) -> set[type]:
    """Refuse a bad value; the type of a label, so that a mixture is seen."""
    if key == "label" and isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise DataError(f"{place}: 'label' is {value}; class indices start at 0")
        return {int}
    if not isinstance(value, str):
        wanted = "a string or an integer" if key == "label" else "a string"
        raise DataError(f"{place}: '{key}' must be {wanted}, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{place}: '{key}' is empty; fill it or leave the row out")
    if not is_text(value):
        raise DataError(
            f"{place}: '{key}' holds half of a character (a lone surrogate), which no model can read; write it anew"
        )
    return {str} if key == "label" else set()


def _keys(shape: tuple[str, str]) -> str:
    return " and ".join(f"'{key}'" for key in shape)


def _text_examples(rows: Sequence[Row]) -> list[Example]:
    """One example for each prompt, with all its completions."""
    grouped: dict[str, tuple[int, list[str]]] = {}
    for index, row in enumerate(rows):
        grouped.setdefault(row["prompt"], (index, []))[1].append(row["completion"])
    return [
        Example(id=f"row-{index}", source=prompt, references=tuple(completions))
        for prompt, (index, completions) in grouped.items()
    ]


def _label_examples(rows: Sequence[Row]) -> list[Example]:
    """One example for each row, its label as a class index."""
    index_of = {name: index for index, name in enumerate(labels_of(rows))}
    return [
        Example(id=f"row-{index}", source=row["text"], label=index_of[str(row["label"])])
        for index, row in enumerate(rows)
    ]


def _notes(rows: Sequence[Row], shape: tuple[str, str]) -> tuple[str, ...]:
    num_equal = len(rows) - len({(row[shape[0]], row[shape[1]]) for row in rows})
    answers: dict[str, set[object]] = {}
    for row in rows:
        answers.setdefault(row[shape[0]], set()).add(row[shape[1]])
    num_several = sum(len(found) > 1 for found in answers.values())
    notes = []
    if num_equal:
        notes.append(f"duplicate rows kept: {num_equal:,}")
    if num_several and shape == SHAPES[1]:
        notes.append(f"texts with more than one label: {num_several:,}")
    return tuple(notes)
