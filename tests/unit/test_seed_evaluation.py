"""S1's functions for data and scores: rows a transformers Trainer takes, one result type, the answers of a run."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

import peftlab
import task_samples
import tiny_models
import whole_runs
from peftlab.batches import IGNORED
from peftlab.config import build_config
from peftlab.errors import CheckpointError, ConfigError, DataError, EvaluationError, InputError
from peftlab.evaluation import Evaluator
from peftlab.execute import execute
from peftlab.experiment_config import DataConfig, DatasetType
from peftlab.seed_data import get_data_collator, load_and_preprocess_dataset
from peftlab.seed_evaluation import EvaluationResult, ModelEvaluator, evaluate_multi_nli
from peftlab.store import open_run
from peftlab.tasks import samsum

WRITERS: dict[str, Callable[..., Path]] = {
    "e2e_nlg": whole_runs.write_e2e,
    "samsum": task_samples.write_samsum,
    "wikisql": task_samples.write_wikisql,
    "multi_nli": task_samples.write_multi_nli,
}
FUNCTIONS = {
    "e2e_nlg": peftlab.evaluate_e2e,
    "samsum": peftlab.evaluate_samsum,
    "wikisql": peftlab.evaluate_wikisql,
    "multi_nli": peftlab.evaluate_multi_nli,
}


@pytest.fixture(autouse=True, scope="module")
def without_java() -> Iterator[None]:
    """METEOR starts Java, which takes seconds; it has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samsum, "METRICS", tuple(name for name in samsum.METRICS if name != "meteor"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of every task, and a tiny Llama and a tiny BERT beside them."""
    home = tmp_path_factory.mktemp("seed")
    for name, write in WRITERS.items():
        write(home / name)
    for model in ("llama", "bert"):
        whole_runs.save_byte_model(home / "models" / model, model)
    return home


@pytest.fixture(scope="module")
def run_path(folder: Path) -> Path:
    """A finished run on SAMSum."""
    values = whole_runs.make_values(
        folder,
        task={"name": "samsum", "data_dir": str(folder / "samsum"), "max_length": 200},
        training={"max_steps": 2, "validation_steps": 2, "warmup_steps": 0},
        evaluation={"num_samples": 3, "max_new_tokens": 4, "before": False},
        schedule={"strategy": None},
    )
    values["model"]["name"] = str(folder / "models" / "llama")
    return execute(build_config(values), show=lambda line: None).path


def test_signatures_are_the_documents() -> None:
    for name, function in FUNCTIONS.items():
        signature = inspect.signature(function).parameters
        assert list(signature)[:5] == [
            "model_path",
            "base_model_id",
            "num_samples",
            "batch_size",
            "output_path",
        ]
        assert signature["num_samples"].default == (1000 if name == "multi_nli" else 100)
        assert signature["batch_size"].default == 8


@pytest.mark.parametrize("name", WRITERS)
def test_rows_hold_prompt_and_answer(name: str, folder: Path) -> None:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    config = DataConfig(DatasetType(name), max_length=400, num_samples=5, data_dir=str(folder / name))
    rows = load_and_preprocess_dataset(config, tokenizer, splits=("train", "test"))
    assert len(rows["train"]) == 5
    again = load_and_preprocess_dataset(config, tokenizer, splits=("train",))
    assert rows["train"] == again["train"]
    for row in (*rows["train"], *rows["test"]):
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        answer = [label for label in row["labels"] if label != IGNORED]
        assert row["labels"] == [IGNORED] * (len(row["labels"]) - len(answer)) + answer
        assert row["input_ids"][-len(answer) :] == answer
        assert answer[-1] == tokenizer.eos_token_id
    assert rows["train"].row_count.kept == 5


def test_rows_for_each_head(folder: Path) -> None:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    config = DataConfig(DatasetType.MULTI_NLI, data_dir=str(folder / "multi_nli"))
    classes = load_and_preprocess_dataset(config, tokenizer, head="classification", splits=("test",))["test"]
    assert {row["labels"] for row in classes} == {0, 1, 2}
    batch = get_data_collator(tokenizer, head="classification")(classes[:3])
    assert batch["labels"].tolist() == [row["labels"] for row in classes[:3]]
    texts = load_and_preprocess_dataset(config, tokenizer, head="seq2seq", splits=("test",))["test"]
    assert {tokenizer.decode(row["labels"], skip_special_tokens=True).strip() for row in texts} == {
        "entailment", "neutral", "contradiction",
    }  # fmt: skip


def test_the_collator_pads_by_position(folder: Path) -> None:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    config = DataConfig(DatasetType.SAMSUM, max_length=300, data_dir=str(folder / "samsum"))
    rows = load_and_preprocess_dataset(config, tokenizer, splits=("train",))["train"][:3]
    batch = get_data_collator(tokenizer)(rows)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == row["input_ids"]
        assert batch["labels"][i, :length].tolist() == row["labels"]
        assert batch["attention_mask"][i].sum() == length
        assert set(batch["labels"][i, length:].tolist()) <= {IGNORED}
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"has no pad token and no end of text"):
        get_data_collator(tokenizer)


def test_a_transformers_trainer_takes_the_rows(folder: Path, tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "models" / "llama")
    config = DataConfig(DatasetType.WIKISQL, max_length=300, data_dir=str(folder / "wikisql"))
    rows = load_and_preprocess_dataset(config, tokenizer)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        save_strategy="no", learning_rate=1e-2, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows["train"], eval_dataset=rows["validation"],
        data_collator=get_data_collator(tokenizer),
    )  # fmt: skip
    assert trainer.train().global_step == 2
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_rows_that_cannot_be_made(folder: Path) -> None:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    config = DataConfig(DatasetType.SAMSUM, max_length=8, data_dir=str(folder / "samsum"))
    with pytest.raises(
        DataError, match=r"no train row is left \(prompt and answer do not fit 8 tokens: 24\)"
    ):
        load_and_preprocess_dataset(config, tokenizer)
    with pytest.raises(ConfigError, match=r"there is no split 'dev'"):
        load_and_preprocess_dataset(config, tokenizer, splits=("dev",))
    with pytest.raises(DataError, match=r"the task 'samsum' has no classes"):
        load_and_preprocess_dataset(config, tokenizer, head="classification")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_gives_the_one_result(name: str, folder: Path, tmp_path: Path) -> None:
    model = str(folder / "models" / "llama")
    options: dict[str, Any] = {"data_dir": folder / name, "device": "cpu", "max_new_tokens": 3}
    path = tmp_path / "made" / "result.json"
    result = FUNCTIONS[name](None, model, 2, 2, path, **options)
    assert type(result) is EvaluationResult
    assert (result.task, result.num_samples, result["num_samples"], len(result.predictions)) == (
        name,
        2,
        2,
        2,
    )
    for metric, score in result.metrics.items():
        if score.get("value") is not None:
            assert result[metric] == score["value"]
            assert score["count"] == 2
    assert EvaluationResult.load(path) == result
    assert json.loads(path.read_text(encoding="utf-8")) == result.to_dict()
    with pytest.raises(EvaluationError, match=r"no score 'nothing'; there is: .*num_samples"):
        result["nothing"]


def test_a_run_is_scored_as_it_scored_itself(run_path: Path, folder: Path) -> None:
    result = peftlab.evaluate_samsum(
        run_path, str(folder / "models" / "llama"), 3, device="cpu", max_new_tokens=4
    )
    lines = (run_path / "predictions.after.jsonl").read_text(encoding="utf-8").splitlines()
    own = {row["id"]: row["prediction"] for row in map(json.loads, lines)}
    assert {row["id"]: row["prediction"] for row in result.predictions} == own
    scores = json.loads((run_path / "samsum_evaluation.json").read_text(encoding="utf-8"))["after"]["metrics"]
    assert {name: score.get("value") for name, score in result.metrics.items()} == {
        name: score.get("value") for name, score in scores.items()
    }
    bundle = ModelEvaluator(run_path / "final_model", device="cpu").evaluate(
        "samsum", 3, data_dir=folder / "samsum", max_new_tokens=4
    )
    assert {row["id"]: row["prediction"] for row in bundle.predictions} == own


def test_the_prompt_is_that_of_training(
    run_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    keep = Evaluator.run

    def listen(self: Evaluator, model: Any, **options: Any) -> Any:
        asked.extend(self.tokenizer(f"dialogue:\n{e.source}\nsummary:")["input_ids"] for e in self.examples)
        return keep(self, model, **options)

    monkeypatch.setattr(Evaluator, "run", listen)
    peftlab.evaluate_samsum(run_path, num_samples=2, device="cpu", max_new_tokens=2)
    opened = open_run(str(run_path), directory=folder)
    config = DataConfig(DatasetType.SAMSUM, max_length=200, data_dir=str(folder / "samsum"))
    rows = load_and_preprocess_dataset(config, opened.tokenizer, splits=("test",))["test"]
    prompts = [
        [i for i, label in zip(r["input_ids"], r["labels"], strict=True) if label == IGNORED] for r in rows
    ]
    assert asked
    assert all(prompt in prompts for prompt in asked)


def test_another_base_than_the_runs_is_refused(run_path: Path, tmp_path: Path) -> None:
    other = whole_runs.save_byte_model(tmp_path / "other", "llama", seed=7)
    with pytest.raises(CheckpointError, match=r"was trained on a base with other weights"):
        peftlab.evaluate_samsum(run_path, str(other), 2, device="cpu")


def test_an_encoder_is_scored_by_its_class(folder: Path) -> None:
    result = evaluate_multi_nli(
        None,
        str(folder / "models" / "bert"),
        4,
        data_dir=folder / "multi_nli",
        device="cpu",
        torch_dtype="float64",
    )
    assert set(result.metrics) == {"accuracy"}
    assert {row["references"][0] for row in result.predictions} <= {"entailment", "neutral", "contradiction"}


def test_drawing_is_seeded_and_greedy_is_the_default(folder: Path) -> None:
    evaluator = ModelEvaluator(None, str(folder / "models" / "llama"), device="cpu")
    given = {"data_dir": folder / "wikisql", "max_new_tokens": 6}
    greedy = evaluator.evaluate(DatasetType.WIKISQL, 3, **given)
    drawn = [
        evaluator.evaluate("wikisql", 3, do_sample=True, temperature=2.0, top_p=0.9, seed=s, **given)
        for s in (1, 1)
    ]
    assert drawn[0].predictions == drawn[1].predictions
    assert greedy.decoding["kind"] == "greedy"
    assert drawn[0].decoding["kind"] == "sample"
    with pytest.raises(ConfigError, match=r"temperature"):
        evaluator.evaluate("wikisql", 3, temperature=0.5, **given)


def test_what_cannot_be_scored(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give model_path"):
        ModelEvaluator(None)
    evaluator = ModelEvaluator(None, str(folder / "models" / "llama"), device="cpu")
    with pytest.raises(ConfigError, match=r"unknown value 'samsun'.*samsum"):
        evaluator.evaluate("samsun")
    with pytest.raises(ConfigError, match=r"there is no split 'dev'"):
        evaluator.evaluate("samsum", split="dev", data_dir=folder / "samsum")
    with pytest.raises(DataError, match=r"the SAMSum task reads files"):
        evaluator.evaluate("samsum")
    with pytest.raises(InputError):
        ModelEvaluator(tmp_path / "nowhere").evaluate("samsum", data_dir=folder / "samsum")
    (tmp_path / "odd.json").write_text("{}")
    for name, message in (("odd.json", "holds no evaluation result"), ("none.json", "cannot be read")):
        with pytest.raises(InputError, match=message):
            EvaluationResult.load(tmp_path / name)
