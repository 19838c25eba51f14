"""One whole run, and everything it leaves behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import peftlab
import whole_runs
from peftlab.checkpoint import load_adapter
from peftlab.config import build_config
from peftlab.errors import CheckpointError
from peftlab.evaluation import evaluate_saved
from peftlab.execute import execute, plan
from peftlab.files import read_yaml, verify_folder
from peftlab.generation import answer
from peftlab.run import RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("run")
    config = build_config(
        whole_runs.make_values(folder, training={"trackers": ["tensorboard"], "keep_checkpoints": 9})
    )
    return execute(config, show=lambda line: None)


def test_all_files_are_there_and_done_is_last(finished: RunFolder) -> None:
    expected = {
        "config.yaml", "environment.json", "events.jsonl", "preflight.json", "final_model", "checkpoints", "plots",
        "gradient_analysis.group_norms.csv", "gradient_analysis.layer_norms.csv", "gradient_analysis.summary.json",
        "e2e_nlg_evaluation.json", "predictions.before.jsonl", "predictions.after.jsonl", "results_summary.json",
        "report.html", "DONE",
    }  # fmt: skip
    there = {p.name for p in finished.path.iterdir()}
    assert expected <= there
    done = (finished.path / "DONE").stat().st_mtime_ns
    assert all(p.stat().st_mtime_ns <= done for p in finished.path.rglob("*") if p.is_file())
    assert {p.stem for p in (finished.path / "plots").glob("*.png")} >= {
        "gradient_norms", "layer_heatmap", "layer_comparison", "gradient_evolution", "training_loss",
    }  # fmt: skip


def test_no_file_is_a_pickle(finished: RunFolder) -> None:
    assert not [p for p in finished.path.rglob("*") if p.suffix in {".pt", ".pth", ".bin", ".pkl"}]


def test_every_phase_is_proved_and_counted(finished: RunFolder) -> None:
    summary = finished.summary()
    assert [phase["proved"] for phase in summary["phases"]] == [True] * 3
    started = [event for event in finished.events() if event["event"] == "phase_started"]
    for event, phase in zip(started, finished.preflight["phases"], strict=True):
        assert event["trainable_tensors"] == phase["trainable_tensors"]
        assert event["trainable_parameters"] == phase["trainable_parameters"]
    assert summary["base_unchanged"] is True


def test_frozen_tensors_stand_still_between_checkpoints(finished: RunFolder) -> None:
    early, late = (load_adapter(finished.checkpoints / f"checkpoint-{step}") for step in (6, 9))
    # steps 4 to 8 are the mlp phase, 9 to 12 attention: between 6 and 9 both move; between 9 and 12 only attention
    last = load_adapter(finished.checkpoints / "checkpoint-12")
    assert all(torch.equal(late[n], last[n]) for n in last if ".mlp." in n)
    assert not any(torch.equal(late[n], last[n]) for n in last if ".self_attn." in n)
    assert not any(torch.equal(early[n], last[n]) for n in last)


def test_gradient_rows_are_aligned_with_blanks_for_frozen_groups(finished: RunFolder) -> None:
    with (finished.path / "gradient_analysis.group_norms.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert all(row["attention"] == "" and row["mlp"] for row in rows[4:8])
    assert all(row["mlp"] == "" and row["attention"] for row in rows[8:])
    for row in rows:
        squares = sum(float(row[g]) ** 2 for g in ("attention", "mlp", "embed", "lm_head", "other") if row[g])
        assert float(row["total"]) ** 2 == pytest.approx(squares, rel=1e-5)


def test_plain_peft_loads_the_final_model(finished: RunFolder) -> None:
    config = read_yaml(finished.path / "config.yaml")
    base = transformers.AutoModelForCausalLM.from_pretrained(config["model"]["name"])
    plain = peft.PeftModel.from_pretrained(base, str(finished.path / "final_model")).eval()
    ours, tokenizer = peftlab.load(finished.path)
    ids = tokenizer("name[The Mill]", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, ours(ids).logits)
        assert not torch.equal(plain(ids).logits, plain.unload()(ids).logits)


def test_the_manifest_says_what_it_belongs_to(finished: RunFolder) -> None:
    manifest = json.loads((finished.path / "final_model" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["version"] == 1
    assert manifest["method"] == "lora"
    assert manifest["scope"] == "model"
    assert len(manifest["base"]["tensors_sha256"]) == 64
    assert len(manifest["tokenizer_sha256"]) == 64
    tensors = load_file(finished.path / "final_model" / "adapter_model.safetensors")
    assert manifest["counts"] == {
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
    }
    verify_folder(finished.path / "final_model")


def test_the_bundle_is_the_best_checkpoint(finished: RunFolder) -> None:
    best = finished.summary()["best_checkpoint"]
    validated = {e["step"]: e["validation_loss"] for e in finished.events() if e["event"] == "validated"}
    assert best["validation_loss"] == min(validated.values())
    saved = load_adapter(finished.checkpoints / f"checkpoint-{best['step']}")
    bundle = load_file(finished.path / "final_model" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], bundle[name]) for name in bundle)


def test_another_base_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    whole_runs.save_byte_model(tmp_path / "other", seed=7)
    with pytest.raises(CheckpointError, match="other weights"):
        peftlab.load(finished.path, base=str(tmp_path / "other"))


def test_tensorboard_received_the_loss(finished: RunFolder) -> None:
    assert list((finished.path / "tensorboard").rglob("events.out.tfevents.*"))


def test_the_written_config_repeats_the_run(finished: RunFolder) -> None:
    again = execute(build_config(read_yaml(finished.path / "config.yaml")), show=lambda line: None)
    assert again.path != finished.path
    assert again.path.name == f"{finished.path.name}-2"
    one, two = (
        load_file(run.path / "final_model" / "adapter_model.safetensors") for run in (finished, again)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert again.summary()["scores"] == finished.summary()["scores"]


def test_plan_says_what_the_run_does(finished: RunFolder) -> None:
    planned = plan(build_config(read_yaml(finished.path / "config.yaml")))
    assert planned.pop("memory")["prediction"], "a plan says what memory it needs too; a run finds out"
    assert "when the run was made" in planned.pop("dtype")["reason"], "a run writes out what it chose"
    assert planned == {name: value for name, value in finished.preflight.items() if name != "dtype"}


def test_evaluate_gives_the_runs_own_score(finished: RunFolder, tmp_path: Path) -> None:
    again = evaluate_saved(str(finished.path), num_samples=3, output=tmp_path)
    assert (tmp_path / "e2e_nlg_evaluation.json").exists()
    own = finished.evaluation()["after"]["metrics"]
    assert again["after"]["metrics"] == own
    assert evaluate_saved(str(finished.path))["after"]["metrics"] == own
    assert evaluate_saved(str(finished.path), num_samples=6)["num_examples"] == 6


def test_generate_has_the_adapter_on_and_off(finished: RunFolder) -> None:
    (pair,) = answer(str(finished.path), ["name[Aromi], food[Thai]"], max_new_tokens=6)
    assert pair["adapter_on"] != pair["adapter_off"]


def test_the_page_says_that_the_run_has_finished(finished: RunFolder) -> None:
    page = finished.report.read_text(encoding="utf-8")
    assert ">finished<" in page
    assert "not finished" not in page
