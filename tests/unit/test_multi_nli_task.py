"""MultiNLI's files and others of its kind: what is read, divided, told and refused; as classes and as texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import task_samples
import whole_runs
from peftlab.config import ModelSettings, build_config
from peftlab.errors import DataError, EvaluationError
from peftlab.execute import execute
from peftlab.loading import find_model
from peftlab.metrics import label_accuracy
from peftlab.store import load, open_run
from peftlab.task import Example, Splits
from peftlab.tasks import multi_nli


def parts(splits: Splits) -> list[list[Example]]:
    return [list(splits.train), list(splits.validation), list(splits.test)]


def premises(part: list[Example]) -> set[str]:
    return {example.source.split("\npremise: ")[1] for example in part}


def write_tabs(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_have_a_class_and_a_text(tmp_path: Path) -> None:
    splits = multi_nli.load(task_samples.write_multi_nli(tmp_path), seed=1)
    assert splits.labels == ("entailment", "neutral", "contradiction")
    first = splits.test[0]
    assert first.source == "hypothesis: Ann sings.\npremise: Ann sings at the mill (matched 0)."
    assert (first.label, first.references) == (0, ("entailment",))
    for part in parts(splits):
        assert all(example.references == (splits.labels[example.label],) for example in part)  # type: ignore[index]
    assert [path.name for path in splits.files] == [
        "multinli_1.0_train.jsonl",
        "multinli_1.0_dev_matched.jsonl",
    ]


def test_what_is_told(tmp_path: Path) -> None:
    folder = task_samples.write_multi_nli(tmp_path)
    task_samples.write_lines(folder / "multinli_1.0_dev_mismatched.jsonl", task_samples.pairs("other", 3))
    assert multi_nli.load(folder, seed=1).notes == (
        "files that are not read: multinli_1.0_dev_mismatched.jsonl",
        "train: 55 rows (the published set has 392,702)",
        "train: rows left out, without a gold label: 5",
        "test: 11 rows (the published set has 9,815)",
        "test: rows left out, without a gold label: 1",
        "validation: 1 of 20 premises held out of train (no file for it)",
    )


def test_the_published_counts_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_nli, "NUM_ROWS", {"multinli_1.0_train": 55, "multinli_1.0_dev_matched": 11})
    notes = multi_nli.load(task_samples.write_multi_nli(tmp_path), seed=1).notes
    assert not [note for note in notes if "published" in note]


def test_what_is_held_out_depends_on_the_seed_and_keeps_premises_whole(tmp_path: Path) -> None:
    folder = task_samples.write_multi_nli(tmp_path, train=240)
    one, again, other = (multi_nli.load(folder, seed=seed) for seed in (1, 1, 2))
    assert parts(one) == parts(again)
    assert premises(list(one.validation)) != premises(list(other.validation))
    train, validation, test = (premises(part) for part in parts(one))
    assert len(validation) == 4
    assert len(train | validation | test) == len(train) + len(validation) + len(test)


def test_a_premise_of_test_leaves_train(tmp_path: Path) -> None:
    folder = task_samples.write_multi_nli(tmp_path)
    task_samples.write_lines(
        folder / "multinli_1.0_dev_matched.jsonl",
        task_samples.pairs("train", 3) + task_samples.pairs("matched", 3),
    )
    splits = multi_nli.load(folder, seed=1)
    train, validation, test = (premises(part) for part in parts(splits))
    assert not (train | validation) & test
    assert any("premises dropped because they also stand in test: 1" in note for note in splits.notes)


def test_files_with_a_validation_split(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        task_samples.write_lines(tmp_path / f"snli_1.0_{name}.jsonl", task_samples.pairs(name, 6))
    splits = multi_nli.load(tmp_path, seed=1)
    assert [len(part) for part in parts(splits)] == [6, 6, 6]
    assert splits.notes == ()


def test_tabs_with_and_without_a_header(tmp_path: Path) -> None:
    rows = [(row["gold_label"], row["sentence1"], row["sentence2"]) for row in task_samples.pairs("train", 6)]
    write_tabs(tmp_path / "train.tsv", [*rows, ("neutral", 'He said "no', "Quotes mean nothing.")])
    glue = [("index", "sentence1", "sentence2", "gold_label"), ("0", "A.", "B.", "contradiction")]
    (tmp_path / "dev_matched.tsv").write_text("".join("\t".join(row) + "\r\n" for row in glue))
    splits = multi_nli.load(tmp_path, seed=1)
    assert splits.test[0].source == "hypothesis: B.\npremise: A."
    assert splits.test[0].label == 2
    assert any('He said "no' in example.source for part in parts(splits)[:2] for example in part)


def chaos(premise: str, majority: str) -> dict[str, Any]:
    return {
        "uid": "1n", "majority_label": majority, "old_label": "n", "label_count": [70, 20, 10],
        "example": {"uid": "1n", "premise": premise, "hypothesis": "It rains.", "source": "mnli_agree_3"},
    }  # fmt: skip


def test_chaos_nli_has_the_label_of_most_annotators(tmp_path: Path) -> None:
    task_samples.write_lines(tmp_path / "train.jsonl", [chaos("One.", "e"), chaos("Two.", "n")])
    task_samples.write_lines(tmp_path / "test.jsonl", [chaos("Three.", "c")])
    splits = multi_nli.load(tmp_path, seed=1)
    assert {e.source.split(": ")[2]: e.label for part in parts(splits) for e in part} == {
        "One.": 0,
        "Two.": 1,
        "Three.": 2,
    }


def test_the_hubs_numbers(tmp_path: Path) -> None:
    rows = [{"gold_label": number, "sentence1": f"P{number}.", "sentence2": "H."} for number in (0, 1, 2, -1)]
    task_samples.write_lines(tmp_path / multi_nli.HUB_FILES["train"], rows)
    task_samples.write_lines(
        tmp_path / multi_nli.HUB_FILES["validation_matched"], task_samples.pairs("test", 3)
    )
    splits = multi_nli.load(tmp_path, seed=1)
    assert sorted(e.source[-3:-1] + str(e.label) for part in parts(splits)[:2] for e in part) == [
        "P00",
        "P11",
        "P22",
    ]
    assert "train: rows left out, without a gold label: 1" in splits.notes


def test_files_without_a_split_are_one_pool(tmp_path: Path) -> None:
    task_samples.write_lines(tmp_path / "a.jsonl", task_samples.pairs("a", 30))
    write_tabs(tmp_path / "b.tsv", [("neutral", f"P{n}.", "H.") for n in range(10)])
    splits = multi_nli.load(tmp_path, seed=3)
    train, validation, test = (premises(part) for part in parts(splits))
    assert (len(train), len(validation), len(test)) == (16, 2, 2)
    assert splits.notes[-1] == "no train and no test file: a.jsonl, b.tsv divided by premise, seed 3"
    assert parts(splits) == parts(multi_nli.load(tmp_path, seed=3))


def test_duplicates_and_contested_pairs_are_counted(tmp_path: Path) -> None:
    rows = [
        ("neutral", "P.", "H."),
        ("neutral", "P. ", " H."),
        ("entailment", "P.", "H."),
        ("neutral", "Q.", "H."),
    ]
    write_tabs(tmp_path / "train.tsv", rows)
    write_tabs(tmp_path / "test.tsv", [("neutral", "R.", "H.")])
    notes = multi_nli.load(tmp_path, seed=1).notes
    assert {"train: duplicate rows kept: 1", "train: pairs with more than one label: 1"} <= set(notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"gold_label": "maybe", "sentence1": "a", "sentence2": "b"}',
            r"line 2: unknown label 'maybe'; expected entail",
        ),
        (
            '{"gold_label": 3, "sentence1": "a", "sentence2": "b"}',
            r"line 2: 'gold_label' must be a text, got 3",
        ),
        ('{"gold_label": "neutral", "sentence1": "a"}', r"line 2: 'sentence2' is missing"),
        ('{"gold_label": "neutral", "sentence1": " ", "sentence2": "b"}', r"line 2: the premise is empty"),
        ('{"gold_label": "neutral", "sentence1": "a", "sentence2": ""}', r"line 2: the hypothesis is empty"),
        (
            '{"majority_label": "x", "example": {"premise": "a", "hypothesis": "b"}}',
            r"line 2: unknown label 'x'",
        ),
        (
            '{"majority_label": "e", "example": {"premise": "a"}}',
            r"line 2: 'hypothesis' is missing; found: premise",
        ),
        ('{"gold_label": ', r"line 2: not JSON"),
        ("3", r"line 2: expected an object"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(content: str, message: str, tmp_path: Path) -> None:
    folder = task_samples.write_multi_nli(tmp_path)
    good = json.dumps(task_samples.pairs("train", 1)[0])
    (folder / "multinli_1.0_train.jsonl").write_text(f"{good}\n{content}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"multinli_1.0_train.jsonl, {message}"):
        multi_nli.load(folder, seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"neutral\ta\n", r"train.tsv, line 1: 2 fields, expected 3: gold_label, sentence1, sentence2"),
        (b"neutral\ta\tb\nunsure\ta\tb\n", r"train.tsv, line 2: unknown label 'unsure'"),
        (b"neutral\ta\tb\nneutral\tcaf\xe9\tb\n", r"train.tsv, line 2: byte 0xe9 is not UTF-8"),
        (b"-\ta\tb\n", r"train.tsv: no row with a gold label"),
        (b"", r"train.tsv: no row with a gold label"),
    ],
)
def test_malformed_tabs(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(content)
    write_tabs(tmp_path / "test.tsv", [("neutral", "R.", "H.")])
    with pytest.raises(DataError, match=message):
        multi_nli.load(tmp_path, seed=1)


def test_folders_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"give their folder with --data-dir"):
        multi_nli.load(None, seed=1)
    with pytest.raises(DataError, match=r"is not a folder"):
        multi_nli.load(tmp_path / "nowhere", seed=1)
    with pytest.raises(DataError, match=r"holds no .jsonl and no .tsv file"):
        multi_nli.load(tmp_path, seed=1)
    write_tabs(tmp_path / "a.tsv", [("neutral", "R.", "H."), ("neutral", "S.", "H.")])
    with pytest.raises(DataError, match=r"2 different premises cannot be divided into three parts"):
        multi_nli.load(tmp_path, seed=1)
    write_tabs(tmp_path / "train.tsv", [("neutral", "R.", "H.")])
    with pytest.raises(DataError, match=r"has train.tsv, but no file for test"):
        multi_nli.load(tmp_path, seed=1)
    write_tabs(tmp_path / "train.jsonl", [])
    with pytest.raises(DataError, match=r"holds train.jsonl and train.tsv for train"):
        multi_nli.load(tmp_path, seed=1)


@pytest.mark.parametrize(
    ("model", "head"), [("bert", "classification"), ("distilbert", "classification"), ("llama", "causal"),
                        ("gpt2", "causal"), ("t5", "seq2seq"), ("bart", "seq2seq")],
)  # fmt: skip
def test_the_model_decides_between_classes_and_texts(model: str, head: str, tmp_path: Path) -> None:
    settings = ModelSettings(name=str(whole_runs.save_byte_model(tmp_path / model, model)))
    splits = multi_nli.load(task_samples.write_multi_nli(tmp_path / "pairs"), seed=1)
    assert splits.as_texts
    source = find_model(settings, num_labels=3, as_texts=True)
    assert source.head == head
    fitted = splits.for_head(source.head)
    if head == "classification":
        assert fitted.labels == splits.labels
        assert not any(example.references for part in parts(fitted) for example in part)
    else:
        assert fitted.labels == ()
        assert parts(fitted) == parts(splits)
    if head != "seq2seq":  # asked for without texts, every model becomes a classifier
        assert find_model(settings, num_labels=3).head == "classification"


def test_answers_that_are_no_label_are_counted_apart() -> None:
    examples = [Example(f"test-{i}", "s", (label,)) for i, label in enumerate(multi_nli.LABELS)]
    found = label_accuracy.score(["Entailment.", " neutral\nhypothesis:", "maybe"], examples, seed=1)
    assert found.value == pytest.approx(2 / 3)
    assert found.signature.endswith("labels:3|no label:1")
    swapped = label_accuracy.score(["neutral", "contradiction", ""], examples, seed=1)
    assert swapped.value == 0
    assert swapped.signature.endswith("no label:1")
    with pytest.raises(EvaluationError):
        label_accuracy.score(["neutral"], examples, seed=1)


@pytest.mark.parametrize(("model", "metric"), [("bert", "accuracy"), ("llama", multi_nli.METRICS[0])])
def test_a_whole_run(model: str, metric: str, tmp_path: Path) -> None:
    values = whole_runs.make_values(
        tmp_path,
        task={
            "name": "multi_nli",
            "data_dir": str(task_samples.write_multi_nli(tmp_path / "pairs")),
            "max_length": 60 if model == "bert" else 160,
        },
        training={"max_steps": 2, "validation_steps": 2, "warmup_steps": 0},
        evaluation={"num_samples": 2, "max_new_tokens": 3},
        schedule={"strategy": None},
    )
    values["model"]["name"] = str(whole_runs.save_byte_model(tmp_path / model, model))
    done = execute(build_config(values), show=lambda line: None)
    assert metric in done.summary()["scores"]["after"]
    opened = open_run(str(done.path), directory=tmp_path)
    assert opened.labels == (multi_nli.LABELS if model == "bert" else ())
    loaded, _ = load(done.path)
    assert type(loaded.get_base_model()).__name__.endswith(
        "Classification" if model == "bert" else "CausalLM"
    )


def test_the_upstream_slices(shared_data: Path) -> None:
    splits = multi_nli.load(shared_data / "multi_nli" / "textfooler", seed=1)
    assert sum(map(len, parts(splits))) == 2000
    train, validation, test = (premises(part) for part in parts(splits))
    assert len(train | validation | test) == len(train) + len(validation) + len(test)
    contested = multi_nli.load(shared_data / "multi_nli", seed=1)
    assert sum(map(len, parts(contested))) == 4000
    assert any("pairs with more than one label" in note for note in contested.notes)
