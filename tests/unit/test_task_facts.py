"""What every task says of itself, the public counts, and rows that are wrong in any format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from peftlab import evaluation
from peftlab.catalog import METRICS, TASKS
from peftlab.code_rows import CodeSettings
from peftlab.data_files import count_note
from peftlab.errors import DataError
from peftlab.tasks import chat, code_summarization, csv, e2e_nlg, jsonl, multi_nli, rows, samsum, wikisql

PUBLISHED = ("e2e_nlg", "samsum", "wikisql", "multi_nli", "code_summarization", "code_generation")


@pytest.mark.parametrize("name", TASKS.names())
def test_a_task_shows_rows_and_names_metrics_that_there_are(name: str) -> None:
    leaf = TASKS.load(name)
    document = leaf.__doc__ or ""
    assert document.count("```") >= 2, "sample rows"
    assert len(set(leaf.METRICS)) == len(leaf.METRICS) >= 1
    for metric in leaf.METRICS:
        assert metric == METRICS.load(metric).NAME


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_data_set_has_source_licence_citation_and_checksums(name: str) -> None:
    document = " ".join((TASKS.load(name).__doc__ or "").split())
    assert "Source: " in document
    assert "Licence: " in document
    assert "cite" in document.lower()
    assert "arXiv:" in document
    assert "SHA-256" in document or "No checksum is published" in document


def test_examples_that_are_scored_where_nobody_says_how_many() -> None:
    own = {name: getattr(TASKS.load(name), "NUM_EVALUATED", None) for name in TASKS.names()}
    assert {name: count for name, count in own.items() if count is not None} == {"multi_nli": 1000}
    assert evaluation.NUM_EVALUATED == 100


def test_the_seeds_metrics_of_e2e_are_all_there() -> None:
    assert e2e_nlg.METRICS[0] == "bleu"
    assert {
        "bleu_1",
        "bleu_2",
        "bleu_3",
        "bleu_4",
        "rouge_1",
        "rouge_2",
        "rouge_l",
        "rouge_lsum",
        "meteor",
    } <= set(e2e_nlg.METRICS)
    assert {"bleu_e2e", "nist", "rouge_l_e2e", "cider"} <= set(e2e_nlg.METRICS)


def test_the_public_counts_are_the_published_ones() -> None:
    assert e2e_nlg.RELEASES["original"].num_rows["train"] == 42_061
    assert samsum.NUM_ROWS["train"] == 14_732
    assert wikisql.NUM_ROWS["train"] == 56_355
    assert multi_nli.NUM_ROWS["multinli_1.0_train"] == 392_702


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_e2e(folder: Path, count: int) -> None:
    release = e2e_nlg.RELEASES["original"]
    sizes = {**release.num_rows, "train": count}
    for split, file in release.files.items():
        write_lines(folder / file, ["mr,ref", *(f"name[{split}],t {n}" for n in range(sizes[split]))])


def write_samsum(folder: Path, count: int) -> None:
    for split, number in {**samsum.NUM_ROWS, "train": count}.items():
        made = [{"id": str(n), "dialogue": f"{split} {n}", "summary": "s"} for n in range(number)]
        write_lines(folder / f"{samsum.STEMS[split][0]}.json", [json.dumps(made)])


def write_wikisql(folder: Path, count: int) -> None:
    for split, number in {**wikisql.NUM_ROWS, "train": count}.items():
        row = '{{"phase":1,"table_id":"{0}","question":"{0} {1}","sql":{{"sel":0,"agg":0,"conds":[]}}}}'
        write_lines(folder / f"{wikisql.STEMS[split]}.jsonl", [row.format(split, n) for n in range(number)])


def write_multi_nli(folder: Path, count: int) -> None:
    row = '{{"gold_label":"neutral","sentence1":"{0}","sentence2":"{1}"}}'
    for stem, number in (
        ("multinli_1.0_train", count),
        ("multinli_1.0_dev_matched", multi_nli.NUM_ROWS["multinli_1.0_dev_matched"]),
    ):
        lines = [row.format(f"{stem} {n // 1000}", n) for n in range(number)]
        write_lines(folder / f"{stem}.jsonl", lines)


WRITERS = {
    "e2e_nlg": (e2e_nlg, write_e2e, 42_061),
    "samsum": (samsum, write_samsum, 14_732),
    "wikisql": (wikisql, write_wikisql, 56_355),
    "multi_nli": (multi_nli, write_multi_nli, 392_702),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_whole_set_is_not_told_and_one_row_less_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, write, published = WRITERS[name]
    if name in ("wikisql", "multi_nli"):  # so many lines take long: a hundredth of them stands for all
        key = "train" if name == "wikisql" else "multinli_1.0_train"
        assert task.NUM_ROWS[key] == published
        monkeypatch.setattr(task, "NUM_ROWS", {split: rows // 100 for split, rows in task.NUM_ROWS.items()})
        published //= 100
    write(tmp_path / "whole", published)
    told = [note for note in task.load(tmp_path / "whole", seed=1).notes if "published" in note]
    assert told == []
    write(tmp_path / "less", published - 1)
    told = [note for note in task.load(tmp_path / "less", seed=1).notes if "published" in note]
    assert told == count_note("train", published - 1, published, 0)


LATIN = "café".encode("latin-1")
WRONG: Mapping[str, tuple[ModuleType, str, bytes, str]] = {
    "csv, encoding": (
        csv,
        "train.csv",
        b"prompt,completion\na,b\nc," + LATIN,
        r"train\.csv, line 3: byte 0xe9 is not",
    ),
    "csv, fields": (
        csv,
        "train.csv",
        b"prompt,completion\na,b\nc\n",
        r"train\.csv, line 3: 1 fields, but the header",
    ),
    "csv, columns": (
        csv,
        "train.csv",
        b"question,completion\na,b\n",
        r"train\.csv, line 2: expected the columns",
    ),
    "csv, quotes": (csv, "train.csv", b'prompt,completion\na,"b\n', r"train\.csv, line 2: not valid CSV"),
    "csv, empty": (csv, "train.csv", b"prompt,completion\n", r"train\.csv: no rows; the file is empty"),
    "jsonl, columns": (jsonl, "train.jsonl", b'{"promt": "a", "completion": "b"}\n', r"did you mean"),
    "jsonl, label": (
        jsonl,
        "train.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b", "label": ["y"]}\n',
        r"train\.jsonl, line 2: 'label'",
    ),
    "chat, encoding": (
        chat,
        "a.jsonl",
        b'{"messages": "' + LATIN + b'"}\n',
        r"a\.jsonl, line 1: byte 0xe9 is not UTF-8",
    ),
    "chat, columns": (chat, "a.jsonl", b'{"turns": []}\n', r"a\.jsonl, line 1: expected 'messages'"),
    "chat, empty": (chat, "a.jsonl", b"\n", r"a\.jsonl: no rows; the file is empty"),
    "rows, encoding": (
        rows,
        "rows.jsonl",
        b'{"prompt": "' + LATIN + b'"}\n',
        r"rows\.jsonl, line 1: byte 0xe9 is not",
    ),
    "rows, value": (
        rows,
        "rows.jsonl",
        b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "completion": 3}\n',
        r"rows\.jsonl, line 3: 'completion' must be a string, got int",
    ),
    "rows, columns": (
        rows,
        "rows.jsonl",
        b'{"prompt": "a", "answer": "b"}\n',
        r"rows\.jsonl, line 1: unknown key 'answer'",
    ),
    "rows, object": (rows, "rows.jsonl", b"[1]\n", r"rows\.jsonl, line 1: expected an object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_one_error_with_file_line_and_what(case: str, tmp_path: Path) -> None:
    task, name, content, message = WRONG[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        task.load(tmp_path, seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_functions_that_are_not_utf8(suffix: str, tmp_path: Path) -> None:
    good = json.dumps({"code_tokens": ["a"], "docstring_tokens": ["b"]}).encode()
    wrong = good + b"\n" + b'{"code_tokens": ["' + LATIN + b'"]}\n'
    folder = tmp_path / "python"
    folder.mkdir()
    (folder / f"train{suffix}").write_bytes(gzip.compress(wrong) if suffix.endswith("gz") else wrong)
    (folder / "test.jsonl").write_bytes(good + b"\n")
    with pytest.raises(DataError, match=rf"train{suffix}, line 2: .*UTF-8".replace(".jsonl", r"\.jsonl")):
        code_summarization.load(tmp_path, seed=1, settings=CodeSettings())


def test_a_line_separator_inside_a_row_does_not_end_it(tmp_path: Path) -> None:
    made = [{"prompt": f"a\u2028{n}", "completion": "b"} for n in range(5)]
    lines = [json.dumps(row, ensure_ascii=False) for row in made]
    write_lines(tmp_path / "rows.jsonl", lines)
    assert any("\u2028" in example.source for example in rows.load(tmp_path, seed=1).train)
