"""SAMSum's files: what is read, what is told, what is refused; a whole run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import task_samples
import tiny_models
import whole_runs
from peftlab.batches import IGNORED, RowBuilder
from peftlab.config import build_config
from peftlab.errors import DataError
from peftlab.execute import execute
from peftlab.tasks import samsum


def write_json(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "val", "test"):
        rows = splits.get(name, task_samples.dialogues(name, 3))
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def row(dialogue: str, summary: str = "S.", number: str = "1") -> dict[str, str]:
    return {"id": number, "dialogue": dialogue, "summary": summary}


@pytest.mark.parametrize("form", ["json", "csv"])
def test_both_forms_give_the_same(form: str, tmp_path: Path) -> None:
    splits = samsum.load(task_samples.write_samsum(tmp_path, form=form), seed=1)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [24, 6, 6]
    first = splits.train[0]
    assert first.id == "train-0"
    assert first.source == "Ann: Where are you?\nDan: At the mill (train 0) 🙂\nAnn: I will come."
    assert first.references == ("Ann and Dan meet at the mill (train 0).",)
    assert splits.labels == ()
    assert [path.name for path in splits.files] == [f"{name}.{form}" for name in ("train", "val", "test")]
    assert splits.notes == (
        "train: 24 rows (the published set has 14,732)",
        "validation: 6 rows (the published set has 818)",
        "test: 6 rows (the published set has 819)",
    )


def test_the_published_counts_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samsum, "NUM_ROWS", {"train": 24, "validation": 6, "test": 6})
    assert samsum.load(task_samples.write_samsum(tmp_path), seed=1).notes == ()
    assert samsum.NUM_ROWS["train"] == 24


def test_equal_dialogues_are_one_example_with_all_summaries(tmp_path: Path) -> None:
    train = [row("A: x\r\nB: y"), row("A: q"), row("A: x\nB: y ", "Other."), row("A: q")]
    splits = samsum.load(write_json(tmp_path, train=train), seed=1)
    assert [(e.id, e.references) for e in splits.train] == [
        ("train-0", ("S.", "Other.")),
        ("train-1", ("S.", "S.")),
    ]
    assert "train: duplicate rows kept: 1" in splits.notes


def test_no_dialogue_stands_in_two_splits(tmp_path: Path) -> None:
    folder = write_json(
        tmp_path,
        train=[row("A: one"), row("A: two"), row("A: three")],
        val=[row("A: two"), row("A: four")],
        test=[row("A: three"), row("A: four"), row("A: five")],
    )
    splits = samsum.load(folder, seed=1)
    parts = (splits.train, splits.validation, splits.test)
    assert [[e.source for e in part] for part in parts] == [
        ["A: one"], ["A: two"], ["A: three", "A: four", "A: five"],
    ]  # fmt: skip
    assert splits.notes[-3:] == (
        "validation: dialogues dropped because they also stand in test: 1",
        "train: dialogues dropped because they also stand in test: 1",
        "train: dialogues dropped because they also stand in validation: 1",
    )


def test_rows_without_a_dialogue_are_left_out_and_counted(tmp_path: Path) -> None:
    train = [row(""), row("A: x"), row(" \r\n", "S."), row("A: y", " ")]
    splits = samsum.load(write_json(tmp_path, train=train), seed=1)
    assert [e.source for e in splits.train] == ["A: x"]
    assert "train: rows left out, without a dialogue or a summary: 3" in splits.notes
    assert "train: 4 rows (the published set has 14,732)" in splits.notes


def test_other_names_of_the_validation_file(tmp_path: Path) -> None:
    write_json(tmp_path)
    for name in ("validation", "dev"):
        (tmp_path / "val.json").rename(tmp_path / f"{name}.json")
        assert len(samsum.load(tmp_path, seed=1).validation) == 3
        (tmp_path / f"{name}.json").rename(tmp_path / "val.json")
    (tmp_path / "val.csv").write_text("id,dialogue,summary\n1,A,B\n")
    with pytest.raises(DataError, match=r"holds val.json and val.csv for validation"):
        samsum.load(tmp_path, seed=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", "[{]", r"train.json, line 1: not JSON"),
        ("train.json", '[\n{"id": 1,}]', r"train.json, line 2: not JSON"),
        ("train.json", "{}", r"expected a list of rows, got dict"),
        ("train.json", "[1]", r"train.json, row 1: expected an object"),
        ("train.json", "[]", r"no row with a dialogue and a summary"),
        ("train.json", '[{"dialogue": "x"}]', r"row 1: 'summary' is missing; found: dialogue"),
        ("train.json", '[{"dialogue": 3, "summary": "x"}]', r"row 1: 'dialogue' must be a text, got 3"),
        ("train.json", b'[{"dialogue":\n"caf\xe9"}]', r"line 2: byte 0xe9 is not UTF-8"),
        ("train.json", "[" * 100_000, r"not JSON"),
        ("test.csv", "", r"expected a header with one column 'id', got an empty file"),
        ("test.csv", "id,text,summary\n", r"line 1: expected a header with one column 'dialogue'"),
        ("test.csv", "id,dialogue,summary\n1,x\n", r"test.csv, line 2: 2 fields, but the header has 3"),
        ("test.csv", 'id,dialogue,summary\n1,"x', r"test.csv, line 2: not valid CSV"),
        ("test.csv", "id,dialogue,summary\n", r"no row with a dialogue and a summary"),
    ],
)
def test_a_malformed_file_is_named_with_its_place(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    write_json(tmp_path)
    (tmp_path / f"{name.partition('.')[0]}.json").unlink()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        samsum.load(tmp_path, seed=1)


def test_missing_files_are_told_with_those_that_are_there(tmp_path: Path) -> None:
    write_json(tmp_path)
    (tmp_path / "val.json").unlink()
    with pytest.raises(
        DataError, match=r"has no file for validation. Found: test.json, train.json. Expected"
    ):
        samsum.load(tmp_path, seed=1)
    with pytest.raises(DataError, match=r"is not a folder"):
        samsum.load(tmp_path / "nowhere", seed=1)
    with pytest.raises(DataError, match=r"give their folder with --data-dir"):
        samsum.load(None, seed=1)


def test_a_split_that_is_wholly_in_another(tmp_path: Path) -> None:
    rows = [row("A: one")]
    with pytest.raises(DataError, match=r"validation: all dialogues also stand in test"):
        samsum.load(write_json(tmp_path, val=rows, test=rows), seed=1)


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_a_whole_run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"rouge_1", "rouge_2", "rouge_l", "rouge_lsum", "bleu", "meteor"} == set(samsum.METRICS)
    monkeypatch.setattr(samsum, "METRICS", ("rouge_l", "bleu"))  # METEOR starts Java, which takes seconds
    folder = whole_runs.save_byte_model(tmp_path / "model", model)
    values = whole_runs.make_values(
        tmp_path,
        task={
            "name": "samsum",
            "data_dir": str(task_samples.write_samsum(tmp_path / "chats")),
            "max_length": 200,
        },
        training={"max_steps": 2, "validation_steps": 2, "warmup_steps": 0},
        evaluation={"num_samples": 2, "max_new_tokens": 3},
        schedule={"strategy": None},
    )
    values["model"]["name"] = str(folder)
    done = execute(build_config(values), show=lambda line: None)
    assert done.is_finished
    assert set(done.summary()["scores"]["after"]) == set(samsum.METRICS)
    assert done.preflight["rows"]["train"]["kept"] == 24
    assert "train: 24 rows (the published set has 14,732)" in done.preflight["notes"]


def test_a_long_dialogue_is_cut_and_its_summary_is_not() -> None:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    builder = RowBuilder(tokenizer, prompt=samsum.PROMPT, head="causal", max_length=80)
    example = samsum.Example("train-0", "Ann: hello\n" * 30, ("Ann says hello.",))
    ((built,), count) = builder.build([example])
    answer = [label for label in built.labels if label != IGNORED]
    assert tokenizer.decode(answer[:-1]).strip() == "Ann says hello."
    assert answer[-1] == tokenizer.eos_token_id
    assert (len(built.input_ids), count.truncated) == (80, 1)
    prompt = tokenizer.decode(built.input_ids[: -len(answer)], skip_special_tokens=True)
    assert prompt.endswith("\nsummary:")


def test_the_upstream_slice(shared_data: Path) -> None:
    splits = samsum.load(shared_data / "samsum", seed=1)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [1493, 299, 300]
    sources = [{e.source for e in part} for part in (splits.train, splits.validation, splits.test)]
    assert len(set.union(*sources)) == sum(map(len, sources))
    assert all("\r" not in e.source and e.references[0].strip() for e in splits.train)
    assert [note for note in splits.notes if "rows (the published set has" in note]
