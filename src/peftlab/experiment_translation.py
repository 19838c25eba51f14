"""Between S1's `ExperimentConfig` and peftlab's `RunConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftlab.catalog import TASKS
from peftlab.config import RunConfig, build_config
from peftlab.decoding import MAX_NEW_TOKENS
from peftlab.errors import ConfigError, ScheduleError
from peftlab.experiment_config import (
    DataConfig,
    DatasetType,
    DynamicLoRAConfig,
    EvaluationConfig,
    ExperimentConfig,
    GradientAnalysisConfig,
    LoRAConfig,
    ModelConfig,
    TargetModuleGroup,
    TrainingConfig,
    member,
)
from peftlab.family import SEED_SPELLINGS
from peftlab.schedule import STRATEGIES, canonical_strategy


def run_config_of(experiment: ExperimentConfig) -> RunConfig:
    """The config that does an experiment.

    Args:
        experiment: The experiment.

    Returns:
        The config.

    Raises:
        ConfigError: A value is invalid or cannot be followed.
        ScheduleError: The phases do not fit the run.
    """
    model, lora, data = experiment.model, experiment.lora, experiment.data
    norms, evaluation = experiment.gradient_analysis, experiment.evaluation
    if not norms.measure_group_norm:
        raise ConfigError("gradient_analysis.measure_group_norm: groups are always measured; set it to True")
    if norms.save_format != "csv":
        raise ConfigError(
            f"gradient_analysis.save_format: the norms are written as csv, not '{norms.save_format}'"
        )
    group = member(TargetModuleGroup, lora.target_module_group, "lora.target_module_group").value
    return build_config(
        {
            "model": {
                "name": model.model_id,
                "dtype": model.torch_dtype,
                "device": model.device_map,
                "trust_remote_code": model.trust_remote_code,
                "gradient_checkpointing": model.gradient_checkpointing,
            },
            "task": {
                "name": member(DatasetType, data.dataset_type, "data.dataset_type").value,
                "data_dir": data.data_dir,
                "max_length": data.max_length,
                "num_samples": data.num_samples or None,
            },
            "method": {
                "name": "lora",
                "rank": lora.r,
                "alpha": lora.lora_alpha,
                "dropout": lora.lora_dropout,
                "targets": SEED_SPELLINGS.get(group, group),
            },
            "schedule": _schedule(experiment.dynamic_lora, experiment.training.max_steps),
            "training": _training(experiment.training),
            "probes": {
                "gradient_norms": {"frequency": norms.log_frequency, "layers": norms.measure_layer_norm}
            },
            "evaluation": {
                "enabled": evaluation.enabled,
                "num_samples": (evaluation.num_samples or None) if evaluation.enabled else None,
                "max_new_tokens": evaluation.max_new_tokens,
                "batch_size": evaluation.batch_size or None,
            },
            "output": {"directory": experiment.output_dir, "name": experiment.experiment_name},
        }
    )


def _training(training: TrainingConfig) -> dict[str, Any]:
    """The `training` section."""
    return {
        "max_steps": training.max_steps,
        "batch_size": training.per_device_train_batch_size,
        "accumulation_steps": training.gradient_accumulation_steps,
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup_steps,
        "curve": training.lr_scheduler_type,
        "weight_decay": training.weight_decay,
        "clip_norm": training.max_grad_norm,
        "log_steps": training.logging_steps,
        "validation_steps": training.eval_steps,
        "save_steps": training.save_steps,
        "keep_checkpoints": training.save_total_limit,
        "select_best": training.load_best_model_at_end,
        "seed": training.seed,
    }


def _schedule(phases: DynamicLoRAConfig, max_steps: int) -> dict[str, Any]:
    """The `schedule` section; the phases must follow each other without gaps to the end of the run."""
    if not phases.enabled:
        return {}
    strategy = canonical_strategy(phases.phase_strategy)
    steps = [phases.phase1_steps, phases.phase2_steps, phases.phase3_steps][: len(STRATEGIES[strategy])]
    expected: int | None = 0
    for number, (start, end) in enumerate(steps, start=1):
        if start != expected:
            raise ScheduleError(
                f"dynamic_lora.phase{number}_steps starts at {start}, expected {expected}:"
                " phases follow each other"
            )
        expected = end
    if expected not in (None, max_steps):
        raise ScheduleError(
            f"dynamic_lora.phase{len(steps)}_steps ends at {expected}, but '{strategy}' has"
            f" {len(steps)} phases and the run {max_steps} steps: the last phase ends with the run,"
            f" write ({steps[-1][0]}, None)"
        )
    ends = {f"phase{number}_end": end for number, (_, end) in enumerate(steps[:-1], start=1)}
    return {"strategy": strategy, **ends}


def experiment_of(config: RunConfig) -> ExperimentConfig:
    """Say a config in S1's words.

    Args:
        config: The config.

    Returns:
        The experiment; `run_config_of` gives an equal config back (a strategy's ends written out).

    Raises:
        ConfigError: S1 has no words for something in it; says what differs.
    """
    evaluation = config.evaluation
    answer = evaluation.answer_tokens(TASKS.load(config.task.name))  # S1 has no word for "the task's own"
    config = config.model_copy(
        update={"evaluation": evaluation.model_copy(update={"max_new_tokens": answer})}
    )
    experiment = _nearest(config)
    back = run_config_of(experiment)
    if back != config:
        ours, theirs = (c.model_dump(mode="json") for c in (config, back))
        differs = [key for key in ours if ours[key] != theirs[key]]
        if differs != ["schedule"] or back.make_schedule() != config.make_schedule():
            raise ConfigError(
                f"ExperimentConfig cannot say all of this config: {', '.join(differs)} would differ"
            )
    return experiment


def _nearest(config: RunConfig) -> ExperimentConfig:
    """The experiment that is nearest to a config.

    Args:
        config: The config.

    Returns:
        The experiment.

    Raises:
        ConfigError: The method, the targets or the task has no word in S1 at all.
    """
    adapter, training = config.adapters[0], config.training
    groups = {SEED_SPELLINGS.get(group.value, group.value): group for group in TargetModuleGroup}
    targets = adapter.settings.get("targets")
    if adapter.method != "lora" or not isinstance(targets, str) or targets not in groups:
        raise ConfigError(
            f"ExperimentConfig has LoRA on {', '.join(groups)}; not {adapter.method} on {targets}"
        )
    if config.task.name not in [dataset.value for dataset in DatasetType]:
        raise ConfigError(f"ExperimentConfig has no data set '{config.task.name}'")
    norms = config.probes.get("gradient_norms", {})
    return ExperimentConfig(
        model=ModelConfig(
            config.model.name,
            config.model.device,
            config.model.dtype,
            config.model.trust_remote_code,
            config.model.gradient_checkpointing,
        ),
        lora=LoRAConfig(
            adapter.settings["rank"], adapter.settings["alpha"], adapter.settings["dropout"], groups[targets]
        ),
        training=TrainingConfig(
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.accumulation_steps,
            max_steps=training.max_steps,
            learning_rate=training.learning_rate,
            warmup_steps=training.warmup_steps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.clip_norm,
            lr_scheduler_type=training.curve,
            logging_steps=training.log_steps,
            eval_steps=training.validation_steps,
            save_steps=training.save_steps,
            save_total_limit=training.keep_checkpoints,
            load_best_model_at_end=training.select_best,
            seed=training.seed,
        ),
        data=DataConfig(
            DatasetType(config.task.name),
            config.task.max_length,
            config.task.num_samples or 0,
            str(config.task.data_dir) if config.task.data_dir is not None else None,
        ),
        gradient_analysis=GradientAnalysisConfig(
            log_frequency=norms.get("frequency", 1), measure_layer_norm=norms.get("layers", True)
        ),
        evaluation=EvaluationConfig(
            config.evaluation.enabled,
            config.evaluation.num_samples or 0,
            config.evaluation.max_new_tokens or MAX_NEW_TOKENS,
            config.evaluation.batch_size or 0,
        ),
        dynamic_lora=_phases(config),
        experiment_name=config.output.name,
        output_dir=str(Path(config.output.directory)),
    )


def _phases(config: RunConfig) -> DynamicLoRAConfig:
    """The phases in S1's words; its defaults, switched off, where the config has no strategy."""
    asked = config.schedule
    if asked.strategy is None:
        return DynamicLoRAConfig()
    placed = config.make_schedule().phases
    steps: list[tuple[int, int | None]] = [(p.start_step, p.end_step) for p in placed]
    steps[-1] = (placed[-1].start_step, None)
    third = steps[2] if len(steps) > 2 else (steps[1][0], None)
    return DynamicLoRAConfig(True, asked.strategy, steps[0], steps[1], third)
