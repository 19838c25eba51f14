r"""MultiNLI: whether a hypothesis follows from a premise (entailment), contradicts it, or neither (neutral).

A line of `multinli_1.0_train.jsonl` (with parses and more keys, which are not read):

```
{"gold_label": "neutral", "sentence1": "Ann sings.", "sentence2": "Ann sings well.", "pairID": "1n", "promptID": "1"}
```

Each row is an example with its class (0 entailment, 1 neutral, 2 contradiction) and the same as a text: an encoder is
trained with a classification head, a causal or sequence-to-sequence model writes the label. The hypothesis stands before
the premise, so that a source that is too long loses the end of its premise. Rows without a gold label ("-") are left out
and counted.

Which files are read follows from what lies in the folder given as `data_dir` (`.jsonl` or `.tsv`):

| part | names | where absent |
|---|---|---|
| train | multinli_1.0_train, snli_1.0_train, train | |
| validation | validation, val, snli_1.0_dev, dev | one premise in twenty of train, at most 2,000, by seed |
| test | multinli_1.0_dev_matched, dev_matched, validation_matched, snli_1.0_test, test | |

MultiNLI's own test labels were never published: its matched development set is scored. A folder with neither train nor
test takes all its files as one pool, of which one premise in ten goes to validation and one to test, by seed. Rows may
also be those of ChaosNLI (jsonl; the class that most of its 100 annotators chose), and of tab-separated files: label,
premise, hypothesis without a header, or GLUE's columns gold_label, sentence1, sentence2; of the hub, where the label is
the class's number, -1 for none (`nyu-mll/multi_nli`, `stanfordnlp/snli`). Premises never stand in two parts.

| | train | dev matched | dev mismatched |
|---|---|---|---|
| rows published, with a gold label | 392,702 | 9,815 | 9,832 |

Source: `multinli_1.0.zip`, Williams, Nangia and Bowman 2018, "A Broad-Coverage Challenge Corpus for Sentence
Understanding through Inference" (NAACL, arXiv:1704.05426), which please cite; for ChaosNLI Nie, Zhou and Bansal 2020
(EMNLP, arXiv:2010.03532). No checksum is published; a run folder records those of the files it read.
Licence: MultiNLI mostly OANC's, parts CC BY 3.0 and CC BY-SA 3.0; ChaosNLI's labels CC BY-NC 4.0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from peftlab.data_files import count_note, keep_apart
from peftlab.errors import DataError
from peftlab.nli_rows import LABELS as LABELS
from peftlab.nli_rows import SUFFIXES, read_pairs
from peftlab.task import Example, Splits

PROMPT = "{source}\nentailment, neutral or contradiction:"
METRICS = ("label_accuracy",)
MAX_NEW_TOKENS = 8
NUM_EVALUATED = 1000
HUB_FILES = {
    "train": "train.jsonl",
    "validation": "validation.jsonl",
    "validation_matched": "validation_matched.jsonl",
    "test": "test.jsonl",
}
HUB_COLUMNS = {"label": "gold_label", "premise": "sentence1", "hypothesis": "sentence2"}

STEMS = {
    "train": ("multinli_1.0_train", "snli_1.0_train", "train"),
    "validation": ("validation", "val", "snli_1.0_dev", "dev"),
    "test": ("multinli_1.0_dev_matched", "dev_matched", "validation_matched", "snli_1.0_test", "test"),
}
NUM_ROWS = {"multinli_1.0_train": 392_702, "multinli_1.0_dev_matched": 9_815, "validation_matched": 9_815}
_PART, _POOLED_PART, _MOST_HELD_OUT = 20, 10, 2_000
_EXPECTED = (
    "Expected: multinli_1.0_train.jsonl and multinli_1.0_dev_matched.jsonl; or train and test as .jsonl or .tsv; or"
    " any .jsonl and .tsv files, which are then divided."
)

Keyed = list[tuple[str, Example]]
"""Examples with their premises."""
_FACTS = (("labels", json.dumps(LABELS)),)  # also those that a small sample lacks


def load(data_dir: Path | None, *, seed: int) -> Splits:
    """Read MultiNLI, or rows like its, from files.

    Args:
        data_dir: The folder that holds the files.
        seed: Chooses the premises that are held out where the files have no split of their own.

    Returns:
        The splits, with classes and texts. `notes` tell what was divided, of row counts other than the published ones,
        of rows left out, duplicates, pairs with several labels and shared premises: one that stands in test is dropped
        from train and validation, one of validation from train.

    Raises:
        DataError: No folder was given, it lacks a file or holds two for one part, a file is malformed, or a label is
            unknown.

    Example:
        >>> load(None, seed=42)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        peftlab.errors.DataError: the MultiNLI task reads files: give their folder with --data-dir. Expected: multin...
    """
    if data_dir is None:
        raise DataError(f"the MultiNLI task reads files: give their folder with --data-dir. {_EXPECTED}")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; --data-dir must name the one with the files. {_EXPECTED}")
    found = {split: _find(folder, split) for split in STEMS}
    if found["train"] is None and found["test"] is None:
        files, keyed, notes = _pooled(folder, seed)
    else:
        files, keyed, notes = _given(folder, found, seed)
    splits, told = keep_apart(keyed, what="premises")
    return Splits(
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        files=tuple(files),
        notes=(*notes, *told),
        labels=LABELS,
    )


def _find(folder: Path, split: str) -> Path | None:
    """The file of a part; None where there is none."""
    names = [f"{stem}{suffix}" for stem in STEMS[split] for suffix in SUFFIXES]
    paths = [folder / name for name in names if (folder / name).is_file()]
    if len(paths) > 1:
        raise DataError(
            f"{folder} holds {' and '.join(path.name for path in paths)} for {split}; leave one of them there"
        )
    return paths[0] if paths else None


def _given(
    folder: Path, found: Mapping[str, Path | None], seed: int
) -> tuple[list[Path], dict[str, Keyed], list[str]]:
    """The parts as the files have them; validation is held out of train where it has no file."""
    files = {split: path for split, path in found.items() if path is not None}
    lacking = [split for split in ("train", "test") if split not in files]
    if lacking:
        there = ", ".join(path.name for path in files.values())
        raise DataError(f"{folder} has {there}, but no file for {lacking[0]}. {_EXPECTED}")
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix in SUFFIXES and path not in files.values()
    )
    notes = [f"files that are not read: {', '.join(others)}"] if others else []
    keyed: dict[str, Keyed] = {}
    is_hubs = (
        files["test"].stem == "validation_matched"
    )  # then its train is MultiNLI's, though it does not say so
    for split, path in files.items():
        stem = "multinli_1.0_train" if is_hubs and split == "train" else path.stem
        keyed[split], told = _read(split, [path], NUM_ROWS.get(stem))
        notes += told
    if "validation" not in keyed:
        premises = _ordered(keyed["train"], seed)
        count = min(_MOST_HELD_OUT, max(1, len(premises) // _PART))
        keyed["train"], keyed["validation"] = _divide(keyed["train"], set(premises[:count]))
        notes.append(
            f"validation: {count:,} of {len(premises):,} premises held out of train (no file for it)"
        )
    return list(files.values()), {split: keyed[split] for split in STEMS}, notes


def _pooled(folder: Path, seed: int) -> tuple[list[Path], dict[str, Keyed], list[str]]:
    """All files as one pool, divided by premise."""
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder} holds no .jsonl and no .tsv file. {_EXPECTED}")
    pool, notes = _read("pool", files)
    premises = _ordered(pool, seed)
    count = max(1, len(premises) // _POOLED_PART)
    if len(premises) < 3:
        raise DataError(f"{folder}: {len(premises)} different premises cannot be divided into three parts")
    rest, test = _divide(pool, set(premises[:count]))
    train, validation = _divide(rest, set(premises[count : 2 * count]))
    names = ", ".join(path.name for path in files)
    notes.append(f"no train and no test file: {names} divided by premise, seed {seed}")
    return files, {"train": train, "validation": validation, "test": test}, notes


def _ordered(keyed: Keyed, seed: int) -> list[str]:
    """Different premises in an order that depends on the seed and the texts alone."""
    # surrogatepass: JSON can hold a lone surrogate, which must not stop the split
    return sorted(
        {premise for premise, _ in keyed},
        key=lambda premise: hashlib.sha256(f"{seed}:{premise}".encode("utf-8", "surrogatepass")).digest(),
    )


def _divide(keyed: Keyed, chosen: set[str]) -> tuple[Keyed, Keyed]:
    """Examples of premises that are not chosen, and of those that are."""
    return [e for e in keyed if e[0] not in chosen], [e for e in keyed if e[0] in chosen]


def _read(split: str, files: list[Path], published: int | None = None) -> tuple[Keyed, list[str]]:
    """Examples of one part, in file order, and what a person should know."""
    keyed: Keyed = []
    labels: dict[str, set[int]] = {}
    num_without = num_duplicates = 0
    for path in files:
        for pair in read_pairs(path):
            label = pair.label
            if label is None:
                num_without += 1
                continue
            source = f"hypothesis: {pair.hypothesis}\npremise: {pair.premise}"
            known = labels.setdefault(source, set())
            num_duplicates += label in known
            known.add(label)
            example = Example(f"{split}-{len(keyed)}", source, (LABELS[label],), label=label, facts=_FACTS)
            keyed.append((pair.premise, example))
    if not keyed:
        raise DataError(f"{files[0]}: no row with a gold label in it; take the upstream file")
    notes = count_note(split, len(keyed), published, num_duplicates)
    several = sum(len(known) > 1 for known in labels.values())
    if num_without:
        notes.append(f"{split}: rows left out, without a gold label: {num_without:,}")
    if several:
        notes.append(f"{split}: pairs with more than one label: {several:,}")
    return keyed, notes
