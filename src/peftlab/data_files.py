"""Rows of the files in which data sets are published: JSON lines, JSON, CSV and tab-separated.

Every row knows where it stands, so that what is wrong with it can be told by file and line. Texts are UTF-8, with or
without a byte order mark; any other byte is refused, with its line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import DataError
from peftlab.task import Example

_LONGEST_FIELD = 2**31 - 1
_SEPARATORS = {";": "a semicolon", "\t": "a tab", "|": "'|'"}


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file.

    Attributes:
        where: File and line (in a JSON list: the row's number, from 1), as messages name it.
        values: The row: column or key to value.
    """

    where: str
    values: Mapping[str, Any]

    def text(self, key: str) -> str:
        """A text of the row.

        Args:
            key: Its column or key.

        Returns:
            The text as it stands, possibly empty.

        Raises:
            DataError: The row has no such key, or something else than a text stands there.
        """
        if key not in self.values:
            found = ", ".join(map(str, self.values)) or "nothing"
            raise DataError(f"{self.where}: '{key}' is missing; found: {found}")
        value = self.values[key]
        if not isinstance(value, str):
            raise DataError(f"{self.where}: '{key}' must be a text, got {value!r}")
        return value


def read_text(path: Path) -> str:
    """The text of a file, without its byte order mark.

    Args:
        path: The file.

    Returns:
        The text, line ends as they are.

    Raises:
        DataError: It cannot be read or is not UTF-8; names file and line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, raw.count(b"\n", 0, error.start) + 1, error) from error


def read_json_lines(path: Path) -> Iterator[Record]:
    """The rows of a file with one JSON object on each line; empty lines are passed over.

    Args:
        path: The file; it is read line by line, whatever its size, and unpacked where its name ends in .gz.

    Yields:
        The rows.

    Raises:
        DataError: The file cannot be read, or a line is not UTF-8 or no JSON object, holds a key twice or half of a
            character.
    """
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield Record(where, _object(_json(line, where), where))


def read_json_list(path: Path) -> Iterator[Record]:
    """The rows of a file that holds one JSON list of objects.

    Args:
        path: The file.

    Yields:
        The rows.

    Raises:
        DataError: The file cannot be read or is not UTF-8, not JSON, no list, or a row is no object.
    """
    rows = _json(read_text(path), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, got {type(rows).__name__}; take the upstream file")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield Record(where, _object(row, where))


def read_csv(path: Path, columns: Collection[str]) -> Iterator[Record]:
    """The rows of a CSV file with a header; empty lines are passed over.

    Args:
        path: The file.
        columns: Columns that it must have; compared in lower case.

    Yields:
        The rows, keys in lower case; the line is that on which a row begins.

    Raises:
        DataError: The file cannot be read, is not UTF-8 or not CSV, lacks a column or has one twice, or a row has other
            fields than the header.
    """
    records = read_csv_fields(path)
    line, header = next(records, (1, []))
    names = [name.strip().lower() for name in header]
    for needed in columns:
        if names.count(needed) != 1:
            raise DataError(
                f"{path}, line {line}: expected a header with one column '{needed}', got {header or 'an empty file'}"
            )
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise DataError(
            f"{path}, line {line}: the column '{twice[0]}' stands {names.count(twice[0])} times in the header; keep one"
        )
    if len(names) == 1 and (marks := [told for mark, told in _SEPARATORS.items() if mark in names[0]]):
        raise DataError(
            f"{path}, line {line}: the fields seem to be separated by {marks[0]}: {header[0][:80]!r}; a CSV file has commas,"
            " so save it anew with these"
        )
    for line, fields in records:
        if len(fields) != len(names):
            raise DataError(f"{path}, line {line}: {len(fields)} fields, but the header has {len(names)}")
        yield Record(f"{path}, line {line}", dict(zip(names, fields, strict=True)))


def read_csv_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file as they stand; empty lines are passed over.

    Args:
        path: The file.

    Yields:
        The line on which a row begins, and its fields.

    Raises:
        DataError: The file cannot be read, is not UTF-8 or not CSV.
    """
    csv.field_size_limit(_LONGEST_FIELD)  # Python's own limit, 128 KiB, is less than a long document
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: not valid CSV ({error}); expected quoted fields"
            ) from error
        if fields:
            yield start, fields


def read_tabs(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """The rows of a tab-separated file, in which quotes mean nothing; empty lines are passed over.

    Args:
        path: The file.
        columns: Its columns, where it has no header. A first line that holds all of them is a header.

    Yields:
        The rows.

    Raises:
        DataError: The file cannot be read or is not UTF-8, or a row has other fields than there are columns.
    """
    names = list(columns)
    for number, line in _lines(path):
        fields = line.rstrip("\r\n").split("\t")
        if number == 1 and set(columns) <= set(fields):
            names = fields
        elif line.strip():
            where = f"{path}, line {number}"
            if len(fields) != len(names):
                raise DataError(f"{where}: {len(fields)} fields, expected {len(names)}: {', '.join(names)}")
            yield Record(where, dict(zip(names, fields, strict=True)))


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their indices.

    Args:
        labels: The names, each once.

    Returns:
        Sorted; as numbers where all of them are written in digits.

    Example:
        >>> sort_labels({"10", "9", "1"}), sort_labels({"b", "a10", "a9"})
        (('1', '9', '10'), ('a10', 'a9', 'b'))
    """
    names = sorted(labels)
    return tuple(sorted(names, key=int) if all(n.isascii() and n.isdecimal() for n in names) else names)


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: half of a character (a lone surrogate) cannot, and no model reads it.

    Args:
        text: The text.
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def count_note(split: str, num_rows: int, published: int | None, num_duplicates: int) -> list[str]:
    """What a person should know of a split's row counts.

    Args:
        split: Its name.
        num_rows: Rows read.
        published: Rows of the published set; None where there is none to compare with.
        num_duplicates: Rows that stand there a second time.

    Returns:
        Notes for `Splits.notes`.

    Example:
        >>> count_note("train", 4000, 42061, 3)
        ['train: 4,000 rows (the published set has 42,061)', 'train: duplicate rows kept: 3']
    """
    notes = []
    if published is not None and num_rows != published:
        notes.append(f"{split}: {num_rows:,} rows (the published set has {published:,})")
    if num_duplicates:
        notes.append(f"{split}: duplicate rows kept: {num_duplicates:,}")
    return notes


def keep_apart(
    keyed: Mapping[str, Sequence[tuple[str, Example]]], *, what: str
) -> tuple[dict[str, tuple[Example, ...]], list[str]]:
    """Splits that share nothing: what also stands in test leaves the others, then train leaves validation's.

    Args:
        keyed: For each of train, validation and test, examples with what must not be shared (a dialogue, a table).
        what: The name of that, in the plural, for the notes.

    Returns:
        The examples of each split in their order, and the notes.

    Raises:
        DataError: A split is empty, or nothing is left of it.

    Example:
        >>> one, two = ("table-1", Example("a", "x", ("y",))), ("table-2", Example("b", "z", ("y",)))
        >>> keep_apart({"train": [one, two], "validation": [two], "test": [two]}, what="tables")
        Traceback (most recent call last):
        ...
        peftlab.errors.DataError: validation: all tables also stand in test; check that the files differ
    """
    left = {split: list(examples) for split, examples in keyed.items()}
    notes = []
    for split, examples in left.items():
        if not examples:
            raise DataError(f"{split}: the split is empty; take the upstream files")
    for split, other in (("validation", "test"), ("train", "test"), ("train", "validation")):
        taken = {key for key, _ in left[other]}
        shared = {key for key, _ in left[split] if key in taken}
        rest = [(key, example) for key, example in left[split] if key not in taken]
        if not rest:
            raise DataError(f"{split}: all {what} also stand in {other}; check that the files differ")
        if shared:
            num_lost = len(left[split]) - len(rest)
            lost = f"{len(shared):,}" + (f" ({num_lost:,} examples)" if num_lost != len(shared) else "")
            notes.append(f"{split}: {what} dropped because they also stand in {other}: {lost}")
        left[split] = rest
    return {split: tuple(example for _, example in examples) for split, examples in left.items()}, notes


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their ends, from 1."""
    is_packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if is_packed else path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, number, error) from error
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        if is_packed and not isinstance(error, FileNotFoundError | PermissionError):
            raise DataError(f"{path} cannot be unpacked ({error}); take the upstream file again") from None
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); check its permissions"
    )


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; take the upstream file or convert it"
    )


def _json(text: str, where: str) -> Any:
    """A JSON value."""
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where))
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except DataError:
        raise
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: a text holds half of a character (a lone surrogate), which no model can read; write the file anew"
            " as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        place = where if ", line " in where else f"{where}, line {error.lineno}"
        raise DataError(f"{place}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets without end
        raise DataError(f"{where}: not JSON that can be read ({error})") from None


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """An object of JSON; of a key that stands twice nobody knows which one is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{where}: the key '{twice}' stands twice in one object; keep one of them")
    return found


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with keys and values, got {type(value).__name__}")
    return value
