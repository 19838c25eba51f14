"""Scoring models and files of outputs: choices, answers kept as they come, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_bundles
import whole_runs
from peftlab import evaluation, generation
from peftlab.cli import main
from peftlab.config import build_config
from peftlab.errors import ConfigError, DataError, InputError, UnknownNameError
from peftlab.evaluation import evaluate_saved
from peftlab.predictions import PredictionLog, read_predictions
from peftlab.scoring import evaluate_file
from peftlab.task import Example
from peftlab.tasks import e2e_nlg

SHORT = {"evaluation": {"max_new_tokens": 4}, "task": {"max_length": 96}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("evaluating")
    whole_runs.write_e2e(place / "data")
    whole_runs.save_byte_model(place / "model")
    return place


def score(folder: Path, **rest: Any) -> dict[str, Any]:
    given = {"task": "e2e_nlg", "data_dir": folder / "data", "changes": SHORT, "directory": folder / "runs"}
    return evaluate_saved(str(folder / "model"), **given | rest)


def score_file(folder: Path, file: Path, **rest: Any) -> dict[str, Any]:
    return evaluate_file(file, task="e2e_nlg", data_dir=folder / "data", **rest)


def test_splits_and_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = score(folder)
    assert (result["split"], result["num_examples"]) == ("test", 6)
    assert result["after"]["decoding"] == {"kind": "greedy", "max_new_tokens": 4, "batch_size": "auto"}
    validation = score(folder, split="validation", num_samples=2)
    assert (validation["split"], validation["num_examples"]) == ("validation", 2)
    monkeypatch.setattr(e2e_nlg, "NUM_EVALUATED", 5, raising=False)
    assert score(folder)["num_examples"] == 5, "the task's own count"
    assert score(folder, num_samples="all")["num_examples"] == 6
    with pytest.raises(UnknownNameError, match=r"unknown split 'tset' \(did you mean 'test'\?\)"):
        score(folder, split="tset")


def test_a_model_is_scored_on_as_many_as_the_seeds_did() -> None:
    assert evaluation.NUM_EVALUATED == 100


def test_decoding_is_changed_by_the_caller(folder: Path) -> None:
    changes = {"evaluation": {"max_new_tokens": 4, "decoding": "sample", "sampling_seed": 5}}
    made = score(folder, changes=changes)["after"]["decoding"]
    assert (made["kind"], made["seed"]) == ("sample", 5)
    with pytest.raises(ConfigError, match="num_beams has no effect on greedy decoding"):
        score(folder, changes={"evaluation": {"num_beams": 3}})


def test_a_killed_evaluation_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(folder, output=tmp_path / "whole", batch_size=2)
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == [
        "e2e_nlg_evaluation.json",
        "predictions.after.jsonl",
    ]
    real, asked = generation._answer_batch, []

    def killed(model: Any, tokenizer: Any, rows: list[list[int]], *rest: Any) -> None:
        asked.append(len(rows))
        if len(asked) == 3:
            raise KeyboardInterrupt
        real(model, tokenizer, rows, *rest)

    monkeypatch.setattr(generation, "_answer_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        score(folder, output=tmp_path / "again", batch_size=2)
    partial = tmp_path / "again" / "predictions.after.jsonl.partial"
    assert len([line for line in partial.read_text().splitlines() if '"id"' in line]) == 4
    with partial.open("a") as stream:
        stream.write('{"id": "torn')  # the kill fell into a line
    asked[:] = [0, 0, 0]
    again = score(folder, output=tmp_path / "again", batch_size=2)
    assert asked == [0, 0, 0, 2], "only the last two were asked"
    assert again["after"]["metrics"] == whole["after"]["metrics"]
    kept = [(tmp_path / name / "predictions.after.jsonl").read_text() for name in ("whole", "again")]
    assert kept[0] == kept[1]
    assert not partial.exists()


def test_answers_to_something_else_are_not_taken_over(tmp_path: Path) -> None:
    with PredictionLog(tmp_path / "log", ["one"]) as log:
        log.add({"a": "x"})
    with PredictionLog(tmp_path / "log", ["one"]) as log:
        assert log.found == {"a": "x"}
    with PredictionLog(tmp_path / "log", ["other"]) as log:
        assert log.found == {}


def test_a_file_of_outputs_scores_as_the_model_did(folder: Path, tmp_path: Path) -> None:
    made = score(folder, output=tmp_path, num_samples="all")["after"]["metrics"]
    assert score_file(folder, tmp_path / "predictions.after.jsonl")["after"]["metrics"] == made
    rows = [json.loads(line) for line in (tmp_path / "predictions.after.jsonl").read_text().splitlines()]
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text(
        "".join(json.dumps({"id": r["id"], "prediction": r["prediction"]}) + "\n" for r in rows[::-1])
    )
    result = score_file(folder, shuffled, output=tmp_path / "scores")
    assert result["after"]["metrics"] == made
    assert json.loads((tmp_path / "scores" / "e2e_nlg_evaluation.json").read_text()) == result
    right = tmp_path / "right.txt"
    examples = e2e_nlg.load(folder / "data", seed=42).test
    right.write_text("\n".join(e.references[0] for e in examples) + "\n")
    perfect = score_file(folder, right)["after"]
    assert perfect["metrics"]["bleu"]["value"] == pytest.approx(100)
    assert perfect["decoding"] == {"kind": "given"}


EXAMPLES = [Example("test-0", "a", ("A",)), Example("test-1", "b", ("B",))]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"one\n", "has 1 lines for 2 examples; write one answer on each line"),
        ("p.txt", b"one\ntwo\nthree\n", "has 3 lines for 2 examples"),
        ("p.txt", b"one\n\xff\n", "p.txt, line 2: byte 0xff is not UTF-8"),
        (
            "p.jsonl",
            b'{"id": "test-0", "prediction": "x"}\n',
            "1 answers for 2 examples; there is none for test-1",
        ),
        (
            "p.jsonl",
            b'{"id": "test-0", "prediction": "x"}\n' * 2,
            "line 2: example 'test-0' has an answer already",
        ),
        (
            "p.jsonl",
            b'{"id": "t", "prediction": "x"}\n',
            "line 1: there is no example 't' among the 2 that are scored",
        ),
        ("p.jsonl", b'{"id": "test-0"}\n', "line 1: expected a row with the texts 'id' and 'prediction'"),
        ("p.jsonl", b"{broken\n", "p.jsonl, line 1: not JSON"),
        ("p.jsonl", b"", "p.jsonl is empty, and 2 examples are to be answered"),
        ("p.txt", b"\xef\xbb\xbf", "p.txt is empty"),
        ("p.jsonl", b"\n\n", "0 answers for 2 examples; there is none for test-0, test-1"),
        ("p.jsonl", b'{"prediction": "x"}\n', "line 1: expected a row with the texts 'id' and 'prediction'"),
        ("p.jsonl", b'{"id": 1, "prediction": "x"}\n', "line 1: expected a row with the texts"),
        ("p.jsonl", b'["test-0"]\n', "line 1: expected a row with the texts"),
        ("p.jsonl", b"[" * 100_000, "line 1: cannot be read as JSON (RecursionError)"),
        ("p.jsonl", b"9" * 10_000, "line 1: cannot be read as JSON (ValueError)"),
        (
            "p.JSONL",
            b'{"id": "test-0", "prediction": "\\ud800"}\n',
            "line 1: the prediction holds half of a char",
        ),
        ("p.txt", "caf\u00e9\nx\n".encode("latin-1"), "p.txt, line 1: byte 0xe9 is not UTF-8"),
        ("p.txt", "x\ny\n".encode("utf-16"), "p.txt, line 1: byte 0xff is not UTF-8"),
    ],
)
def test_files_of_outputs_that_are_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_predictions(tmp_path / name, EXAMPLES)
    assert said in str(caught.value)


def test_answers_go_to_their_examples(tmp_path: Path) -> None:
    rows = [
        {"id": "test-1", "prediction": "second"},
        {"prediction": "first", "id": "test-0", "note": "kept out"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_predictions(tmp_path / "p.jsonl", EXAMPLES) == ["first", "second"]


def test_an_empty_line_is_an_empty_answer(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeff\r\nzwei\r\n".encode())
    assert read_predictions(tmp_path / "p.txt", EXAMPLES) == ["", "zwei"]


def test_labels_by_name(tmp_path: Path) -> None:
    rows = [{"text": f"film {n}", "label": ("no", "yes")[n % 2]} for n in range(20)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "p.txt"
    file.write_text("yes\n1\n")
    result = evaluate_file(file, task="jsonl", data_dir=data)
    assert list(result["after"]["metrics"]) == ["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a run, an adapter or a model to score, or a file of outputs with --predictions FILE"),
        (["--predictions", "gone.txt", "--task", "embedded"], "there is no file gone.txt (--predictions)"),
        (["last", "--num_samples", "few"], "--num_samples: 'few' is not a whole number"),
        (["last", "--num_samples", "0"], "--num_samples: 0 is too small; it must be at least 1"),
        (["last", "--num_samples", "-3"], "--num_samples: -3 is too small"),
        (
            ["last", "--split", "tset"],
            "unknown split 'tset' (did you mean 'test'?); there is: test, train, validation",
        ),
        (["nowhere"], "there is no run in runs/ yet"),
        (["last", "--task", "e2e"], "unknown task 'e2e'"),
        (["--predictions", ".", "--task", "embedded"], "there is no file . (--predictions)"),
        (["last", "--set", "training.seed=3"], "evaluate takes the keys of task and evaluation"),
        (["last", "--set", "evaluation.num_samples=3"], "not for evaluate; see --num_samples"),
        (["last", "--set", "evaluation.topp=0.9"], "did you mean 'evaluation.top_p'?"),
    ],
)
def test_command_lines_that_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_file_is_refused_by_command(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "p.txt"
    file.write_text("one\ntwo\n")
    given = ["evaluate", "--predictions", str(file), "--task", "e2e_nlg", "--data_dir", str(folder / "data")]
    assert main(given) == 2
    assert "has 2 lines for 6 examples" in capsys.readouterr().err
    assert main([*given, "--num_samples", "2"]) == 0
    told = capsys.readouterr().out
    assert "drawn at random: test-" in told
    assert main([*given, "--split", "tset"]) == 2
    assert main([*given, "--format", "peft"]) == 2
    assert "a file of outputs has none of; leave it out" in capsys.readouterr().err


def test_a_finished_run_whose_data_are_gone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "made-1234"
    config = build_config(
        {
            "model": {"name": str(folder / "model"), "device": "cpu"},
            "task": {"name": "e2e_nlg", "data_dir": str(tmp_path / "moved")},
        }
    )
    run.mkdir(parents=True)
    config.save(run / "config.yaml")
    tiny_bundles.make(tiny_bundles.CASES["lora"], folder / "model", run / "final_model")
    asked = ["evaluate", "last", "--output_dir", str(tmp_path / "runs")]
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "moved") in told
    assert "data-dir" in told or "data_dir" in told
    assert "Traceback" not in told


def test_decoding_has_no_effect_on_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("x\n")
    given = ["evaluate", "--predictions", "p.txt", "--task", "embedded", "--set", "evaluation.decoding=beam"]
    assert main(given) == 2
    assert "--set evaluation.decoding has no effect on a file of outputs" in capsys.readouterr().err
    assert main([*given[:5], "--batch_size", "3"]) == 2
    assert "--batch_size has no effect" in capsys.readouterr().err


def test_what_names_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"say which task the predictions are for: --task NAME"):
        evaluate_file(tmp_path / "p.txt")
