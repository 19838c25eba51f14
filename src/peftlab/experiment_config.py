"""S1's configuration classes, kept under their names and signatures.

They are mutable dataclasses that say what S1 said; `ExperimentConfig.to_run_config()` makes the one config of
peftlab of them, where everything is checked. A field has an effect or is refused: what S1 had and peftlab
does otherwise is listed in `NOT_TAKEN` with the reason.

Defaults are S1's where its documents name them (rank 4, alpha 32, attention only, 1000 steps, TinyLlama, 100
scored examples of at most 128 new tokens, validation every 10 and checkpoints every 50 steps, `./results`);
the others are peftlab's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from peftlab.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from peftlab.config import RunConfig

E = TypeVar("E", bound=Enum)
ATTENTION_ONLY = ["q_proj", "v_proj"]
MLP_ONLY = ["gate_proj", "up_proj", "down_proj"]
BOTH = ["q_proj", "k_proj", "o_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]

NOT_TAKEN = {
    "lora.bias": "biases are not trained with LoRA here",
    "training.warmup_ratio": "give warmup_steps",
    "training.save_strategy": "checkpoints are written every save_steps",
    "training.metric_for_best_model": "the best checkpoint is the one of the lowest validation loss",
    "training.per_device_eval_batch_size": "give evaluation.batch_size",
    "data.task_type": "it follows from the task",
    "data.num_labels": "it follows from the task",
    "data.validation_split": "every task brings its own validation split",
    "evaluation.temperature": "drawn answers are asked for with evaluation.decoding=sample of a run's own config",
    "evaluation.top_p": "drawn answers are asked for with evaluation.decoding=sample of a run's own config",
    "evaluation.do_sample": "drawn answers are asked for with evaluation.decoding=sample of a run's own config",
    "dynamic_lora.verbose": "phase changes are always logged",
}
"""Fields of S1's stored configs that are refused, with the reason."""


class DatasetType(str, Enum):  # noqa: UP042 - S1's base classes
    """S1's data sets; the values are names of tasks."""

    E2E_NLG = "e2e_nlg"
    SAMSUM = "samsum"
    WIKISQL = "wikisql"
    MULTI_NLI = "multi_nli"


class TargetModuleGroup(str, Enum):  # noqa: UP042 - S1's base classes
    """S1's groups of modules to adapt."""

    ATTENTION_ONLY = "attention_only"
    MLP_ONLY = "mlp_only"
    BOTH = "both"
    ALL = "all"


_MODULES = {
    TargetModuleGroup.ATTENTION_ONLY: ATTENTION_ONLY,
    TargetModuleGroup.MLP_ONLY: MLP_ONLY,
    TargetModuleGroup.BOTH: BOTH,
    TargetModuleGroup.ALL: [*BOTH, "embed_tokens", "lm_head"],
}


@dataclass(slots=True)
class ModelConfig:
    """The base model.

    Attributes:
        model_id: A hub name or a local folder.
        device_map: auto (CUDA, then MPS, then CPU), cpu, cuda or mps.
        torch_dtype: auto, float32, bfloat16, float16 or float64.
        trust_remote_code: Whether code that comes with a model may run.
        gradient_checkpointing: Whether activations are computed again in the backward pass to save memory.
    """

    model_id: str = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    device_map: str = "auto"
    torch_dtype: str = "auto"
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False


@dataclass(slots=True)
class LoRAConfig:
    """LoRA's hyper-parameters.

    Attributes:
        r: Rank.
        lora_alpha: Scale of the update: lora_alpha / r.
        lora_dropout: Dropout on the adapter's input.
        target_module_group: What is adapted.
    """

    r: int = 4
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    target_module_group: TargetModuleGroup = TargetModuleGroup.ATTENTION_ONLY

    @property
    def target_modules(self) -> list[str]:
        """The group's module names in a Llama-like model."""
        return list(_MODULES[TargetModuleGroup(self.target_module_group)])


@dataclass(slots=True)
class TrainingConfig:
    """The training loop.

    Attributes:
        per_device_train_batch_size: Rows in one forward pass.
        gradient_accumulation_steps: Forward passes that make one optimizer step.
        max_steps: Length of the run in optimizer steps.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: Largest total gradient norm.
        lr_scheduler_type: cosine, linear or constant.
        logging_steps: Steps between two lines of the event log.
        eval_steps: Steps between two validation losses; None is a tenth of the run.
        save_steps: Steps between two checkpoints; None is whenever the validation loss is computed.
        save_total_limit: How many checkpoints stay, besides the best one.
        load_best_model_at_end: Whether the adapter of the lowest validation loss is kept.
        seed: Root of all random streams.
    """

    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    max_steps: int = 1000
    learning_rate: float = 2e-4
    warmup_steps: int = 10
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine"
    logging_steps: int = 10
    eval_steps: int | None = 10
    save_steps: int | None = 50
    save_total_limit: int = 2
    load_best_model_at_end: bool = True
    seed: int = 42


@dataclass(slots=True)
class DataConfig:
    """The data.

    Attributes:
        dataset_type: The data set.
        max_length: Longest training row in tokens.
        num_samples: Training rows to use; 0 means all.
        data_dir: Folder with the data set's own files (peftlab's addition).
    """

    dataset_type: DatasetType = DatasetType.E2E_NLG
    max_length: int = 128
    num_samples: int = 0
    data_dir: str | None = None


@dataclass(slots=True)
class GradientAnalysisConfig:
    """The gradient norms.

    Attributes:
        log_frequency: Optimizer steps between two measurements.
        measure_group_norm: Whether groups are measured; always so in a run.
        measure_layer_norm: Whether each layer is measured too.
        save_format: Format of the norms' files; csv.
    """

    log_frequency: int = 1
    measure_group_norm: bool = True
    measure_layer_norm: bool = True
    save_format: str = "csv"


@dataclass(slots=True)
class EvaluationConfig:
    """Scoring on the test split.

    Attributes:
        enabled: Whether test outputs are generated and scored.
        num_samples: Test examples to score; 0 means all.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts generated together; 0 takes as many as are fast and fit the memory.
    """

    enabled: bool = True
    num_samples: int = 100
    max_new_tokens: int = 128
    batch_size: int = 32


@dataclass(slots=True)
class DynamicLoRAConfig:
    """The phases.

    Attributes:
        enabled: Whether the adapter trains in phases.
        phase_strategy: A strategy of `peftlab list strategies`.
        phase1_steps: First step and end of phase 1.
        phase2_steps: First step and end of phase 2; the end None for a strategy of two phases.
        phase3_steps: First step and end of phase 3; None is the end of the run. Not used with two phases.
    """

    enabled: bool = False
    phase_strategy: str = "both->mlp->attn"
    phase1_steps: tuple[int, int | None] = (0, 100)
    phase2_steps: tuple[int, int | None] = (100, 200)
    phase3_steps: tuple[int, int | None] = (200, None)


@dataclass(slots=True)
class ExperimentConfig:
    """One experiment, whole.

    Attributes:
        model: The base model.
        lora: LoRA's hyper-parameters.
        training: The training loop.
        data: The data.
        gradient_analysis: The gradient norms.
        evaluation: Scoring.
        dynamic_lora: The phases.
        experiment_name: Start of the run folder's name; None makes one from the final config.
        output_dir: Folder in which run folders are made.

    Example:
        >>> config = ExperimentConfig()
        >>> config.lora.r = 8
        >>> config.to_run_config().adapters[0].settings["rank"]
        8
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    gradient_analysis: GradientAnalysisConfig = field(default_factory=GradientAnalysisConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    dynamic_lora: DynamicLoRAConfig = field(default_factory=DynamicLoRAConfig)
    experiment_name: str | None = None
    output_dir: str = "./results"

    def to_run_config(self) -> RunConfig:
        """The config of peftlab that does this experiment.

        Returns:
            The config.

        Raises:
            ConfigError: A value is invalid or cannot be followed.
            ScheduleError: The phases do not fit the run.
        """
        from peftlab.experiment_translation import run_config_of

        return run_config_of(self)

    @classmethod
    def from_run_config(cls, config: RunConfig) -> ExperimentConfig:
        """Say a config of peftlab in S1's words.

        Args:
            config: The config.

        Returns:
            The experiment; its `to_run_config()` is equal to `config`.

        Raises:
            ConfigError: S1 has no words for something in it.
        """
        from peftlab.experiment_translation import experiment_of

        return experiment_of(config)


def config_to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """An experiment as JSON-ready values.

    Args:
        config: The experiment.

    Returns:
        A nested dictionary; enums as their values, tuples as lists.
    """
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def config_from_dict(data: Mapping[str, Any]) -> ExperimentConfig:
    """Read an experiment from what `config_to_dict` gave, JSON between them or not.

    Args:
        data: A nested dictionary; what is missing takes its default.

    Returns:
        The experiment.

    Raises:
        ConfigError: A key is unknown or not taken over from S1, or an enum has no such value; all at once.
    """
    problems: list[str] = []
    values = _known(ExperimentConfig, data, "", problems)
    for name, section in _SECTIONS.items():
        inner = values.get(name, {})
        if not isinstance(inner, Mapping):
            problems.append(f"'{name}' must hold keys and values, not {inner!r}")
            continue
        given = _known(section, inner, f"{name}.", problems)
        values[name] = section(
            **{key: _typed(f"{name}.{key}", value, problems) for key, value in given.items()}
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return ExperimentConfig(**values)


_SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "lora": LoRAConfig,
    "training": TrainingConfig,
    "data": DataConfig,
    "gradient_analysis": GradientAnalysisConfig,
    "evaluation": EvaluationConfig,
    "dynamic_lora": DynamicLoRAConfig,
}
_ENUMS: dict[str, type[Enum]] = {
    "data.dataset_type": DatasetType,
    "lora.target_module_group": TargetModuleGroup,
}


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value.value if isinstance(value, Enum) else value


def _known(section: Any, data: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """The keys that a class has; the others go into `problems`."""
    names = [f.name for f in fields(section)]
    for key in data:
        if key not in names:
            reason = NOT_TAKEN.get(f"{where}{key}")
            hint = f": {reason}; leave it out" if reason else did_you_mean(key, names)
            problems.append(f"unknown key '{where}{key}'{hint}")
    return {key: value for key, value in data.items() if key in names}


def _typed(path: str, value: Any, problems: list[str]) -> Any:
    """A JSON value as the class has it: enums and tuples back; what cannot be read goes into `problems`."""
    if path in _ENUMS:
        try:
            return member(_ENUMS[path], value, path)
        except ConfigError as error:
            problems.append(str(error))
    return tuple(value) if isinstance(value, list) else value


def member(kind: type[E], value: Any, path: str) -> E:
    """The member of an enum for a value.

    Args:
        kind: The enum.
        value: A member or its value.
        path: Where it stands, for the message, e.g. "lora.target_module_group".

    Returns:
        The member.

    Raises:
        ConfigError: There is none.

    Example:
        >>> member(DatasetType, "e2e_nlg", "data.dataset_type").name
        'E2E_NLG'
    """
    try:
        return kind(value)
    except ValueError:
        known = [str(each.value) for each in kind]
        raise ConfigError(
            f"'{path}': unknown value '{value}'{did_you_mean(str(value), known)};"
            f" there is: {', '.join(known)}"
        ) from None
