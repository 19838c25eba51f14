"""What an evaluation may be asked for: perplexity, labels by likelihood, classes with their probability; and their room."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import task_samples
import tiny_models
import whole_runs
from peftlab import likelihoods
from peftlab.batches import Collator, RowBuilder
from peftlab.cli import main
from peftlab.config import build_config
from peftlab.errors import ConfigError, EvaluationError, NotComputedError
from peftlab.evaluation import evaluate_saved, score_saved
from peftlab.evaluation_result import EvaluationResult
from peftlab.experiment_translation import experiment_of, run_config_of
from peftlab.generation import classify
from peftlab.likelihoods import class_probabilities, compare_answers, log_likelihoods
from peftlab.metrics import meteor
from peftlab.perplexity import perplexity
from peftlab.prompt_room import count_positions, prompt_room, row_room
from peftlab.resolve import resolve
from peftlab.seed_evaluation import ModelEvaluator
from peftlab.task import Example
from peftlab.tasks import e2e_nlg, multi_nli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("asked")
    whole_runs.write_e2e(place / "e2e_nlg")
    task_samples.write_multi_nli(place / "multi_nli")
    for name in ("llama", "bert", "t5"):
        whole_runs.save_byte_model(place / name, name)
    return place


def score(folder: Path, model: str, task: str, changes: dict[str, Any], **rest: Any) -> dict[str, Any]:
    given = {"task": task, "data_dir": folder / task, "directory": folder / "runs"}
    changes = {"task": {"max_length": 160}, **changes}
    return evaluate_saved(str(folder / model), changes=changes, **given | rest)


@pytest.mark.parametrize(("name", "kind"), [("llama", "CausalLM"), ("t5", "Seq2SeqLM")])
def test_perplexity_is_that_of_the_models_own_loss(name: str, kind: str, folder: Path) -> None:
    asked = {"evaluation": {"perplexity": True, "max_new_tokens": 2}}
    result = score(folder, name, "e2e_nlg", asked, batch_size=3)["after"]
    found = result["metrics"]["perplexity"]
    assert next(iter(result["metrics"])) == "bleu", "the headline stays the task's"
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder / name, dtype=torch.float64)
    head = "causal" if name == "llama" else "seq2seq"
    builder = RowBuilder(
        tiny_models.tokenizer(byte_level=True), prompt=e2e_nlg.PROMPT, head=head, max_length=160
    )
    rows, _ = builder.build(e2e_nlg.load(folder / "e2e_nlg", seed=42).test)
    numbers = log_likelihoods(
        model.eval(), rows, pad_id=builder.tokenizer.pad_token_id, head=head, batch_size=4
    )
    tokens = sum(label != -100 for row in rows for label in row.labels)
    assert found["value"] == pytest.approx(math.exp(-sum(numbers) / tokens), rel=1e-5)
    assert (found["count"], found["higher_is_better"]) == (6, False), "examples, not rows"
    assert found["signature"] == f"tokens:{tokens}|labelled tokens alone|micro"
    low, high = found["interval"]
    assert low <= found["value"] <= high


def test_perplexity_resamples_examples_and_counts_what_it_leaves_out(folder: Path) -> None:
    model = tiny_models.build("llama").double()
    rows = [
        Collator(0, "causal")(tiny_rows)
        for tiny_rows in ([tiny_row("a", 5)], [tiny_row("b", 7)], [tiny_row("c", 6)])
    ]
    whole = perplexity(model, rows, seed=1)
    grouped = perplexity(model, rows, seed=1, groups=[0, 1, 0], left_out=2)
    assert grouped.value == pytest.approx(whole.value, rel=1e-12)
    assert (whole.count, grouped.count) == (3, 2)
    assert grouped.signature == whole.signature + "|rows left out:2"
    with pytest.raises(EvaluationError, match=r"2 groups for 3 rows"):
        perplexity(model, rows, seed=1, groups=[0, 1])
    long = {"evaluation": {"perplexity": True, "max_new_tokens": 2}, "task": {"max_length": 75}}
    found = score(folder, "llama", "e2e_nlg", long)["after"]["metrics"]["perplexity"]
    assert "rows left out:" in found["signature"] or found["count"] == 6


def tiny_row(name: str, length: int) -> Any:
    from peftlab.batches import Row

    ids = [3 + (i * 7) % 40 for i in range(length)]
    return Row(name, ids, [-100, -100, *ids[2:]])


def test_an_encoder_has_no_perplexity(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"an encoder with a classification head gives one class"):
        score(folder, "bert", "multi_nli", {"evaluation": {"perplexity": True}})


def test_labels_by_likelihood(folder: Path, tmp_path: Path) -> None:
    asked = {"evaluation": {"answers": "likelihood"}}
    result = score(folder, "llama", "multi_nli", asked, output=tmp_path / "out", batch_size=2)["after"]
    assert result["decoding"] == {
        "kind": "the most likely label", "labels": list(multi_nli.LABELS), "batch_size": 2,
    }  # fmt: skip
    assert result["metrics"]["label_accuracy"]["signature"].endswith("no label:0")
    lines = (tmp_path / "out" / "predictions.after.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    tokenizer = tiny_models.tokenizer(byte_level=True)
    builder = RowBuilder(tokenizer, prompt=multi_nli.PROMPT, head="causal", max_length=160)
    examples = [Example(row["id"], row["source"], ("x",)) for row in rows]
    found = compare_answers(model, builder, examples, multi_nli.LABELS, batch_size=1)
    for row, numbers in zip(rows, found, strict=True):
        assert sum(numbers) == pytest.approx(1)
        assert row["prediction"] == multi_nli.LABELS[numbers.index(max(numbers))]
        assert row["probability"] == pytest.approx(max(numbers), rel=1e-4)
    shown = result["examples"]["worst"] + result["examples"]["random"]
    own = {row["id"]: row["probability"] for row in rows}
    assert all(entry["probability"] == own[entry["id"]] for entry in shown)


def test_a_killed_comparison_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"evaluation": {"answers": "likelihood"}}
    whole = score(folder, "t5", "multi_nli", asked, output=tmp_path / "whole", batch_size=4)
    real, counted = likelihoods.log_likelihoods, []

    def killed(model: Any, rows: Any, **options: Any) -> list[float]:
        counted.append(len(rows))
        if len(counted) == 2:
            raise KeyboardInterrupt
        return real(model, rows, **options)

    monkeypatch.setattr(likelihoods, "log_likelihoods", killed)
    with pytest.raises(KeyboardInterrupt):
        score(folder, "t5", "multi_nli", asked, output=tmp_path / "again", batch_size=4)
    again = score(folder, "t5", "multi_nli", asked, output=tmp_path / "again", batch_size=4)
    assert counted == [12, 12, 12, 9], "of eleven pairs the first four are not asked again"
    assert again["after"]["metrics"] == whole["after"]["metrics"]
    kept = [(tmp_path / name / "predictions.after.jsonl").read_text() for name in ("whole", "again")]
    assert kept[0] == kept[1]


def test_where_likelihood_has_no_place(folder: Path) -> None:
    for model, task, why in (("bert", "multi_nli", "it is a classifier"), ("llama", "e2e_nlg", "no labels")):
        with pytest.raises(ConfigError, match=why):
            score(folder, model, task, {"evaluation": {"answers": "likelihood"}})
    with pytest.raises(ConfigError, match=r"stop, decoding has no effect where labels are compared"):
        build_config({"evaluation": {"answers": "likelihood", "stop": ["x"], "decoding": "sample"}})


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [({"answers": "likelihood"}, "no labels to compare"), ({"perplexity": True, "enabled": False}, "is off")],
)
def test_a_run_is_told_before_it_starts(evaluation: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(build_config({"evaluation": evaluation, "output": {"directory": str(tmp_path)}}))


def test_classes_come_with_their_probability(folder: Path, tmp_path: Path) -> None:
    result = score(folder, "bert", "multi_nli", {"task": {"max_length": 60}}, output=tmp_path, batch_size=5)
    lines = (tmp_path / "predictions.after.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(1 / 3 <= row["probability"] <= 1 for row in rows)
    assert result["after"]["decoding"] == {"kind": "argmax of the class logits"}
    wrong = {row["id"]: row["probability"] for row in rows if row["prediction"] not in row["references"]}
    worst = result["after"]["examples"]["worst"]
    assert [entry["id"] for entry in worst] == sorted(wrong, key=lambda name: -wrong[name])[:3]
    model = tiny_models.build("bert")
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    found = class_probabilities(model, prompts, pad_id=0, batch_size=2)
    assert [str(row.index(max(row))) for row in found] == classify(model, prompts, pad_id=0, batch_size=1)
    logits = model(input_ids=torch.tensor([prompts[1]])).logits[0].softmax(-1)
    assert found[1] == pytest.approx(logits.tolist(), abs=1e-6)
    model.classifier.bias.data.fill_(math.nan)
    with pytest.raises(EvaluationError, match=r"logits are not finite"):
        class_probabilities(model, prompts, pad_id=0, batch_size=2)


def test_a_bare_encoder_with_few_positions(folder: Path, tmp_path: Path) -> None:
    bert = tiny_models.build("bert")
    tokenizer = tiny_models.tokenizer(byte_level=True)
    bert.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    bert.bert.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    found = evaluate_saved(
        str(tmp_path / "bare"), task="multi_nli", data_dir=folder / "multi_nli", num_samples=3
    )
    assert found["after"]["metrics"]["accuracy"]["count"] == 3, "64 positions, task.max_length 128"


def test_rows_longer_than_a_writers_positions_are_cut(folder: Path, tmp_path: Path) -> None:
    whole_runs.save_byte_model(tmp_path / "gpt2", "gpt2")
    asked = {"evaluation": {"perplexity": True, "max_new_tokens": 2}}
    found = score(tmp_path, "gpt2", "e2e_nlg", asked, data_dir=folder / "e2e_nlg", num_samples=2)
    assert found["after"]["metrics"]["perplexity"]["count"] == 2, "64 positions, rows of more than 80 tokens"


def test_room() -> None:
    bert, llama, t5 = (tiny_models.build(name) for name in ("bert", "llama", "t5"))
    assert (count_positions(bert), count_positions(t5)) == (64, None)
    assert (row_room(bert, 128), row_room(bert, 10), row_room(t5, 128)) == (64, 10, 128)
    asked = {"max_length": 128, "max_new_tokens": 20}
    assert prompt_room(llama, "causal", **asked) == 44
    assert prompt_room(bert, "classification", **asked) == 64
    assert prompt_room(t5, "causal", **asked) == 1 << 20
    with pytest.raises(
        ConfigError, match=r"max_new_tokens 64 leaves no room for a prompt in the model's 64 posi"
    ):
        prompt_room(llama, "causal", max_length=128, max_new_tokens=64)
    config = transformers.RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    roberta = transformers.RobertaForSequenceClassification(config).eval()
    assert count_positions(roberta) == 32
    roberta(input_ids=torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 33), 5))
    prompted = peft.get_peft_model(
        tiny_models.build("gpt2"), peft.PromptTuningConfig(num_virtual_tokens=7, task_type="CAUSAL_LM")
    )
    assert count_positions(prompted) == 57
    assert prompt_room(prompted, "causal", **asked) == 37


def test_by_command(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = [
        "evaluate",
        str(folder / "llama"),
        "--task",
        "multi_nli",
        "--data_dir",
        str(folder / "multi_nli"),
    ]
    more = [
        "--set",
        "evaluation.answers=likelihood",
        "--set",
        "evaluation.perplexity=true",
        "--num_samples",
        "4",
    ]
    assert main([*given, *more, "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "label_accuracy" in told
    assert "perplexity " in told
    assert "the model gave its answer a probability of " in told
    assert "drawn at random: " in told
    assert (tmp_path / "out" / "evaluation.html").is_file()


def test_what_was_not_computed_is_said_everywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def score_without_java(*_: Any, **__: Any) -> Any:
        raise NotComputedError("meteor needs Java; install with: apt-get install default-jre-headless")

    monkeypatch.setattr(e2e_nlg, "METRICS", ("bleu", "meteor"))
    monkeypatch.setattr(meteor, "score", score_without_java)
    given = {"data_dir": folder / "e2e_nlg", "max_new_tokens": 2}
    result = ModelEvaluator(None, str(folder / "llama"), device="cpu").evaluate("e2e_nlg", 3, **given)
    assert list(result.metrics) == ["bleu"]
    assert result.not_computed == {
        "meteor": "meteor needs Java; install with: apt-get install default-jre-headless"
    }
    with pytest.raises(
        EvaluationError, match=r"meteor was not computed: meteor needs Java; install with: apt-get"
    ):
        result["meteor"]
    again = EvaluationResult.load(result.save(tmp_path / "result.json"))
    assert again == result
    assert {entry["id"] for entry in again.examples["random"]} == {row["id"] for row in again.predictions}
    asked = ["evaluate", str(folder / "llama"), "--task", "e2e_nlg", "--data_dir", str(folder / "e2e_nlg")]
    asked += ["--set", "evaluation.max_new_tokens=2", "--output", str(tmp_path / "out")]
    assert main(asked) == 0
    assert "not computed: meteor needs Java; install with: apt-get" in capsys.readouterr().out
    assert "not computed: meteor needs Java" in (tmp_path / "out" / "evaluation.html").read_text()
    kept = json.loads((tmp_path / "out" / "e2e_nlg_evaluation.json").read_text())
    assert "meteor" not in kept["after"]["metrics"]
    assert "meteor" in kept["after"]["not_computed"]


def test_the_texts_are_at_hand(folder: Path) -> None:
    scored = score_saved(
        str(folder / "llama"), task="e2e_nlg", data_dir=folder / "e2e_nlg", num_samples=4,
        changes={"evaluation": {"max_new_tokens": 2}}, directory=folder,
    )  # fmt: skip
    ids = {row["id"] for row in scored.rows}
    chosen = scored.result["after"]["examples"]
    assert {entry["id"] for kind in ("best", "worst", "random") for entry in chosen[kind]} <= ids
    assert set(chosen["random"][0]) == {"id", "score"}, "texts stay in the answers' file"


@pytest.mark.parametrize(("batch_size", "told"), [(None, 0), (5, 5)])
def test_a_batch_size_that_nobody_names_is_the_evaluations_own_choice(
    batch_size: int | None, told: int
) -> None:
    config = build_config({"evaluation": {"batch_size": batch_size}, "task": {"name": "e2e_nlg"}})
    assert build_config({}).evaluation.batch_size is None
    experiment = experiment_of(config)
    assert experiment.evaluation.batch_size == told
    assert run_config_of(experiment).evaluation.batch_size == batch_size
    with pytest.raises(ConfigError, match=r"evaluation\.batch_size"):
        build_config({"evaluation": {"batch_size": 0}})
