"""An adapter in peft's own folder is scored as it is, where its base is known and the task is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

import task_samples
import tiny_models
import whole_runs
from foreign_adapters import configure, other_save
from peftlab.cli import main
from peftlab.errors import InputError, ModelError
from peftlab.evaluation import Evaluator, evaluate_saved
from peftlab.importing.adapter import import_adapter
from peftlab.opening import find_reference
from peftlab.seed_evaluation import ModelEvaluator
from peftlab.tasks import e2e_nlg
from tiny_bundles import fill

KINDS = {"llama": transformers.AutoModelForCausalLM, "bert": transformers.AutoModelForSequenceClassification}


def save_adapter(home: Path, name: str) -> Path:
    """A LoRA that peft alone made and saved."""
    base = whole_runs.save_byte_model(home / name, name)
    model = KINDS[name].from_pretrained(base)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=64,
        target_modules=["q_proj", "v_proj"] if name == "llama" else ["query", "value"],
        task_type="CAUSAL_LM" if name == "llama" else "SEQ_CLS",
    )
    live = peft.get_peft_model(model, config)
    fill({n: p for n, p in live.named_parameters() if p.requires_grad})
    return other_save(live, home / f"{name}_adapter")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    whole_runs.write_e2e(folder / "e2e_nlg")
    task_samples.write_multi_nli(folder / "multi_nli")
    for name in KINDS:
        save_adapter(folder, name)
    return folder


def test_it_answers_as_peft_has_it(home: Path, tmp_path: Path) -> None:
    changes = {"task": {"max_length": 96}, "evaluation": {"max_new_tokens": 6}}
    asked: dict[str, Any] = {"task": "e2e_nlg", "data_dir": home / "e2e_nlg", "changes": changes}
    found = evaluate_saved(str(home / "llama_adapter"), output=tmp_path, num_samples="all", **asked)
    loaded = peft.PeftModel.from_pretrained(
        KINDS["llama"].from_pretrained(home / "llama"), str(home / "llama_adapter")
    ).eval()
    evaluator = Evaluator(
        e2e_nlg, e2e_nlg.load(home / "e2e_nlg", seed=42).test, tiny_models.tokenizer(byte_level=True),
        head="causal", max_length=96, max_new_tokens=6, batch_size=4, seed=42,
    )  # fmt: skip
    by_hand = evaluator.run(loaded)
    assert found["after"]["metrics"] == evaluator.describe(by_hand, "")["metrics"]
    kept = (tmp_path / "predictions.after.jsonl").read_text(encoding="utf-8")
    assert kept == evaluator.write_predictions(by_hand, tmp_path / "theirs.jsonl").read_text(encoding="utf-8")
    evaluate_saved(str(home / "llama"), output=tmp_path / "base", num_samples="all", **asked)
    assert kept != (tmp_path / "base" / "predictions.after.jsonl").read_text(encoding="utf-8")


def test_taken_over_it_scores_the_same(home: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "data_dir": home / "e2e_nlg",
        "changes": {"task": {"max_length": 96}, "evaluation": {"max_new_tokens": 6}},
    }
    bundle = import_adapter(
        home / "llama_adapter", base=str(home / "llama"), output=tmp_path, name="mine"
    ).path
    direct = evaluate_saved(str(home / "llama_adapter"), task="e2e_nlg", **asked)["after"]
    taken = evaluate_saved(str(bundle), task="e2e_nlg", **asked)["after"]
    assert taken["metrics"] == direct["metrics"]
    with pytest.raises(
        InputError, match=r"says that it is for 'mine', which is no task here; say what to score"
    ):
        evaluate_saved(str(bundle), **asked)


def test_a_classifier(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--task", "multi_nli", "--data_dir", str(home / "multi_nli"), "--set", "task.max_length=60"]
    assert main(["evaluate", str(home / "bert_adapter"), *asked]) == 0
    assert "accuracy" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"a classification model with 3 classes, and the task 'e2e_nlg' has no"
    ):
        evaluate_saved(str(home / "bert_adapter"), task="e2e_nlg", data_dir=home / "e2e_nlg")


def test_the_seed_systems_evaluator_takes_it_too(home: Path, tmp_path: Path) -> None:
    given = {"data_dir": home / "e2e_nlg", "max_new_tokens": 6}
    named = ModelEvaluator(home / "llama_adapter", device="cpu").evaluate("e2e_nlg", 3, **given)
    assert named.base_model_id == str(home / "llama")
    other = whole_runs.save_byte_model(tmp_path / "other", "llama", seed=7)
    moved = ModelEvaluator(home / "llama_adapter", str(other), device="cpu").evaluate("e2e_nlg", 3, **given)
    assert moved.base_model_id == str(other)
    assert moved.predictions != named.predictions


def test_what_is_not_known_is_asked_for(home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"does not say what it was trained on; say what .*--task NAME; or take it"
    ):
        evaluate_saved(str(home / "llama_adapter"))
    folder = save_adapter(tmp_path, "llama")
    configure(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"the base that .*_adapter names; put the adapter on another one"):
        evaluate_saved(str(folder), task="e2e_nlg", data_dir=home / "e2e_nlg")
    configure(folder, base_model_name_or_path=None)
    with pytest.raises(InputError, match=r"does not name its base; or take it over first: peftlab import"):
        evaluate_saved(str(folder), task="e2e_nlg")
    assert find_reference(str(folder), task="embedded", base="B").config.model.name == "B"
    (folder / "adapter_config.json").write_text("{broken")
    with pytest.raises(InputError, match=r"adapter_config.json cannot be read \(JSONDecodeError\)"):
        evaluate_saved(str(folder), task="embedded")
