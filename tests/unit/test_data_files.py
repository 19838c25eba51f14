"""Rows of files: what looks right and is not is told by file and line, never read in some way of its own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from peftlab.data_files import read_csv, read_json_lines
from peftlab.errors import ConfigError, DataError
from peftlab.own_files import OwnFileSettings
from peftlab.tasks import csv, jsonl, rows


def lines(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_packed_rows_are_read_as_others_are(tmp_path: Path, name: str) -> None:
    path = lines(tmp_path / name, '\ufeff{"a": 1}\r\n\n{"a": "\\ud83d\\ude00"}\n')
    found = [(record.where, record.values["a"]) for record in read_json_lines(path)]
    assert found == [(f"{path}, line 1", 1), (f"{path}, line 3", "\U0001f600")]
    for wrong, said in (
        ("[" * 100_000, "line 1: not JSON that can be read"),
        ('{"a": ' + "9" * 6000 + "}", "line 1: not JSON that can be read"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "line 1: the key 'c' stands twice"),
        ('{"a": "x\\ud800"}', "line 1: a text holds half of a character"),
    ):
        with pytest.raises(DataError, match=said):
            list(read_json_lines(lines(tmp_path / name, wrong)))


def test_packed_rows_that_are_damaged(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl.gz", '{"a": 1}\n' * 100)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"cannot be unpacked .*take the upstream file again"):
        list(read_json_lines(path))
    with pytest.raises(DataError, match=r"gone\.jsonl\.gz cannot be read \(No such file"):
        list(read_json_lines(tmp_path / "gone.jsonl.gz"))


def test_csv_that_is_read_in_two_ways(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the column 'completion' stands 2 times in the header"):
        list(read_csv(lines(tmp_path / "a.csv", "prompt,completion,Completion\na,b,c\n"), ()))
    with pytest.raises(
        DataError, match="separated by a semicolon: 'prompt;completion'; a CSV file has commas"
    ):
        list(read_csv(lines(tmp_path / "a.csv", "prompt;completion\na;b\n"), ()))
    long = "x" * 300_000
    (record,) = read_csv(lines(tmp_path / "a.csv", f"text,,\n{long},,\n"), ())
    assert record.values["text"] == long


def test_classes_that_are_written_as_numbers(tmp_path: Path) -> None:
    stars = "".join(json.dumps({"text": f"film {n}", "label": n % 12}) + "\n" for n in range(60))
    lines(tmp_path / "a.jsonl", stars)
    assert jsonl.load(tmp_path, seed=1).labels == tuple(map(str, range(12)))
    given = [{"text": f"film {n}", "label": str(n % 12)} for n in range(60)]
    assert rows.labels_of(given) == tuple(map(str, range(12)))
    lines(tmp_path / "a.jsonl", stars + '{"text": "x", "label": -1}\n')
    with pytest.raises(DataError, match=r"line 61: 'label' is -1, which is no class"):
        jsonl.load(tmp_path, seed=1)


def test_classes_that_look_alike(tmp_path: Path) -> None:
    names = ["pos", " pos", "neg", "Neg"]
    lines(tmp_path / "a.csv", "text, label\n" + "".join(f"film {n}, {names[n % 4]}\n" for n in range(40)))
    splits = csv.load(tmp_path, seed=1)
    assert splits.labels == ("Neg", "neg", "pos")
    assert "case or white space alone are different classes: 'Neg', 'neg'" in splits.notes[-1]


def test_settings_without_effect_on_the_files(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        pairs = [{"prompt": f"{name} {n}", "completion": "x"} for n in range(9)]
        lines(tmp_path / f"{name}.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    for settings, said in (
        ({"validation_fraction": 0.5}, "validation_fraction 0.5 has no effect: validation.jsonl is"),
        ({"test_fraction": 0.5}, "test_fraction 0.5 has no effect: what is scored stands in a file"),
        ({"label": "nowhere"}, "label 'nowhere' has no effect: the rows are read as prompt and completion"),
    ):
        with pytest.raises(ConfigError, match=said):
            jsonl.load(tmp_path, seed=1, settings=OwnFileSettings(**settings))
    (tmp_path / "validation.jsonl").unlink()
    half = jsonl.load(tmp_path, seed=1, settings=OwnFileSettings(validation_fraction=0.5))
    assert len(half.validation) == 4


def test_half_of_a_character_from_python() -> None:
    given = [{"prompt": f"p{n}", "completion": "x\ud800" if n == 3 else "x"} for n in range(9)]
    with pytest.raises(DataError, match="row 3: 'completion' holds half of a character"):
        rows.from_rows(given, seed=1)
