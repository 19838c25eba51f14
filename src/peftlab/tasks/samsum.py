r"""SAMSum: chats of a messenger, each to be told in one to three sentences.

A row of the files is a dialogue, one turn on each line, and a summary that a linguist wrote for it:

```
{"id": "1", "dialogue": "Ann: Are you home?\r\nBen: At eight.", "summary": "Ben will be home at eight."}
```

Each distinct dialogue is one example with all its summaries as references, in file order. Line ends are made one kind
(some rows have CRLF). A row without a dialogue or a summary (the published train split has one) is left out and counted.

The files go into one folder, given as `data_dir`: `train`, `val` (or `validation`, `dev`) and `test`, all three as
`.json` (one list, as published) or all three as `.csv` (columns id, dialogue, summary). By hub name: `knkarthick/samsum`.

| split | train | validation | test |
|---|---|---|---|
| rows published | 14,732 | 818 | 819 |

Source: the `corpus.7z` beside the paper, Gliwa, Mochol, Biesek and Wawer 2019, "SAMSum Corpus: A Human-annotated
Dialogue Dataset for Abstractive Summarization" (New Frontiers in Summarization, arXiv:1911.12237), which please cite.
SHA-256 of its files: val.json f291b34e..., test.json eb5ac232...; a run folder records those of the files it read.
Licence: CC BY-NC-ND 4.0: no commercial use, no derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peftlab.data_files import Record, count_note, keep_apart, read_csv, read_json_list
from peftlab.errors import DataError
from peftlab.task import Example, Splits

PROMPT = "dialogue:\n{source}\nsummary:"
METRICS = ("rouge_l", "rouge_1", "rouge_2", "rouge_lsum", "bleu", "meteor")
MAX_NEW_TOKENS = 128
HUB_FILES = {"train": "train.json", "validation": "val.json", "test": "test.json"}

NUM_ROWS = {"train": 14_732, "validation": 818, "test": 819}
STEMS = {"train": ("train",), "validation": ("val", "validation", "dev"), "test": ("test",)}
SUFFIXES = (".json", ".csv")
_EXPECTED = "Expected: train, val and test, all as .json or all as .csv."


def load(data_dir: Path | None, *, seed: int) -> Splits:
    """Read SAMSum from its upstream files.

    Args:
        data_dir: The folder that holds the three files.
        seed: Has no effect: the splits are the published ones.

    Returns:
        The splits. `notes` tell of row counts other than the published ones, rows left out, duplicates and shared
        dialogues: one that stands in test is dropped from train and validation, one of validation from train.

    Raises:
        DataError: No folder was given, it lacks a file or holds two for one split, or a file is malformed.

    Example:
        >>> load(None, seed=42)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        peftlab.errors.DataError: the SAMSum task reads files: give their folder with --data-dir. Expected: train, ...
    """
    if data_dir is None:
        raise DataError(f"the SAMSum task reads files: give their folder with --data-dir. {_EXPECTED}")
    files = _find(Path(data_dir))
    notes: list[str] = []
    keyed = {}
    for split, path in files.items():
        grouped, told = _read(split, path)
        notes += told
        keyed[split] = [(example.source, example) for example in _examples(split, grouped)]
    splits, told = keep_apart(keyed, what="dialogues")
    return Splits(
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        files=tuple(files.values()),
        notes=(*notes, *told),
    )


def _find(folder: Path) -> dict[str, Path]:
    """The file of each split."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; --data-dir must name the one with the SAMSum files. {_EXPECTED}"
        )
    found = {
        split: [
            path for stem in stems for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()
        ]
        for split, stems in STEMS.items()
    }
    missing = [split for split, paths in found.items() if not paths]
    if missing:
        there = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
        raise DataError(
            f"{folder} has no file for {', '.join(missing)}. Found: {', '.join(there[:10]) or 'none'}. {_EXPECTED}"
        )
    for split, paths in found.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise DataError(f"{folder} holds {names} for {split}; leave one of them there")
    return {split: paths[0] for split, paths in found.items()}


def _read(split: str, path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """All summaries of each dialogue, both in file order, and what a person should know."""
    records = (
        read_json_list(path) if path.suffix == ".json" else read_csv(path, ("id", "dialogue", "summary"))
    )
    grouped: dict[str, list[str]] = {}
    num_rows = num_empty = 0
    for record in records:
        num_rows += 1
        dialogue, summary = _plain(record, "dialogue"), _plain(record, "summary")
        if dialogue and summary:
            grouped.setdefault(dialogue, []).append(summary)
        else:
            num_empty += 1
    if not grouped:
        raise DataError(f"{path}: no row with a dialogue and a summary; take the upstream file")
    num_pairs = sum(len(texts) for texts in grouped.values())
    notes = count_note(
        split, num_rows, NUM_ROWS[split], num_pairs - sum(len(set(t)) for t in grouped.values())
    )
    if num_empty:
        notes.append(f"{split}: rows left out, without a dialogue or a summary: {num_empty:,}")
    return grouped, notes


def _plain(record: Record, key: str) -> str:
    """A text with one kind of line end and without white space around it."""
    return "\n".join(line.rstrip() for line in record.text(key).splitlines()).strip()


def _examples(split: str, grouped: Mapping[str, list[str]]) -> list[Example]:
    return [
        Example(id=f"{split}-{index}", source=dialogue, references=tuple(summaries))
        for index, (dialogue, summaries) in enumerate(grouped.items())
    ]
