"""The Python door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftlab
import tiny_models
import whole_runs
from peftlab.errors import DataError, ModelError

WORDS = ("red", "green", "blue", "black", "white", "pink", "grey", "gold", "teal", "plum", "lime", "navy")


def test_rows_of_text(tmp_path: Path) -> None:
    model = whole_runs.save_byte_model(tmp_path / "model")
    rows = [{"prompt": f"say {word}:", "completion": word} for word in WORDS]
    run = peftlab.finetune(
        str(model), rows, method_settings={"rank": 2}, schedule="early->late", max_steps=12, batch_size=4,
        learning_rate=0.01, output_dir=tmp_path / "runs", settings={"evaluation": {"max_new_tokens": 3}},
    )  # fmt: skip
    assert set(run.scores["after"] or {}) == {"bleu", "rouge_l"}
    assert len(run.generate(["say red:", "say blue:"])) == 2
    assert run.generate("say red:", adapter=False) != []
    assert "bleu" in run._repr_html_()
    assert run.report.exists()


def test_rows_with_labels_train_a_classifier(tmp_path: Path) -> None:
    model = tiny_models.save_model(tmp_path / "model", "bert")
    rows = [{"text": f"{word} name", "label": "yes" if i % 2 else "no"} for i, word in enumerate(WORDS)]
    run = peftlab.finetune(str(model), rows, max_steps=12, batch_size=4, output_dir=tmp_path / "runs")
    assert set(run.scores["after"] or {}) == {"accuracy"}
    assert run.folder.summary()["phases"][0]["groups"] == ["attention", "mlp", "lm_head"]
    reopened, _ = peftlab.load(run.path)
    assert reopened.config.num_labels == 2
    assert set(run.generate(["red name", "blue name"])) <= {"yes", "no"}


def test_a_decoder_classifies_too(tmp_path: Path) -> None:
    model, tokenizer = tiny_models.build("llama"), tiny_models.tokenizer()
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": f"{word} name", "label": "yes" if i % 2 else "no"} for i, word in enumerate(WORDS)]
    run = peftlab.finetune(
        str(tmp_path / "model"), rows, max_steps=12, batch_size=4, output_dir=tmp_path / "runs"
    )
    assert set(run.scores["after"] or {}) == {"accuracy"}


def test_all_new_parts_of_a_classifier_are_trained_and_saved(tmp_path: Path) -> None:
    model = tiny_models.save_model(tmp_path / "model", "distilbert")
    rows = [{"text": f"{word} name", "label": "yes" if i % 2 else "no"} for i, word in enumerate(WORDS)]
    run = peftlab.finetune(str(model), rows, max_steps=12, batch_size=4, seed=7, output_dir=tmp_path / "runs")
    tensors = load_file(run.path / "final_model" / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in tensors if "lora" not in name} == {"pre_classifier", "classifier"}
    one, tokenizer = peftlab.load(run.path)
    two, _ = peftlab.load(run.path)
    ids = tokenizer("red name", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


def test_seq2seq_goes_the_same_way(tmp_path: Path) -> None:
    model = tiny_models.save_model(tmp_path / "model", "t5")
    rows = [{"prompt": f"say {word}:", "completion": word} for word in WORDS]
    run = peftlab.finetune(
        str(model), rows, schedule="both->mlp->attn", max_steps=9, batch_size=4, learning_rate=0.01,
        output_dir=tmp_path / "runs", settings={"evaluation": {"max_new_tokens": 3}, "training": {"warmup_steps": 0}},
    )  # fmt: skip
    assert [phase["proved"] for phase in run.folder.summary()["phases"]] == [True] * 3


def test_a_live_model_is_kept_so_that_the_run_can_be_repeated(tmp_path: Path) -> None:
    model, tokenizer = tiny_models.build("gpt2"), tiny_models.tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"prompt": f"say {word}:", "completion": word} for word in WORDS]
    run = peftlab.finetune(
        model, rows, tokenizer=tokenizer, max_steps=12, batch_size=2, output_dir=tmp_path / "runs",
        settings={"evaluation": {"enabled": False}},
    )  # fmt: skip
    assert run.scores["after"] is None
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    assert Path(run.folder.config["model"]["name"]).is_dir()


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="together with its tokenizer"):
        peftlab.finetune(tiny_models.build("gpt2"), "embedded", output_dir=tmp_path)
    with pytest.raises(DataError, match=r"line 1: 'completion' is missing"):
        peftlab.finetune("peftlab/tiny-base", [{"prompt": "x"}], output_dir=tmp_path)
