"""Pairs of sentences with a label: rows of MultiNLI, SNLI, ChaosNLI, of GLUE's tables and of the hub.

A row is one of these, told by its keys:

- MultiNLI's and SNLI's own: gold_label ("-" for none), sentence1 (the premise), sentence2;
- ChaosNLI's: majority_label (e, n or c, what most of its 100 annotators chose) and example.premise, example.hypothesis;
- a tab-separated line, with GLUE's header or without one: label, premise, hypothesis;
- the hub's, where gold_label is the class's number, -1 for none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftlab.data_files import Record, read_json_lines, read_tabs
from peftlab.errors import DataError
from peftlab.files import write_text

LABELS = ("entailment", "neutral", "contradiction")
NO_GOLD = "-"
SUFFIXES = (".jsonl", ".tsv")
_COLUMNS = ("gold_label", "sentence1", "sentence2")


@dataclass(frozen=True, slots=True)
class Pair:
    """A premise and a hypothesis, white space made one blank.

    Attributes:
        label: The class, an index into `LABELS`; None where the row has no gold label.
        premise: What is given.
        hypothesis: What follows from it, contradicts it, or does neither.
    """

    label: int | None
    premise: str
    hypothesis: str

    @property
    def premise_key(self) -> str:
        """The premise as its letters and digits alone: equal however a release cut it into tokens or wrote its case."""
        return "".join(mark for mark in self.premise.casefold() if mark.isalnum())


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a file.

    Args:
        path: A file that ends in one of `SUFFIXES`.

    Yields:
        The pairs, in the file's order.

    Raises:
        DataError: A row is malformed, a sentence is empty, or a label is unknown; names file and line.
    """
    for record in read_json_lines(path) if path.suffix == ".jsonl" else read_tabs(path, _COLUMNS):
        yield _pair(record)


def _pair(record: Record) -> Pair:
    """One row."""
    if isinstance(record.values.get("example"), dict):  # ChaosNLI
        inner = Record(record.where, record.values["example"])
        label, premise, hypothesis = (
            record.text("majority_label"),
            inner.text("premise"),
            inner.text("hypothesis"),
        )
    else:
        label, premise, hypothesis = _label(record), record.text("sentence1"), record.text("sentence2")
    premise, hypothesis = " ".join(premise.split()), " ".join(hypothesis.split())
    if label.strip() == NO_GOLD:
        return Pair(None, premise, hypothesis)
    for name, text in (("premise", premise), ("hypothesis", hypothesis)):
        if not text:
            raise DataError(f"{record.where}: the {name} is empty; take the row out or fill it")
    return Pair(_index(record, label.strip()), premise, hypothesis)


def _label(record: Record) -> str:
    """A row's label as a text; the hub has the class's number, -1 for none."""
    number = record.values.get("gold_label")
    if isinstance(number, int) and not isinstance(number, bool) and -1 <= number < len(LABELS):
        return NO_GOLD if number == -1 else LABELS[number]
    return record.text("gold_label")


def _index(record: Record, label: str) -> int:
    """A label's class, by its name or ChaosNLI's letter."""
    for index, name in enumerate(LABELS):
        if label.lower() in (name, name[0]):
            return index
    raise DataError(
        f"{record.where}: unknown label '{label}'; expected {', '.join(LABELS)}, or {NO_GOLD} for none"
    )


def divide_pairs(
    pairs: Sequence[Pair], *, validation: float, test: float, seed: int
) -> dict[str, list[Pair]]:
    """Divide pairs into three parts that share no premise, however it is written.

    Args:
        pairs: All of them.
        validation: Share of the premises for validation, in (0, 1).
        test: Share of the premises for test, in (0, 1).
        seed: Chooses the premises; their order in `pairs` does not.

    Returns:
        "train", "validation" and "test", each in the order of `pairs`.

    Raises:
        DataError: The premises are too few for three parts.
    """
    keys = sorted(
        {pair.premise_key for pair in pairs},
        key=lambda key: hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest(),
    )
    num_test, num_validation = max(1, round(test * len(keys))), max(1, round(validation * len(keys)))
    if num_test + num_validation >= len(keys):
        raise DataError(f"{len(keys)} different premises cannot be divided into three parts; give more pairs")
    part_of = dict.fromkeys(keys, "train")
    part_of |= dict.fromkeys(keys[:num_test], "test")
    part_of |= dict.fromkeys(keys[num_test : num_test + num_validation], "validation")
    parts: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    for pair in pairs:
        parts[part_of[pair.premise_key]].append(pair)
    return parts


def write_pairs(path: Path, pairs: Iterable[Pair]) -> Path:
    """Write pairs as `read_pairs` reads them, with GLUE's header.

    Args:
        path: A .tsv file; its folder must be there.
        pairs: The pairs, which have no line ends and no tabs inside, as `read_pairs` gives them.

    Returns:
        The path.

    Raises:
        OutputError: It cannot be written.
    """
    lines = ["\t".join(_COLUMNS)]
    for pair in pairs:
        lines.append("\t".join((_name(pair.label), pair.premise, pair.hypothesis)))
    return write_text(path, "\n".join(lines) + "\n")


def _name(label: int | None) -> str:
    """A label as the files have it."""
    return NO_GOLD if label is None else LABELS[label]
