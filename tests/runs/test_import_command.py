"""`peftlab import` and `peftlab export`: from somebody's folder to a bundle, to a plain folder again, by command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import tiny_bundles
import tiny_models
from foreign_adapters import Made, answers
from peftlab.cli import main
from peftlab.errors import InputError
from peftlab.store import load, read_manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def test_there_and_back(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, base, expected = made.get("dora")
    asked = ["import", str(folder), "--base", str(base), "--output", str(tmp_path), "--name", "mnli"]
    assert main([*asked, "--labels", "entailment, neutral, contradiction"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{tmp_path / 'mnli'}: lora, ")
    assert read_manifest(tmp_path / "mnli")["labels"] == ["entailment", "neutral", "contradiction"]
    assert torch.equal(answers(load(tmp_path / "mnli", device="cpu")[0], "bert"), expected)
    assert main(asked) == 2
    assert "mnli is there already" in capsys.readouterr().err
    assert main([*asked, "--on-conflict", "version"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'mnli-2'}: ")
    assert main(["export", str(tmp_path / "mnli"), "--output", str(tmp_path / "plain")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "plain" / "mnli")
    kind = type(tiny_models.build("bert"))
    back = peft.PeftModel.from_pretrained(kind.from_pretrained(base), str(tmp_path / "plain" / "mnli")).eval()
    assert torch.equal(answers(back, "bert"), expected)
    own, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "plain" / "mnli", folder))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_a_runs_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_models.save_model(tmp_path / "base", "llama")
    run = tmp_path / "runs" / "poems-1234"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    asked = ["export", "last", "--output_dir", str(tmp_path / "runs"), "--output", str(tmp_path / "plain")]
    assert main(asked) == 2
    assert "has no final model yet" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"has no final model yet; go on with it: peftlab run --resume"):
        load("last", directory=tmp_path / "runs")
    tiny_bundles.make(tiny_bundles.CASES["lora"], base, run / "final_model")
    expected = answers(load(run / "final_model", device="cpu")[0], "llama")
    for reference in ("last", "poems-1234", run):  # as `evaluate` takes them
        found = load(reference, device="cpu", directory=tmp_path / "runs")[0]
        assert torch.equal(answers(found, "llama"), expected)
    with pytest.raises(InputError, match=r"unknown run 'poem'.*did you mean 'poems-1234'"):
        load("poem", directory=tmp_path / "runs")
    assert main(asked) == 0
    assert sorted(file.name for file in (tmp_path / "plain" / "poems-1234").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    card = (tmp_path / "plain" / "poems-1234" / "README.md").read_text(encoding="utf-8")
    assert "PeftModel.from_pretrained" in card
    assert "{input} ->" in card
    config = json.loads(
        (tmp_path / "plain" / "poems-1234" / "adapter_config.json").read_text(encoding="utf-8")
    )
    assert config["base_model_name_or_path"] == str(base)
    assert main(["export", str(run), "--output", str(tmp_path / "plain"), "--name", "again"]) == 0
    assert main(["export", str(run / "final_model"), "--output", str(tmp_path / "more")]) == 0
    assert (tmp_path / "more" / "poems-1234").is_dir()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--base", "nobody/", "--name", "x"], "there is no model folder nobody/"),
        (["--name", ".."], "the name '..'"),
        (["--name", "a/b"], "the name 'a/b'"),
        (["--on_conflict", "ask"], "--on_conflict ask: it is one of refuse, version, overwrite"),
        (["--alpha", "much"], "--alpha: "),
        (["--labels", "a,,b"], "--labels a,,b: a name is empty"),
        (["--alpha", "4"], "alpha and merged are for files of loralib"),
        (["--labels", "a,b"], "2 labels are given, and the adapter has no classes"),
        (["--ignor", "r"], "unknown flag --ignor (did you mean '--ignore'?)"),
    ],
)
def test_what_is_asked_for_wrongly(
    changes: list[str], said: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base, _ = made.get("names")
    asked = ["import", str(folder), "--base", str(base), "--output", str(tmp_path / "out")]
    assert main([*asked, *changes]) == 2
    found = capsys.readouterr()
    assert said in found.err
    assert found.out == ""
    assert not (tmp_path / "out").exists()


def test_a_field_may_be_passed_over(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, base, _ = made.get("names")
    copy = Path(shutil.copytree(folder, tmp_path / "theirs"))
    config = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    (copy / "adapter_config.json").write_text(json.dumps(config | {"dawn": 1}), encoding="utf-8")
    asked = ["import", str(copy), "--base", str(base), "--output", str(tmp_path)]
    assert main([*asked, "--name", "x"]) == 2
    assert "cannot express: dawn=1" in capsys.readouterr().err
    assert main([*asked, "--name", "x", "--ignore", "dawn"]) == 0


def test_a_damaged_source_is_a_failed_run(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base, _ = made.get("names")
    copy = Path(shutil.copytree(folder, tmp_path / "theirs"))
    (copy / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
    assert main(["import", str(copy), "--base", str(base), "--output", str(tmp_path), "--name", "x"]) == 1
    assert "cannot be read" in capsys.readouterr().err
