"""S1's configuration classes."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.commands.sources import config_from
from peftlab.errors import ConfigError, ScheduleError, UnknownNameError
from peftlab.experiment_config import (
    ATTENTION_ONLY,
    BOTH,
    MLP_ONLY,
    NOT_TAKEN,
    DataConfig,
    DatasetType,
    DynamicLoRAConfig,
    ExperimentConfig,
    LoRAConfig,
    TargetModuleGroup,
    config_from_dict,
    config_to_dict,
)
from peftlab.experiment_presets import PRESETS


def test_module_lists_as_documented() -> None:
    assert ATTENTION_ONLY == ["q_proj", "v_proj"]
    assert MLP_ONLY == ["gate_proj", "up_proj", "down_proj"]
    assert BOTH == ["q_proj", "k_proj", "o_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    assert LoRAConfig(target_module_group=TargetModuleGroup.BOTH).target_modules == BOTH
    assert LoRAConfig(target_module_group=TargetModuleGroup.ALL).target_modules == [
        *BOTH,
        "embed_tokens",
        "lm_head",
    ]


def test_documented_defaults_and_positions() -> None:
    config = ExperimentConfig()
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (4, 32, 0.1)
    assert (config.training.learning_rate, config.training.max_steps) == (2e-4, 1000)
    assert LoRAConfig(8, 16, 0.0) == LoRAConfig(r=8, lora_alpha=16, lora_dropout=0.0)


def test_as_the_document_uses_it() -> None:
    config = ExperimentConfig()
    config.data.dataset_type = DatasetType.E2E_NLG
    config.lora.r = 4
    config.dynamic_lora.phase2_steps = (15, None)
    run = config.to_run_config()
    assert run.adapters[0].settings["rank"] == 4
    assert run.adapters[0].settings["targets"] == "attention_qv"
    assert run.schedule.strategy is None


def test_a_misspelt_field_is_refused() -> None:
    config = ExperimentConfig()
    with pytest.raises(AttributeError):
        config.lora.rank = 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_round_trip(name: str) -> None:
    experiment = PRESETS[name]()
    assert experiment is not PRESETS[name](), "every call gives a new one, for it can be changed"
    assert experiment.to_run_config() == config_from(preset=name)
    assert (experiment.lora.r, experiment.training.max_steps) == (8, 1000)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(experiment)))) == experiment


def test_presets_of_a_later_issue() -> None:
    assert {"e2e_attention", "e2e_mlp"} <= set(PRESETS)
    for name in ("samsum_attention", "nothing"):
        if name not in PRESETS:
            with pytest.raises(UnknownNameError, match="e2e_attention, e2e_mlp"):
                PRESETS[name]


@given(
    rank=st.integers(1, 64),
    group=st.sampled_from(TargetModuleGroup),
    dataset=st.sampled_from(DatasetType),
    rate=st.floats(1e-6, 1e-1),
    ends=st.tuples(st.integers(1, 400), st.integers(401, 900)),
    name=st.none() | st.text("abc-_", min_size=1),
)
def test_json_round_trip_is_exact(
    rank: int,
    group: TargetModuleGroup,
    dataset: DatasetType,
    rate: float,
    ends: tuple[int, int],
    name: str | None,
) -> None:
    config = ExperimentConfig(lora=LoRAConfig(r=rank, target_module_group=group), experiment_name=name)
    config.data = DataConfig(dataset)
    config.training.learning_rate = rate
    config.dynamic_lora = DynamicLoRAConfig(True, "attn->mlp->both", (0, ends[0]), ends, (ends[1], None))
    plain = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(plain))) == config
    assert config_to_dict(config_from_dict(plain)) == plain


def test_to_run_config_and_back() -> None:
    config = ExperimentConfig()
    config.dynamic_lora = DynamicLoRAConfig(True, "both->mlp->attn", (0, 300), (300, 600), (600, None))
    config.data.num_samples, config.evaluation.num_samples = 50, 0
    config.model.gradient_checkpointing = True
    run = config.to_run_config()
    assert (run.schedule.phase1_end, run.schedule.phase2_end) == (300, 600)
    assert (run.task.num_samples, run.evaluation.num_samples) == (50, None)
    assert ExperimentConfig.from_run_config(run).to_run_config() == run


def test_every_field_has_an_effect() -> None:
    plain = ExperimentConfig().to_run_config()
    changes = {str: "x", int: 70, float: 0.5}
    special = {
        "model.device_map": "cpu",
        "model.torch_dtype": "float64",
        "training.lr_scheduler_type": "linear",
        "data.dataset_type": None,
        "lora.target_module_group": TargetModuleGroup.MLP_ONLY,
        "data.data_dir": "d",
    }
    refused = {"gradient_analysis.measure_group_norm", "gradient_analysis.save_format"}
    for section in fields(ExperimentConfig):
        if not is_dataclass(getattr(ExperimentConfig(), section.name)) or section.name == "dynamic_lora":
            continue
        for one in fields(getattr(ExperimentConfig(), section.name)):
            path, config = f"{section.name}.{one.name}", ExperimentConfig()
            part = getattr(config, section.name)
            old = getattr(part, one.name)
            new = special.get(path, (not old) if isinstance(old, bool) else changes.get(type(old)))
            if path == "data.dataset_type":
                continue
            setattr(part, one.name, new)
            if path in refused:
                with pytest.raises(ConfigError, match=one.name):
                    config.to_run_config()
            else:
                assert config.to_run_config() != plain, path


def test_two_phases_end_with_the_run() -> None:
    config = ExperimentConfig()
    config.dynamic_lora.enabled, config.dynamic_lora.phase_strategy = True, "early->late"
    with pytest.raises(ScheduleError, match=r"write \(100, None\)"):
        config.to_run_config()
    config.dynamic_lora.phase2_steps = (100, None)  # what S1's own fix 3 does
    assert [p.end_step for p in config.to_run_config().make_schedule().phases] == [100, 1000]


def test_phases_with_a_gap() -> None:
    config = ExperimentConfig()
    config.dynamic_lora = DynamicLoRAConfig(True, phase2_steps=(150, 200))
    with pytest.raises(ScheduleError, match="phase2_steps starts at 150, expected 100"):
        config.to_run_config()


@pytest.mark.parametrize("path", NOT_TAKEN)
def test_what_is_not_taken_over_says_why(path: str) -> None:
    section, _, key = path.partition(".")
    with pytest.raises(ConfigError) as caught:
        config_from_dict({section: {key: None}})
    assert NOT_TAKEN[path] in str(caught.value)


def test_bad_values_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"lora": {"rr": 3, "target_module_group": "mlp"}, "trainig": {}, "data": 3})
    text = str(caught.value)
    assert "'lora.rr' (did you mean 'r'?)" in text
    assert "unknown value 'mlp'" in text
    assert "mlp_only" in text
    assert "'trainig' (did you mean 'training'?)" in text
    assert "'data' must hold keys and values" in text


def test_what_s1_cannot_say_is_refused() -> None:
    for values in (
        {"training.clip_norm": 0.5},
        {"evaluation.before": False},
        {"method.targets": "attention"},
    ):
        from peftlab.commands.flags import Assignment

        given = [Assignment(key, value, key) for key, value in values.items()]
        config = config_from(preset="e2e_mlp", assignments=given)
        if "training.clip_norm" in values:
            assert ExperimentConfig.from_run_config(config).training.max_grad_norm == 0.5
        else:
            with pytest.raises(ConfigError, match="ExperimentConfig"):
                ExperimentConfig.from_run_config(config)
    with pytest.raises(ConfigError, match="no data set 'embedded'"):
        ExperimentConfig.from_run_config(config_from())
