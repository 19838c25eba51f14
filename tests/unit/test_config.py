"""The config tree and its sources: defaults < preset < file < command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from peftlab.commands.flags import Assignment
from peftlab.commands.overlay import lay_over
from peftlab.commands.presets import describe_preset, preset_names
from peftlab.commands.schema import config_keys, json_schema
from peftlab.commands.sources import config_from, read_assignment
from peftlab.config import RunConfig, build_config
from peftlab.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"


def _set(*texts: str) -> list[Assignment]:
    return [read_assignment(text) for text in texts]


def _file(folder: Path, text: str) -> Path:
    path = folder / "given.yaml"
    path.write_text(text)
    return path


def test_defaults_of_the_design() -> None:
    config = RunConfig()
    lora = config.adapters[0].settings
    assert (lora["rank"], lora["alpha"], lora["dropout"]) == (8, 16, 0.1)
    training = config.training
    assert (training.learning_rate, training.warmup_steps, training.curve) == (2e-4, 10, "cosine")
    assert (training.weight_decay, training.clip_norm, training.seed) == (0.01, 1.0, 42)


def test_nothing_given_is_the_embedded_preset() -> None:
    assert config_from() == config_from(preset="embedded")
    assert config_from().training.max_steps == 420
    assert config_from().schedule.strategy == "both->mlp->attn"


@pytest.mark.parametrize(
    "texts",
    [
        ("training.max_steps=30",),
        ("task.name=embedded",),
        ("model.name=peftlab/tiny-base",),
        ("method.rank=2",),
    ],
)
def test_embedded_preset_stays_under_other_settings(texts: tuple[str, ...]) -> None:
    assert config_from(assignments=_set(*texts)).training.learning_rate == 0.008


def test_another_task_or_model_or_file_starts_from_the_defaults(tmp_path: Path) -> None:
    plain = RunConfig().training
    assert config_from(assignments=_set("task.name=e2e_nlg")).training == plain
    assert config_from(assignments=_set("model.name=org/model")).training == plain
    assert config_from(config_file=_file(tmp_path, "task: {name: embedded}")).training == plain


def test_which_source_wins(tmp_path: Path) -> None:
    path = _file(tmp_path, "training: {max_steps: 50, seed: 7}\nmethod: {alpha: 4}")
    config = config_from(config_file=path, preset="e2e_mlp", assignments=_set("training.seed=9"))
    lora = config.adapters[0].settings
    assert config.training.seed == 9, "the command line over the file"
    assert config.training.max_steps == 50, "the file over the preset"
    assert lora["alpha"] == 4
    assert lora["targets"] == "mlp", "the preset over the defaults"
    assert config.training.weight_decay == 0.01, "the defaults below all"


def test_the_resolved_config_repeats_the_run(tmp_path: Path) -> None:
    config = config_from(
        assignments=_set("training.max_steps=90", "probes={}", "method.targets=[q_proj, mlp.down]")
    )
    path = config.save(tmp_path / "config.yaml")
    again = config_from(config_file=path)
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert again.to_yaml() == config.to_yaml()
    changed = config_from(config_file=path, assignments=_set("method.rank=2"))
    assert changed.adapters[0].settings["rank"] == 2
    assert changed.adapters[0].settings["targets"] == ["q_proj", "mlp.down"]


def test_both_spellings_of_the_adapter(tmp_path: Path) -> None:
    one = build_config({"method": {"name": "lora", "rank": 3}})
    two = build_config({"adapters": [{"scope": "model", "method": "lora", "settings": {"rank": 3}}]})
    assert one == two
    path = _file(tmp_path, "adapters: [{method: lora, settings: {rank: 3}}]")
    assert config_from(config_file=path, assignments=_set("method.alpha=5")).adapters[0].settings["rank"] == 3


def test_another_method_drops_the_lower_ones_settings() -> None:
    lower = {"method": {"name": "lora", "rank": 4}, "training": {"seed": 1}}
    assert lay_over(lower, {"method": {"name": "other", "size": 2}})["method"] == {"name": "other", "size": 2}
    assert lay_over(lower, {"method": {"alpha": 2}})["method"] == {"name": "lora", "rank": 4, "alpha": 2}
    assert lay_over(lower, {"method": {"name": "lora", "alpha": 2}})["method"]["rank"] == 4
    assert lower == {"method": {"name": "lora", "rank": 4}, "training": {"seed": 1}}, (
        "sources are not changed"
    )


def told(**asked: object) -> list[str]:
    notes: list[str] = []
    config_from(**asked, tell=notes.append)  # type: ignore[arg-type]
    return notes


def test_what_another_method_leaves_out_is_told(tmp_path: Path) -> None:
    (note,) = told(assignments=_set("method.name=ia3"))
    assert note.startswith(
        "note: method ia3 takes the place of method lora, for which the preset embedded chose "
    )
    preset = config_from(preset="embedded").adapters[0].settings
    for key in ("rank", "alpha", "dropout", "targets"):
        assert f"method.{key}={preset[key]}".removesuffix(".0") in note
    assert "schedule.strategy=both->mlp->attn: these are left out" in note
    (note,) = told(assignments=_set("method.name=ia3", "method.targets=mlp", "schedule.strategy=early-late"))
    assert "targets" not in note, "what is set anew is not missing"
    assert "strategy" not in note
    assert told(assignments=_set("method.rank=2")) == []
    assert told(assignments=_set("method.name=ia3", "task.name=e2e_nlg")) == [], "no preset, nothing left out"
    path = _file(
        tmp_path, "method: {name: p_tuning, num_virtual_tokens: 7}\nschedule: {strategy: early->late}"
    )
    assert told(config_file=path, assignments=_set("method.name=p-tuning")) == [], (
        "the same in another spelling"
    )
    first, second = told(config_file=path, preset="e2e_mlp", assignments=_set("method.name=bitfit"))
    assert "lora, for which the preset e2e_mlp chose method.rank=8" in first
    assert (
        f"p_tuning, for which the preset e2e_mlp and {path} chose method.num_virtual_tokens=7, schedule."
        in second
    )


def test_adapters_by_number(tmp_path: Path) -> None:
    path = _file(tmp_path, "adapters:\n- {scope: encoder, settings: {rank: 3}}\n- {scope: decoder}\n")
    config = config_from(
        config_file=path, assignments=_set("adapters.1.settings.rank=5", "adapters.0.settings.alpha=7")
    )
    assert [a.scope for a in config.adapters] == ["encoder", "decoder"]
    assert [(a.settings["rank"], a.settings["alpha"]) for a in config.adapters] == [(3, 7), (5, 16)]
    one = config_from(assignments=_set("adapters.0.settings.rank=5"))
    assert one == config_from(assignments=_set("method.rank=5")), "the only adapter, its phases kept"
    other = config_from(
        config_file=path, assignments=_set("adapters.0.method=peft", "adapters.0.settings.type=vera")
    )
    assert other.adapters[0].settings == {"type": "vera", "config": {}, "targets": None}, (
        "none of LoRA's settings"
    )


def test_phases_and_strategies_replace_each_other() -> None:
    phases = "schedule.phases=[{groups: [mlp], steps: 100}, {groups: [attention]}]"
    config = config_from(assignments=_set(phases))
    assert config.schedule.strategy is None, "the embedded preset's strategy gives way"
    assert [p.end_step for p in config.make_schedule().phases] == [100, 420]
    ended = {"schedule": {"strategy": "both->mlp->attn", "phase1_end": 3, "phase2_end": 4}}
    assert lay_over(ended, {"schedule": {"strategy": "early->late"}})["schedule"] == {
        "strategy": "early->late"
    }
    assert lay_over(ended, {"schedule": {"phase1_end": 2}})["schedule"]["phase2_end"] == 4


def test_probes_on_the_command_line() -> None:
    assert config_from().probes == {"gradient_norms": {"frequency": 1, "layers": True}}
    assert config_from(assignments=_set("probes={}")).probes == {}
    assert config_from(assignments=_set("probes.gradient_norms=false")).probes == {}
    changed = config_from(assignments=_set("probes.gradient_norms.frequency=5")).probes
    assert changed == {"gradient_norms": {"frequency": 5, "layers": True}}


def test_probes_of_a_file_are_all_its_probes(tmp_path: Path) -> None:
    path = _file(tmp_path, "probes: {}")
    assert config_from(config_file=path).probes == {}
    path = _file(tmp_path, "probes: {gradient_norms: }")
    assert config_from(config_file=path).probes == {"gradient_norms": {"frequency": 1, "layers": True}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=3", 3),
        ("a.b=1e-3", "1e-3"),
        ("a.b=null", None),
        ("a.b=[x, y]", ["x", "y"]),
        ("a.b='3'", "3"),
        ("a.b=both->mlp->attn", "both->mlp->attn"),
        ("a.b=x=y", "x=y"),
        ("a.b= true", True),
    ],
)
def test_values_of_set_are_yaml(text: str, value: object) -> None:
    given = read_assignment(text)
    assert (given.key, given.value) == ("a.b", value)


def test_numbers_that_yaml_reads_as_text() -> None:
    assert config_from(assignments=_set("training.learning_rate=1e-3")).training.learning_rate == 1e-3


def test_equal_values_twice_are_no_conflict() -> None:
    assert config_from(assignments=_set("training.seed=4", "training.seed=4")).training.seed == 4


def test_a_section_and_a_key_in_it() -> None:
    config = config_from(assignments=_set("training={seed: 4}", "training.max_steps=30"))
    assert (config.training.seed, config.training.max_steps) == (4, 30)
    with pytest.raises(ConfigError, match="different values"):
        config_from(assignments=_set("training={seed: 4}", "training.seed=5"))


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_described(name: str) -> None:
    assert isinstance(config_from(preset=name), RunConfig)
    assert config_from(preset=name.replace("_", "-")) == config_from(preset=name)
    assert 20 < len(describe_preset(name)) < 140


def test_presets_of_s1() -> None:
    for name, targets in (("e2e_attention", "attention_qv"), ("e2e_mlp", "mlp")):
        config = config_from(preset=name)
        settings = config.adapters[0].settings
        assert (config.task.name, settings["targets"], settings["rank"]) == ("e2e_nlg", targets, 8)
        assert config.training.max_steps == 1000


def test_fingerprint_leaves_out_where_the_output_goes() -> None:
    one, two = (config_from(assignments=_set(f"output.directory={d}", f"output.name={d}")) for d in "ab")
    assert one.fingerprint() == two.fingerprint()
    assert one.fingerprint() != config_from(assignments=_set("training.seed=1")).fingerprint()


def test_schema_is_current() -> None:
    assert json.loads((DOCS / "run-config.schema.json").read_text(encoding="utf-8")) == json_schema()


def test_schema_knows_every_key_with_its_text() -> None:
    schema = json_schema()
    for key in config_keys():
        section, _, name = key.path.partition(".")
        part = schema["properties"][section]
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        if section == "method":
            part = next(method for method in part["anyOf"] if name in method["properties"])
        if section == "probes":
            probe, _, name = name.partition(".")
            part = part["properties"][probe]["anyOf"][0]
        assert part["properties"][name]["description"], key.path


def test_schema_refers_to_what_it_holds() -> None:
    schema = json_schema()
    for reference in set(_references(schema)):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]


def _references(part: object) -> list[str]:
    if isinstance(part, dict):
        inner = [r for value in part.values() for r in _references(value)]
        return inner + ([part["$ref"]] if "$ref" in part else [])
    return [r for value in part for r in _references(value)] if isinstance(part, list) else []


def test_yaml_has_every_default_written_out() -> None:
    written = yaml.safe_load(RunConfig().to_yaml())
    for key in config_keys():
        section, _, name = key.path.partition(".")
        if section not in ("method", "probes"):
            assert name in written[section]
