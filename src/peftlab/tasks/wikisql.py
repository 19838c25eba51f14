r"""WikiSQL: a question about one table, to be answered by a query.

A line of `{split}.jsonl` is a question, its table and the query; a line of `{split}.tables.jsonl` is a table:

```
{"phase": 1, "table_id": "1-1", "question": "Who wears 42?", "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, "42"]]}}
{"id": "1-1", "header": ["Player", "No."], "types": ["text", "text"], "rows": [["Ann", "42"], ["Ben", "7"]]}
```

The source is the question and the table's column names, the reference the query as text (`peftlab.wikisql_queries`):

```
question: Who wears 42?
columns: "Player", "No."                    SELECT "Player" FROM table WHERE "No." = '42'
```

Each distinct question about a table is one example with all its queries as references, in file order.

The files go into one folder, given as `data_dir` (or as the archive itself, `task.archive`), under their upstream names:
`train`, `dev` and `test`, each with `.jsonl`, `.tables.jsonl` and `.db`. Without all three `.tables.jsonl` the model is not
told any column and queries name them `col0`, `col1`, ...; the notes say so. Without a `.db` no query of its split can be
executed; the notes say that too.

| split | train | dev | test |
|---|---|---|---|
| questions published | 56,355 | 8,421 | 15,878 |

Source: `data.tar.bz2` of github.com/salesforce/WikiSQL, Zhong, Xiong and Socher 2017, "Seq2SQL: Generating Structured
Queries from Natural Language using Reinforcement Learning" (arXiv:1709.00103), which please cite. No checksum is
published; a run folder records those of the files it read. By hub name, `Salesforce/wikisql`: tables, but no databases.
Licence: BSD 3-Clause.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peftlab.data_files import Record, count_note, keep_apart, read_json_lines
from peftlab.errors import DataError
from peftlab.task import Example, Splits
from peftlab.wikisql_queries import Query, check_query, column_names, numbered_columns, write_query

PROMPT = "{source}\nSQL:"
METRICS = ("logical_form", "logical_form_2018", "execution_accuracy", "exact_match")
MAX_NEW_TOKENS = 128
HUB_FILES = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}

STEMS = {"train": "train", "validation": "dev", "test": "test"}
NUM_ROWS = {"train": 56_355, "validation": 8_421, "test": 15_878}
MOST_COLUMNS = 64
"""Columns that a table which is not known may have; the widest published one has fewer."""
_EXPECTED = (
    "Expected: train.jsonl, dev.jsonl and test.jsonl, with {split}.tables.jsonl and {split}.db beside each."
)

Tables = Mapping[str, tuple[str, ...]]
"""Column names by table id."""


def load(data_dir: Path | None, *, seed: int) -> Splits:
    """Read WikiSQL from its upstream files.

    Args:
        data_dir: The folder that holds the files.
        seed: Has no effect: the splits are the published ones.

    Returns:
        The splits. `notes` tell of missing tables and databases, of question counts other than the published ones, of
        duplicate rows and of shared tables: one that stands in test is dropped from train and validation with all its
        questions, one of validation from train; so is a question that reads the same with the same columns.

    Raises:
        DataError: No folder was given, it lacks a file, a file is malformed, or a question's table or column is not
            there.

    Example:
        >>> load(None, seed=42)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        peftlab.errors.DataError: the WikiSQL task reads files: give their folder with --data-dir. Expected: train.js...
    """
    if data_dir is None:
        raise DataError(f"the WikiSQL task reads files: give their folder with --data-dir. {_EXPECTED}")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; --data-dir must name the one with the WikiSQL files. {_EXPECTED}"
        )
    missing = [f"{stem}.jsonl" for stem in STEMS.values() if not (folder / f"{stem}.jsonl").is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}. {_EXPECTED}")
    files = [folder / f"{stem}.jsonl" for stem in STEMS.values()]
    table_files, notes = _table_files(folder)
    keyed = {}
    for split, stem in STEMS.items():
        tables = _read_tables(table_files[split]) if split in table_files else None
        keyed[split], told = _read(split, folder / f"{stem}.jsonl", tables, folder / f"{stem}.db")
        notes += told
    apart, told = keep_apart(keyed, what="tables")
    by_source = {split: [(example.source, example) for example in kept] for split, kept in apart.items()}
    splits, more = keep_apart(by_source, what="questions about tables of the same columns")
    return Splits(
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        files=(*files, *table_files.values()),
        notes=(*notes, *told, *more),
    )


def from_hub(file: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The hub's rows, each of which holds its table, as WikiSQL's own files.

    Args:
        file: The file of questions of this split.
        rows: The hub's rows.

    Returns:
        The rows of the file of questions and of the file of tables, each table once.

    Raises:
        KeyError: The rows are not WikiSQL's.
    """
    questions: list[dict[str, Any]] = []
    tables: dict[str, dict[str, Any]] = {}
    for row in rows:
        table, sql, conds = row["table"], row["sql"], row["sql"]["conds"]
        parts = (conds["column_index"], conds["operator_index"], conds["condition"])
        query = {
            "sel": sql["sel"],
            "agg": sql["agg"],
            "conds": [list(c) for c in zip(*parts, strict=True)],
        }
        questions.append(
            {
                "phase": row["phase"],
                "table_id": table["id"],
                "question": row["question"],
                "sql": query,
            }
        )
        tables.setdefault(table["id"], {key: table[key] for key in ("id", "header", "types", "rows")})
    return {file: questions, file.replace(".jsonl", ".tables.jsonl"): list(tables.values())}


def _table_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files of tables, all or none, and what is said of missing ones."""
    found = {split: folder / f"{stem}.tables.jsonl" for split, stem in STEMS.items()}
    absent = [path.name for path in found.values() if not path.is_file()]
    notes = []
    if absent and len(absent) < len(found):
        raise DataError(
            f"{folder} lacks {', '.join(absent)}, but has the tables of other splits: questions would be told their"
            " columns in some splits only; give the tables of all three splits or of none"
        )
    if absent:
        found = {}
        notes.append(
            f"no tables ({', '.join(absent)}): the model is not told any column, queries name them col0, col1, ...;"
            " scores say little about writing SQL"
        )
    databases = [f"{stem}.db" for stem in STEMS.values() if not (folder / f"{stem}.db").is_file()]
    if databases:
        notes.append(
            f"no databases ({', '.join(databases)}): queries cannot be executed, so no execution accuracy"
        )
    return found, notes


def _read_tables(path: Path) -> Tables:
    """The column names of each table."""
    tables: dict[str, tuple[str, ...]] = {}
    for record in read_json_lines(path):
        table = record.text("id")
        header = record.values.get("header")
        if not isinstance(header, list) or not header:
            raise DataError(f"{record.where}: 'header' must be a list of column names, got {header!r}")
        if table in tables:
            raise DataError(f"{record.where}: the table '{table}' stands in the file a second time")
        tables[table] = column_names(header)
    if not tables:
        raise DataError(f"{path}: no tables in it; take the upstream file")
    return tables


def _read(
    split: str, path: Path, tables: Tables | None, database: Path
) -> tuple[list[tuple[str, Example]], list[str]]:
    """Examples with their tables, in file order, and what a person should know."""
    grouped: dict[tuple[str, str], list[str]] = {}
    num_rows = 0
    for record in read_json_lines(path):
        table, question, text = _row(record, tables)
        grouped.setdefault((table, _source(question, tables[table] if tables else None)), []).append(text)
        num_rows += 1
    if not grouped:
        raise DataError(f"{path}: no questions in it; take the upstream file")
    examples = [
        (
            table,
            Example(
                id=f"{split}-{index}",
                source=source,
                references=tuple(dict.fromkeys(queries)),
                facts=_facts(table, tables, database),
            ),
        )
        for index, ((table, source), queries) in enumerate(grouped.items())
    ]
    repeated = num_rows - sum(len(example.references) for _, example in examples)
    return examples, count_note(split, num_rows, NUM_ROWS[split], 0) + (
        [f"{split}: duplicate rows read once: {repeated:,}"] if repeated else []
    )


def _row(record: Record, tables: Tables | None) -> tuple[str, str, str]:
    """Table, question and the query's text of one line."""
    table, question = record.text("table_id"), " ".join(record.text("question").split())
    if not question:
        raise DataError(f"{record.where}: 'question' is empty; take the row out or fill it")
    if tables is not None and table not in tables:
        raise DataError(
            f"{record.where}: there is no table '{table}' in the split's .tables.jsonl; take the upstream files"
        )
    try:
        query = check_query(record.values.get("sql"), num_columns=len(tables[table]) if tables else None)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None
    return table, question, write_query(query, tables[table] if tables else _numbers(query))


def _facts(table: str, tables: Tables | None, database: Path) -> tuple[tuple[str, str], ...]:
    """What reading a query takes and, where there is a database, executing it."""
    columns = tables[table] if tables else numbered_columns(MOST_COLUMNS)
    read = (("columns", json.dumps(columns)),)
    return (("database", str(database)), ("table", table), *read) if database.is_file() else read


def _numbers(query: Query) -> tuple[str, ...]:
    """Names for as many columns as a query needs."""
    return numbered_columns(1 + max([query["sel"], *(condition[0] for condition in query["conds"])]))


def _source(question: str, columns: tuple[str, ...] | None) -> str:
    """What the model is told; the columns come last, for a source that is too long is cut at its end."""
    if columns is None:
        return f"question: {question}"
    quoted = ", ".join('"' + name.replace('"', '""') + '"' for name in columns)
    return f"question: {question}\ncolumns: {quoted}"
