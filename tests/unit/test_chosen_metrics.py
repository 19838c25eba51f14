"""Which metrics score, what they cannot read, and what a classifier's files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import whole_runs
from peftlab.catalog import TASKS
from peftlab.config import build_config
from peftlab.decoding import DecodingSettings
from peftlab.errors import ConfigError, EvaluationError, OutputError, UnknownNameError
from peftlab.evaluation import evaluate_saved
from peftlab.evaluation_result import EvaluationResult
from peftlab.evaluator import Evaluator
from peftlab.predictions import PredictionLog
from peftlab.scoring import _class_index, evaluate_file
from peftlab.seed_evaluation import evaluate_e2e
from peftlab.task import Example
from peftlab.tasks import multi_nli


def evaluator(task: str, references: list[str], **settings: Any) -> Evaluator:
    return Evaluator(
        TASKS.load(task),
        [Example(f"test-{i}", "s", (text,)) for i, text in enumerate(references)],
        None,
        head="causal",
        max_length=64,
        max_new_tokens=1,
        batch_size=1,
        seed=1,
        decoding=DecodingSettings(**settings),
    )


@pytest.mark.parametrize("task", ["jsonl", "csv", "chat", "rows"])
def test_a_language_that_one_metric_cannot_read(task: str) -> None:
    """One such row costs that metric; the others are computed."""
    texts = ["It is Paris in France", "北 京 在 中国", "It is Rome in Italy"]
    asked = evaluator(task, texts)
    scores = asked.score(texts)
    assert scores["bleu"].value == pytest.approx(100)
    assert set(scores) == {"bleu"}
    assert "of 1 of 3 examples no reference has any (the first is 'test-1')" in asked.not_computed["rouge_l"]


def test_references_that_are_no_code() -> None:
    asked = evaluator("code_generation", ["print 'a' ("] * 3)
    assert asked.score(["x"] * 3)
    assert "no code that can be read" in asked.not_computed["syntax_valid"]


def test_metrics_are_chosen() -> None:
    asked = evaluator("jsonl", ["Москва", "Нева"], metrics=("chrf", "exact_match"))
    scores = asked.score(["Москва", "Обь"])
    assert list(scores) == ["chrf", "exact_match"]
    assert scores["exact_match"].value == 0.5
    with pytest.raises(UnknownNameError, match=r"unknown metric 'blue' \(did you mean 'bleu'\?\)"):
        evaluator("jsonl", ["x"], metrics=("blue",))
    assert build_config({"evaluation": {"metrics": ["chrf"]}}).evaluation.metrics == ("chrf",)


def test_labels_that_a_sample_lacks_are_labels() -> None:
    example = Example("test-0", "s", ("neutral",), facts=multi_nli._FACTS)
    score = multi_nli_score(["entailment", "“Neutral”", "neutral\u200b", "maybe"], example)
    assert score.signature.endswith("labels:3|no label:1")
    assert score.rows is not None
    assert score.rows.tolist() == [0, 1, 1, 0]


def multi_nli_score(answers: list[str], example: Example) -> Any:
    from peftlab.metrics import label_accuracy

    return label_accuracy.score(answers, [example] * len(answers), seed=1)


@pytest.fixture(scope="module")
def stars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stars")
    whole_runs.save_byte_model(folder / "bert", "bert")
    (folder / "data").mkdir()
    rows = [{"text": f"film {n} {('good', 'bad')[n % 2]}", "label": 1 + n % 11} for n in range(110)]
    (folder / "data" / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_classifiers_file_holds_names_and_scores_the_same_again(stars: Path) -> None:
    output = stars / "out"
    changes = {"task": {"max_length": 32}, "evaluation": {"metrics": ["accuracy", "macro_f1"]}}
    asked: dict[str, Any] = {"task": "jsonl", "data_dir": stars / "data", "changes": changes}
    scored = evaluate_saved(str(stars / "bert"), num_samples="all", output=output, **asked)
    file = output / "predictions.after.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    names = {str(n) for n in range(1, 12)}
    assert {row["prediction"] for row in rows} <= names
    assert {row["references"][0] for row in rows} <= names
    again = evaluate_file(file, **asked)
    for metric in ("accuracy", "macro_f1"):
        assert again["after"]["metrics"][metric] == scored["after"]["metrics"][metric]
    right = [row | {"prediction": row["references"][0]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in right))
    assert evaluate_file(file, **asked)["after"]["metrics"]["accuracy"]["value"] == 1
    file.write_text("".join(json.dumps(row | {"prediction": "0"}) + "\n" for row in right))
    assert evaluate_file(file, **asked)["after"]["metrics"]["accuracy"]["value"] == 0, "0 is no class here"
    assert _class_index("0", ("1", "2")) == "no class: 0"
    assert [_class_index(text, ("1", "2")) for text in "12"] == ["0", "1"]
    assert [_class_index(text, ("no", "yes")) for text in ("yes", "1")] == ["1", "1"]


def test_a_log_that_is_opened_again_keeps_its_answers_and_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.partial"
    with PredictionLog(path, ["x"]) as log:
        log.add({"test-0": "a"})
    whole = path.read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt), PredictionLog(path, ["x"]):
            pass
    assert path.read_bytes() == whole, "a kill while it is opened loses nothing"
    with PredictionLog(path, ["x"]) as again:
        assert again.found == {"test-0": "a"}
        assert again.seconds > 0
        before = again.seconds
        again.add({"test-1": "b"})
    with PredictionLog(path, ["x"]) as last:
        assert last.seconds > before
    with PredictionLog(path, ["y"]) as other:
        assert (other.found, other.seconds) == ({}, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_samples": -2}, "num_samples must be a whole number of 0 or more, got -2"),
        ({"num_samples": "3"}, "num_samples must be a whole number of 0 or more, got '3'"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"seed": -1}, "seed must be a whole number of 0 or more, got -1"),
        ({"datadir": "x"}, r"unknown option 'datadir' \(did you mean 'data_dir'\?\)"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        evaluate_e2e("nowhere", **options)


def test_the_face_of_a_result(tmp_path: Path) -> None:
    result = EvaluationResult("multi_nli", "m", "b", "test", 3, {"label_accuracy": {"value": 0.5}}, {}, 0.0)
    assert result["accuracy"] == 0.5
    with pytest.raises(EvaluationError, match="no score 'bleu'"):
        result["bleu"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="give another output_path"):
        result.save(tmp_path / "file" / "r.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="holds no evaluation result"):
        EvaluationResult.load(tmp_path / "deep.json")
