"""Bad input that only data, model or disk can show: one clear message, exit code 2, before training."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

import tiny_models
import whole_runs
from peftlab.cli import main
from peftlab.config import build_config
from peftlab.errors import EvaluationError, InputError, ModelError
from peftlab.execute import execute, plan
from peftlab.resolve import resolve


def refused(values: dict[str, object], match: str) -> str:
    with pytest.raises(InputError, match=match) as caught:
        execute(build_config(values), show=lambda line: None)
    assert caught.value.exit_code == 2
    directory = Path(str(values["output"]["directory"]))  # type: ignore[index]
    assert not directory.exists() or not list(directory.iterdir())
    return str(caught.value)


def test_a_malformed_csv_names_file_and_line(tmp_path: Path) -> None:
    values = whole_runs.make_values(tmp_path)
    file = tmp_path / "data" / "devset.csv"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[2] = '"name[X], food[Thai]"'
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert "devset.csv" in refused(values, "line 3")


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    values = whole_runs.make_values(tmp_path)
    (tmp_path / "data" / "testset_w_refs.csv").unlink()
    refused(values, r"testset_w_refs\.csv")


def test_a_model_that_cannot_write(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path / "bert", "bert")
    values = whole_runs.make_values(tmp_path, model={"name": str(tmp_path / "bert")})
    refused(values, "not a causal or sequence-to-sequence language model")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(whole_runs.make_values(tmp_path, model={"name": str(tmp_path / "empty")}), "no config.json")
    refused(whole_runs.make_values(tmp_path, model={"name": str(tmp_path / "gone")}), "no model folder")


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    values = whole_runs.make_values(tmp_path)
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    refused(values, "tokenizer")


def test_damaged_weights(tmp_path: Path) -> None:
    values = whole_runs.make_values(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"weights of .* cannot be loaded"):
        execute(build_config(values), show=lambda line: None)


def test_an_unknown_target_lists_what_there_is(tmp_path: Path) -> None:
    message = refused(whole_runs.make_values(tmp_path, method={"targets": "q_porj"}), "matches nothing")
    assert "did you mean 'q_proj'" in message
    assert "attention.query" in message


def test_a_phase_that_trains_nothing(tmp_path: Path) -> None:
    refused(whole_runs.make_values(tmp_path, method={"targets": "mlp"}), r"phase 'attention'.*trains nothing")


def test_layers_beyond_the_model(tmp_path: Path) -> None:
    phases = [{"groups": ["attention"], "layers": [0, 5]}]
    values = whole_runs.make_values(tmp_path, schedule={"strategy": None, "phases": phases})
    refused(values, "go beyond this model's 2 layers")


def test_no_row_left(tmp_path: Path) -> None:
    refused(whole_runs.make_values(tmp_path, task={"max_length": 8}), r"no train row is left.*do not fit 8")


def test_rows_longer_than_the_models_positions(tmp_path: Path) -> None:
    model = tiny_models.build("gpt2")
    positions = model.config.n_positions
    values = whole_runs.make_values(
        tmp_path, model={"name": str(whole_runs.save_byte_model(tmp_path / "g", "gpt2"))}
    )
    values["task"]["max_length"] = 4 * positions
    refused(values, f"{positions} positions")


def test_a_run_whose_learning_rate_is_always_zero(tmp_path: Path) -> None:
    values = whole_runs.make_values(tmp_path, training={"max_steps": 1}, schedule={"strategy": None})
    with pytest.raises(InputError, match="learning rate is zero at every one"):
        build_config(values)


def test_a_phase_too_short_to_be_proved_is_noted(tmp_path: Path) -> None:
    phases = [{"steps": 2, "groups": ["attention"]}, {"groups": ["mlp"]}]
    notes = plan(
        build_config(whole_runs.make_values(tmp_path, schedule={"strategy": None, "phases": phases}))
    )["notes"]
    assert any("phase 'attention' has 1 steps of non-zero learning rate" in note for note in notes)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 1 << 20))
    refused(whole_runs.make_values(tmp_path), "1 MiB free")


def test_a_tracker_that_is_not_installed(tmp_path: Path) -> None:
    refused(whole_runs.make_values(tmp_path, training={"trackers": ["trackio"]}), "pip install trackio")


def test_a_failed_metric_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftlab.metrics import rouge_l

    def broken(*_: object, **__: object) -> None:
        raise EvaluationError("rouge_l: cannot be computed")

    monkeypatch.setattr(rouge_l, "score", broken)
    values = whole_runs.make_values(tmp_path, training={"max_steps": 3})
    with pytest.raises(EvaluationError) as caught:
        execute(build_config(values), show=lambda line: None)
    assert caught.value.exit_code == 1
    (folder,) = list((tmp_path / "runs").iterdir())
    assert not (folder / "DONE").exists()
    assert not list(folder.glob("*_evaluation.json"))


def test_an_invalid_generation_config_is_found_before_training(tmp_path: Path) -> None:
    values = whole_runs.make_values(tmp_path)
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.3}), encoding="utf-8")
    with pytest.raises(InputError, match="generation config"):
        execute(build_config(values), show=lambda line: None)


def test_the_command_line_prints_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = whole_runs.make_values(tmp_path)
    task, output = values["task"], values["output"]
    code = main(
        ["plan", "--task", "e2e_nlg", "--data-dir", task["data_dir"], "--model", str(tmp_path / "model"),
         "--target", "attn", "--output_dir", output["directory"]]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("peftlab: error:") == 1
    assert "Traceback" not in captured.err


def test_plan_counts_what_is_cut_and_dropped(tmp_path: Path) -> None:
    preflight = plan(build_config(whole_runs.make_values(tmp_path, task={"max_length": 60})))
    train = preflight["rows"]["train"]
    assert train["kept"] + sum(train["dropped"].values()) == train["read"] == 48
    assert train["truncated"] > 0


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (
            {"name": "prompt_tuning", "num_virtual_tokens": 9999},
            r"the 9999 virtual tokens of method prompt_tuning \(num_virtual_tokens\) fill all 512 positions of '.*model',"
            r" so no text fits behind them; use fewer.* at most \d+",
        ),
        (
            {"name": "peft", "type": "cartridge", "config": {"num_virtual_tokens": 500}},
            r"tokens behind 500 virtual ones but .* 512 positions; set task.max_length .* to 12 or less, or use fewer",
        ),
        (
            {"name": "adalora", "interval_steps": 12},
            r"method.interval_steps 12 has no step among those in which adalora takes ranks \(2 to 8 of 12\)",
        ),
    ],
)
def test_what_a_method_has_no_room_for(method: dict[str, object], match: str, tmp_path: Path) -> None:
    values = whole_runs.make_values(tmp_path, schedule={"strategy": None}, training={"log_steps": 1})
    refused(values | {"method": method}, match)


def test_what_is_longer_than_the_run_is_noted(tmp_path: Path) -> None:
    values = whole_runs.make_values(
        tmp_path,
        method={"rank": 17},
        training={"warmup_steps": 24, "validation_steps": 13, "save_steps": 14, "log_steps": 15},
        schedule={"strategy": None},
    )
    preflight = resolve(build_config(values | {"probes": {"gradient_norms": {"frequency": 13}}})).preflight
    notes = " ".join(preflight["notes"])
    for expected in (
        "rank 17 is above 8, the most that an update of model.layers.0.self_attn.k_proj (8 and 16 features) can have",
        "warmup_steps 24 (--warmup_steps) are not over when the run ends after 12 steps: the learning rate rises to 0.00458",
        "probes.gradient_norms.frequency 13 is more than the run's 12 steps: it measures nothing",
        "training.validation_steps 13 is more than the run's 12 steps: the validation loss is computed once",
        "training.save_steps 14 is more than the run's 12 steps: there is one checkpoint",
        "training.log_steps 15 is more than the run's 12 steps: no training loss is logged",
    ):
        assert expected in notes
    plain = resolve(build_config(whole_runs.make_values(tmp_path))).preflight
    assert not any("more than the run" in note or "warmup_steps" in note for note in plain["notes"])


def test_plan_says_what_is_tuned_and_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpredicted(*_: object, **__: object) -> None:
        raise ModelError("not asked here")

    monkeypatch.setattr("peftlab.execute.plan_memory", unpredicted)
    assert main(["plan", "--method", "ia3", "--output_dir", str(tmp_path), "--max_steps", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "note: method ia3 takes the place of method lora, for which the preset embedded"
    )
    assert lines[1:3] == [
        "task embedded", "base peftlab/tiny-base (LlamaForCausalLM, causal), 2,164,416 parameters",
    ]  # fmt: skip
    assert any(line.split() == ["whole", "model", "ia3", "ia3", "ia3", "3,584"] for line in lines)
