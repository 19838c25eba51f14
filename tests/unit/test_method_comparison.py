"""A run as a result of peft's method_comparison: the layout that its viewers read, every field true or null."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_folder_fixture import fabricate_run

from peftlab.cli import main
from peftlab.errors import InputError, RunError
from peftlab.method_comparison import find_finished, peft_result, write_peft_result
from peftlab.run import RunFolder

# What huggingface/peft's method_comparison/processing.py reads, with the type that it makes of it.
RUN_INFO = {"experiment_name": str, "created_at": str, "total_time": float}
TRAIN_INFO = {
    "accelerator_memory_reserved_avg": int, "accelerator_memory_max": int, "accelerator_memory_reserved_99th": int,
    "train_time": float, "file_size": int, "num_trainable_params": int,
}  # fmt: skip
LAST_METRICS = {"train loss": float, "train samples": int, "train total tokens": int}
PACKAGES = (
    "peft-version",
    "transformers-version",
    "datasets-version",
    "torch-version",
    "bitsandbytes-version",
)
# What log_results in method_comparison/MetaMathQA/utils.py writes: the whole layout.
LAYOUT: dict[str, Any] = {
    "run_info": {
        "created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg",
    },
    "train_info": {*TRAIN_INFO, "num_total_params", "status", "metrics"},
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
}  # fmt: skip
TRAIN_CONFIG = {
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile", "use_gc",
    "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp",
    "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
}  # fmt: skip
ON_THE_WAY = {
    "step", "valid accuracy", "train loss", "train samples", "train time", "eval time", "tokens / sec",
    "mem allocated avg", "mem reserved avg", "elapsed time",
}  # fmt: skip


def make(folder: Path, **given: Any) -> RunFolder:
    """A finished run with an adapter of peft."""
    run = fabricate_run(folder, steps=20, **given)
    run.final_model.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj"]}
    (run.final_model / "adapter_config.json").write_text(json.dumps(config))
    (run.final_model / "adapter_model.safetensors").write_bytes(b"x" * 1234)
    (run.final_model / "manifest.json").write_text(json.dumps({"template": {"text": "{source} ->"}}))
    return run


def check_as_their_viewers_do(result: dict[str, Any]) -> None:
    """Read a result as preprocess and load_df in method_comparison/processing.py do."""
    run_info, train_info, meta_info = (result[name] for name in ("run_info", "train_info", "meta_info"))
    assert run_info["peft_config"] is None or isinstance(run_info["peft_config"]["peft_type"], str)
    assert train_info["status"] == "success", "others are skipped"
    assert isinstance(run_info["train_config"]["model_id"], str)
    last = train_info["metrics"][-1]
    for part, types in ((run_info, RUN_INFO), (train_info, TRAIN_INFO), (last, LAST_METRICS)):
        for name, kind in types.items():
            assert isinstance(part[name], kind), name
            assert not isinstance(part[name], bool)
    assert last["test accuracy"] is None or 0 <= last["test accuracy"] <= 1
    assert isinstance(last["forgetting"], float | None)
    datetime.fromisoformat(run_info["created_at"])
    for name in PACKAGES:
        assert meta_info["package_info"][name] is None or re.match(r"\d", meta_info["package_info"][name])
    assert "peft_branch" in run_info
    assert isinstance(meta_info["system_info"], dict)


def test_the_layout_is_whole(tmp_path: Path) -> None:
    run = make(tmp_path)
    result = peft_result(find_finished(str(run.path), tmp_path), run.evaluation()["after"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    check_as_their_viewers_do(result)
    assert {name: set(part) for name, part in result.items()} == LAYOUT
    assert set(result["run_info"]["train_config"]) == TRAIN_CONFIG
    *way, last = result["train_info"]["metrics"]
    assert all(set(entry) == ON_THE_WAY | {"valid loss"} for entry in way)
    assert set(last) >= {"step", "test accuracy", "forgetting", *LAST_METRICS}


def test_what_it_says_is_what_was_measured(tmp_path: Path) -> None:
    run = make(tmp_path)
    result = peft_result(run, run.evaluation()["after"])
    summary = run.summary()
    assert result["run_info"]["total_time"] == summary["seconds"]["total"]
    assert result["run_info"]["experiment_name"] == f"lora/{run.name}"
    assert result["run_info"]["train_config"]["query_template"] == "{query} ->"
    assert result["run_info"]["train_config"]["generation_kwargs"] == {"max_new_tokens": 48}
    assert result["train_info"]["file_size"] == 1234
    assert result["train_info"]["accelerator_memory_max"] == 0, "there was no accelerator"
    *way, last = result["train_info"]["metrics"]
    steps = {e["step"]: e for e in run.timeline() if e["event"] == "step"}
    marks = [e["step"] for e in run.timeline() if e["event"] == "validated"]
    assert [entry["step"] for entry in way] == marks
    inside = [steps[s]["loss"] for s in range(marks[0] + 1, marks[1] + 1)]
    assert way[1]["train loss"] == pytest.approx(sum(inside) / len(inside))
    assert last["train samples"] == 20 * 16
    assert last["train total tokens"] == steps[20]["tokens"]
    assert last["test accuracy"] is None, "BLEU is no accuracy"
    assert last["test bleu"] == run.evaluation()["after"]["metrics"]["bleu"]["value"]
    assert sum(entry["train time"] for entry in way) == pytest.approx(steps[20]["seconds"])


def test_an_accuracy_is_one(tmp_path: Path) -> None:
    half = {"metrics": {"value_coverage": {"value": 0.9}, "label_accuracy": {"value": 0.75}}}
    assert peft_result(make(tmp_path), half)["train_info"]["metrics"][-1]["test accuracy"] == 0.75
    assert peft_result(make(tmp_path), None)["train_info"]["metrics"][-1]["test accuracy"] is None


def test_reserved_memory_of_a_gpu_is_not_invented(tmp_path: Path) -> None:
    run = make(tmp_path)
    path = run.path / RunFolder.SUMMARY
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"peak_memory_bytes": {"host": 1, "device": 5}}))
    assert peft_result(run, None)["train_info"]["accelerator_memory_max"] is None


def change_adapters(run: RunFolder, adapters: list[dict[str, Any]]) -> None:
    path = run.path / RunFolder.CONFIG
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"adapters": adapters}))


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has not finished.*--resume"):
        find_finished(str(fabricate_run(tmp_path, "open", until="training").path), tmp_path)
    run = make(tmp_path, name="made")
    two = [{"method": "lora", "scope": "encoder"}, {"method": "lora", "scope": "decoder"}]
    change_adapters(run, two)
    with pytest.raises(InputError, match=r"has 2 adapters \(lora, lora\)"):
        find_finished("made", tmp_path)
    change_adapters(run, [{"method": "new_layer"}])
    (run.final_model / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"new_layer, which is none of peft's.*as full fine-tuning"):
        find_finished("made", tmp_path)
    change_adapters(run, [{"method": "full"}])
    (run.final_model / "model.safetensors").write_bytes(b"x" * 10)
    result = peft_result(find_finished("made", tmp_path), None)
    assert result["run_info"]["peft_config"] is None
    assert result["train_info"]["file_size"] == 1234 + 10
    change_adapters(run, [{"method": "lora"}])
    (run.final_model / "adapter_config.json").write_text("{")
    with pytest.raises(RunError, match=r"adapter_config.json is damaged"):
        peft_result(run, None)


def test_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "runs")
    asked = ["evaluate", "last", "--output_dir", str(tmp_path / "runs"), "--format", "peft"]
    assert main(asked) == 0
    printed = json.loads(capsys.readouterr().out)
    check_as_their_viewers_do(printed)
    assert main([*asked, "--output", str(tmp_path / "out" / "results")]) == 0
    (file,) = (tmp_path / "out" / "results").iterdir()
    assert file.name == f"lora--{run.name}.json"
    assert json.loads(file.read_text()) == printed
    assert str(file) in capsys.readouterr().out
    for more, said in (
        (["--format", "pef"], "unknown format 'pef' (did you mean 'peft'?)"),
        (["--task", "embedded"], "its own task; leave --task out"),
        (["--split", "validation"], "test scores alone; leave --split validation out"),
    ):
        assert main([*asked, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["evaluate", "gone", "--output_dir", str(tmp_path / "runs"), "--format", "peft"]) == 2
    assert "unknown run 'gone'" in capsys.readouterr().err


def test_the_files_name(tmp_path: Path) -> None:
    result = {"run_info": {"experiment_name": "ia3/a-b"}}
    assert write_peft_result(result, tmp_path).name == "ia3--a-b.json"
