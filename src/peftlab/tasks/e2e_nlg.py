"""The E2E NLG challenge: restaurants described by attributes, to be said in one to a few sentences.

A row of the CSV files is a meaning representation (MR) and one text that a person wrote for it:

```
mr    name[Blue Spice], eatType[coffee shop], area[city centre]
ref   A coffee shop in the city centre area called Blue Spice.
ref   Blue Spice is a coffee shop in city centre.
```

Each distinct MR is one example with all its texts as references, in file order; MRs keep the order in which they first
appear (the order in which published system outputs are written). `values` are the values of `name` and `near`: the
texts hold them letter by letter in 98-100 % of the rows, the other attributes are mostly paraphrased ("kid friendly").

The files go into one folder, given as `data_dir` (or as the archive itself, `task.archive`), under their upstream names;
which release it is follows from them. By hub name: `tuetschek/e2e_nlg` and `tuetschek/e2e_nlg_cleaned`.

| release | train | validation | test | rows published |
|---|---|---|---|---|
| original | trainset.csv | devset.csv | testset_w_refs.csv | 42,061 / 4,672 / 4,693 |
| cleaned | train-fixed.no-ol.csv | devel-fixed.no-ol.csv | test-fixed.csv | 33,525 / 4,299 / 4,693 |

Source: github.com/tuetschek/e2e-dataset, Novikova, Dušek and Rieser 2017, "The E2E Dataset: New Challenges for
End-to-End Generation" (SIGDIAL, arXiv:1706.09254); github.com/tuetschek/e2e-cleaning, Dušek, Howcroft and Rieser 2019,
"Semantic Noise Matters for Neural Natural Language Generation" (INLG, arXiv:1911.03905).
SHA-256 of its files: devset.csv fc26b78c..., testset_w_refs.csv edc8db68..., devel-fixed.no-ol.csv bb88df25...,
test-fixed.csv 99b43c27...; a run folder records those of the files it read.
Licence: CC BY-SA 4.0. Please cite the first paper, and the second for the cleaned release.

Scored are the metrics of the challenge (BLEU, NIST, METEOR, ROUGE-L, CIDEr, as its script computes them) beside those that
other papers use. METEOR is a program in Java: it takes some ten seconds a scoring, and is "not computed" without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peftlab.data_files import count_note, read_csv
from peftlab.errors import DataError
from peftlab.task import Example, Splits

PROMPT = "meaning: {source}\ntext:"
METRICS = (
    "bleu",
    "rouge_l",
    "value_coverage",
    "bleu_e2e",
    "nist",
    "rouge_l_e2e",
    "cider",
    "meteor",
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "rouge_1",
    "rouge_2",
    "rouge_lsum",
)
HUB_FILES = {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"}
HUB_COLUMNS = {"meaning_representation": "mr", "human_reference": "ref"}

VERBATIM = ("name", "near")
_ATTRIBUTE = re.compile(r"(?:^|, )([^\[\],]+)\[([^\]]*)\]")


@dataclass(frozen=True, slots=True)
class Release:
    """One published form of the data set.

    Attributes:
        files: File name of each split.
        num_rows: Rows published in each split; none for the hub's form, which either release has there.
    """

    files: Mapping[str, str]
    num_rows: Mapping[str, int]


RELEASES = {
    "original": Release(
        {"train": "trainset.csv", "validation": "devset.csv", "test": "testset_w_refs.csv"},
        {"train": 42_061, "validation": 4_672, "test": 4_693},
    ),
    "cleaned": Release(
        {"train": "train-fixed.no-ol.csv", "validation": "devel-fixed.no-ol.csv", "test": "test-fixed.csv"},
        {"train": 33_525, "validation": 4_299, "test": 4_693},
    ),
    "hub": Release(HUB_FILES, {}),
}


def load(data_dir: Path | None, *, seed: int) -> Splits:
    """Read the E2E data from its upstream CSV files.

    Args:
        data_dir: The folder that holds the three files of one release.
        seed: Has no effect: the splits are the published ones.

    Returns:
        The splits. `notes` tell of row counts other than the published ones, duplicate rows and shared MRs: an MR that
        stands in test is dropped from train and validation, one that stands in validation is dropped from train.

    Raises:
        DataError: No folder was given, its files are not those of exactly one release, or a file is malformed.

    Example:
        >>> load(None, seed=42)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        peftlab.errors.DataError: the E2E task reads files: give their folder with --data-dir. The original release...
    """
    if data_dir is None:
        raise DataError(f"the E2E task reads files: give their folder with --data-dir. {_expected()}")
    release = _find_release(Path(data_dir))
    files = {split: Path(data_dir) / name for split, name in release.files.items()}
    notes: list[str] = []
    texts = {split: _read(path) for split, path in files.items()}
    published = _published(release, texts)
    for split in files:
        notes += _count_notes(split, texts[split], published[split])
    for split, other in (("validation", "test"), ("train", "test"), ("train", "validation")):
        shared = [meaning for meaning in texts[split] if meaning in texts[other]]
        for meaning in shared:
            del texts[split][meaning]
        if shared:
            notes.append(f"{split}: meanings dropped because they also stand in {other}: {len(shared):,}")
        if not texts[split]:
            raise DataError(
                f"{files[split]}: every meaning also stands in {files[other]}; check that they differ"
            )
    return Splits(
        train=_examples("train", texts["train"]),
        validation=_examples("validation", texts["validation"]),
        test=_examples("test", texts["test"]),
        files=tuple(files.values()),
        notes=tuple(notes),
    )


def _expected() -> str:
    return " ".join(
        f"The {name} release has {', '.join(release.files.values())}." for name, release in RELEASES.items()
    )


def _find_release(folder: Path) -> Release:
    """The release whose three files stand in the folder."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; --data-dir must name the one with the E2E files. {_expected()}"
        )
    missing = {
        name: [file for file in release.files.values() if not (folder / file).is_file()]
        for name, release in RELEASES.items()
    }
    complete = [name for name, files in missing.items() if not files]
    if len(complete) == 1:
        return RELEASES[complete[0]]
    if complete:
        raise DataError(
            f"{folder} holds the {' and the '.join(complete)} release; put each in a folder of its own and name one"
        )
    begun = {name: files for name, files in missing.items() if len(files) < len(RELEASES[name].files)}
    gaps = "; ".join(f"the {name} release lacks {', '.join(files)}" for name, files in begun.items())
    found = sorted(path.name for path in folder.iterdir() if path.suffix == ".csv")
    raise DataError(
        f"{folder} holds no complete release of the E2E data{': ' if gaps else ''}{gaps}. "
        f"Found: {', '.join(found[:10]) or 'no CSV file'}. {_expected()}"
    )


def _read(path: Path) -> dict[str, list[str]]:
    """All texts of each meaning, both in file order."""
    grouped: dict[str, list[str]] = {}
    for record in read_csv(path, ("mr", "ref")):
        row = {column: record.text(column).strip() for column in ("mr", "ref")}
        for needed in row:
            if not row[needed]:
                raise DataError(f"{record.where}: '{needed}' is empty; take the row out or fill it")
        if not _ATTRIBUTE.search(row["mr"]):
            raise DataError(
                f"{record.where}: expected a meaning such as 'name[Aromi], area[riverside]', got '{row['mr']}'"
            )
        grouped.setdefault(row["mr"], []).append(row["ref"])
    if not grouped:
        raise DataError(f"{path}: no rows below the header; take the upstream file")
    return grouped


def _published(release: Release, texts: Mapping[str, Mapping[str, list[str]]]) -> Mapping[str, int]:
    """The rows that should be there; of the hub's form, those of the release that train is whole of, else the original's."""
    if release.num_rows:
        return release.num_rows
    num_train = sum(map(len, texts["train"].values()))
    counts = [known.num_rows for known in RELEASES.values() if known.num_rows]
    return next((rows for rows in counts if rows["train"] == num_train), counts[0])


def _count_notes(split: str, grouped: Mapping[str, list[str]], published: int) -> list[str]:
    """What a person should know of one file's rows."""
    num_rows = sum(len(texts) for texts in grouped.values())
    num_duplicates = num_rows - sum(len(set(texts)) for texts in grouped.values())
    return count_note(split, num_rows, published, num_duplicates)


def _examples(split: str, grouped: Mapping[str, list[str]]) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"{split}-{index}",
            source=meaning,
            references=tuple(texts),
            values=tuple(
                dict.fromkeys(
                    value for key, value in _ATTRIBUTE.findall(meaning) if key in VERBATIM and value
                )
            ),
        )
        for index, (meaning, texts) in enumerate(grouped.items())
    )
