"""Rows of SAMSum's, WikiSQL's and MultiNLI's shape, written by the project, in the data sets' own files."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
PLACES = ("the mill", "the harbour", "the old town", "the station")
LABELS = ("entailment", "neutral", "contradiction")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSON lines file.

    Args:
        path: Where; its folder is made if needed.
        rows: The rows.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def dialogues(split: str, count: int) -> list[dict[str, str]]:
    """Rows of SAMSum's shape.

    Args:
        split: Its name makes the rows of two splits differ.
        count: How many.

    Returns:
        The rows.
    """
    rows = []
    for number in range(count):
        first, second = NAMES[number % 8], NAMES[(number + 3) % 8]
        place = f"{PLACES[number % 4]} ({split} {number})"
        rows.append(
            {
                "id": f"{split}{number}",
                "summary": f"{first} and {second} meet at {place}. ",
                "dialogue": f"{first}: Where are you?\r\n{second}: At {place} 🙂\r\n{first}: I will come.",
            }
        )
    return rows


def write_samsum(folder: Path, *, form: str = "json", train: int = 24, held_out: int = 6) -> Path:
    """A small data set in SAMSum's own files.

    Args:
        folder: Where; made if needed.
        form: json or csv.
        train: Rows to train on.
        held_out: Rows of each other split.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", held_out), ("test", held_out)):
        rows, path = dialogues(split, count), folder / f"{split}.{form}"
        if form == "json":
            path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
        else:
            with path.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, ["id", "dialogue", "summary"])
                writer.writeheader()
                writer.writerows(rows)
    return folder


def table(split: str, number: int) -> dict[str, Any]:
    """A table of WikiSQL's shape: two names alike, a quote and a line break in the header.

    Args:
        split: Its name makes the tables of two splits differ.
        number: Which.

    Returns:
        A row of `{split}.tables.jsonl`.
    """
    rows = [[name, str(i + number), 1990 + i, f"{name}'s"] for i, name in enumerate(NAMES[:4])]
    header = ["Player", f"No. ({split}{number})", 'Year "A"\nof birth', "player"]
    return {
        "id": f"1-{split}-{number}",
        "header": header,
        "types": ["text", "text", "real", "text"],
        "rows": rows,
    }


def questions(split: str, count: int) -> list[dict[str, Any]]:
    """Rows of WikiSQL's shape, two about each table; all aggregations occur and the operators =, > and <.

    Args:
        split: The split.
        count: How many.

    Returns:
        The rows.
    """
    return [
        {
            "phase": 1,
            "table_id": f"1-{split}-{number // 2}",
            "question": f"Who of {split} {number} came after {1990 + number}?",
            "sql": {
                "sel": number % 4,
                "agg": number % 6,
                "conds": [[0, 0, f"{NAMES[number % 8]}'s"], [2, 1 + number % 2, 1990 + number]][: number % 3],
            },
        }
        for number in range(count)
    ]


def write_wikisql(
    folder: Path, *, tables: bool = True, databases: bool = True, train: int = 24, held_out: int = 6
) -> Path:
    """A small data set in WikiSQL's own files.

    Args:
        folder: Where; made if needed.
        tables: Whether the tables' files are there.
        databases: Whether the databases are there.
        train: Questions to train on.
        held_out: Questions of each other split.

    Returns:
        The folder.
    """
    for split, count in (("train", train), ("dev", held_out), ("test", held_out)):
        write_lines(folder / f"{split}.jsonl", questions(split, count))
        made = [table(split, number) for number in range((count + 1) // 2)]
        if tables:
            write_lines(folder / f"{split}.tables.jsonl", made)
        if databases:
            (folder / f"{split}.db").unlink(missing_ok=True)
            connection = sqlite3.connect(folder / f"{split}.db")
            for one in made:
                name = f"table_{one['id'].replace('-', '_')}"
                connection.execute(f"CREATE TABLE {name} (col0 text, col1 text, col2 real, col3 text)")
                connection.executemany(f"INSERT INTO {name} VALUES (?, ?, ?, ?)", one["rows"])
            connection.commit()
            connection.close()
    return folder


def pairs(split: str, count: int) -> list[dict[str, Any]]:
    """Rows of multinli_1.0's shape, three hypotheses to each premise, every eleventh without a gold label.

    Args:
        split: Its name makes the premises of two splits differ.
        count: How many.

    Returns:
        The rows.
    """
    rows = []
    for number in range(count):
        name, place = NAMES[number // 3 % 8], PLACES[number // 3 % 4]
        endings = (f"{name} sings.", f"{name} sings well.", f"{name} is silent.")
        gold = "-" if number % 11 == 10 else LABELS[number % 3]
        rows.append(
            {
                "annotator_labels": [LABELS[number % 3]], "genre": "fiction", "gold_label": gold,
                "pairID": f"{number}{gold[0]}", "promptID": str(number // 3),
                "sentence1": f"{name} sings at {place} ({split} {number // 3}).", "sentence2": endings[number % 3],
                "sentence1_binary_parse": "( ... )",
            }
        )  # fmt: skip
    return rows


def write_multi_nli(folder: Path, *, train: int = 60, held_out: int = 12) -> Path:
    """A small data set in MultiNLI's own files.

    Args:
        folder: Where; made if needed.
        train: Rows to train on, validation among them.
        held_out: Rows of the matched development set.

    Returns:
        The folder.
    """
    write_lines(folder / "multinli_1.0_train.jsonl", pairs("train", train))
    write_lines(folder / "multinli_1.0_dev_matched.jsonl", pairs("matched", held_out))
    return folder
