"""The one config tree: what a person asks for, checked before anything heavy.

`RunConfig` nests the settings of its parts. It is read from YAML, a preset, `--set a.b=c` and S1's flags, and written
resolved into the run folder; that file given back repeats the run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from peftlab.catalog import METHODS, PROBES, TASKS
from peftlab.decoding import DecodingSettings
from peftlab.files import write_text
from peftlab.schedule import Curve, PhaseSettings, Schedule, canonical_strategy, place_phases, strategy_phases
from peftlab.settings import Settings, validate

EMBEDDED_BASE = "peftlab/tiny-base"
"""Name of the base model that lies inside the package."""
EMBEDDED_TASK = "embedded"
"""Name of the task that needs no files."""


class ModelSettings(Settings):
    """The base model."""

    name: str = EMBEDDED_BASE
    """A local folder, a hub name, or `peftlab/tiny-base`, the embedded one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Type of the base's weights; auto is bfloat16 where the machine is fast at it and the method may, else float32."""
    auto_dtype: Literal["float32", "bfloat16"] | None = None
    """What auto stood for when the run was made; a run writes it, so that its file gives the same anywhere."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, mps."""
    revision: str | None = None
    """Hub revision."""
    trust_remote_code: bool = False
    """Whether code that comes with a model may run (law 8: off unless asked)."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass to save memory."""

    @property
    def weights_dtype(self) -> str:
        """The dtype's name, auto only where nobody has chosen yet."""
        return self.auto_dtype or self.dtype if self.dtype == "auto" else self.dtype


class TaskSettings(Settings):
    """The task and its data."""

    name: str = EMBEDDED_TASK
    """A task of `peftlab list tasks`, or the dotted name of your own module."""
    data_dir: Path | None = None
    """Folder with the data set's own files."""
    hub: str | None = None
    """Name of a data set on the hub, instead of a folder: org/name, or org/name:subset."""
    archive: str | None = None
    """A .zip or .tar file with the data set's files, a path or a URL, instead of a folder."""
    archive_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Checksum that the archive must have."""
    max_length: int = Field(default=128, ge=8)
    """Longest training row in tokens; longer sources are cut, targets never."""
    num_samples: int | None = Field(default=None, ge=1)
    """How many training rows to use; None means all."""
    seed: int | None = Field(default=None, ge=0)
    """Seeds which rows train, validate and test; None is training.seed. Runs of several seeds share it to be compared."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings; checked by the task, which also fills in its defaults."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return TASKS.check(name)

    @model_validator(mode="after")
    def _one_source(self) -> TaskSettings:
        given = [key for key in ("data_dir", "hub", "archive") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"the data come from one place; give one of task.{', task.'.join(given)}")
        if self.archive_sha256 is not None and self.archive is None:
            raise ValueError("archive_sha256 has no effect without task.archive; leave it out")
        return self

    @model_validator(mode="after")
    def _checked(self) -> TaskSettings:
        if self.name == EMBEDDED_TASK and not self.settings:
            return self  # it has none, and the default config is made when this file is read
        if TASKS.defines(self.name, "Settings"):
            own = TASKS.load(self.name).Settings
            filled = validate(own, self.settings, where="task.settings").model_dump(mode="json")
            object.__setattr__(self, "settings", filled)
        elif self.settings:
            raise ValueError(
                f"the task '{self.name}' has no settings of its own, so {', '.join(self.settings)} would have no effect"
            )
        return self


class AdapterSettings(Settings):
    """One adapter: its scope, its method and the method's own settings."""

    scope: str = Field(default="model", min_length=1)
    """Which part of the model it adapts: model, a tower such as encoder or vision_tower, or the path of a module."""
    method: str = "lora"
    """A method of `peftlab list methods`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The method's own settings; checked by the method, which also fills in its defaults."""

    @model_validator(mode="after")
    def _checked(self) -> AdapterSettings:
        leaf = METHODS.load(self.method)
        filled = validate(leaf.Settings, self.settings, where="method").model_dump(mode="json")
        object.__setattr__(self, "method", METHODS.check(self.method))
        object.__setattr__(self, "settings", filled)
        return self


class ScheduleSettings(Settings):
    """Which tensors train when."""

    strategy: str | None = None
    """A strategy of `peftlab list strategies`; None means all adapters train all the time."""
    phase1_end: int | None = Field(default=None, ge=1)
    """Step at which the strategy's first phase ends; None divides the run evenly."""
    phase2_end: int | None = Field(default=None, ge=1)
    """Step at which the strategy's second phase ends."""
    phases: tuple[PhaseSettings, ...] = ()
    """Phases of your own, instead of a strategy."""

    @field_validator("strategy")
    @classmethod
    def _known(cls, strategy: str | None) -> str | None:
        return None if strategy is None else canonical_strategy(strategy)

    @model_validator(mode="after")
    def _one_source(self) -> ScheduleSettings:
        if self.strategy and self.phases:
            raise ValueError("give schedule.strategy or schedule.phases, not both")
        if not self.strategy and (self.phase1_end or self.phase2_end):
            raise ValueError("phase1_end and phase2_end need schedule.strategy (--phase_strategy)")
        return self


Layout = Literal["auto", "padded", "grouped", "packed"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrainingSettings(Settings):
    """The training loop."""

    max_steps: int = Field(default=1000, ge=1)
    """Length of the run in optimizer steps."""
    batch_size: int = Field(default=16, ge=1)
    """Rows in one forward pass of one process."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes whose gradients make one optimizer step."""
    layout: Layout = "auto"
    """How the rows of a batch lie: padded to the longest, grouped by length and padded, packed without pads, or auto, the
    cheapest that this model is shown to compute alike."""
    trunk_cache_gigabytes: float = Field(default=4.0, ge=0, allow_inf_nan=False)
    """Most that kept hidden states may take on disk: of frozen blocks below all that trains, read again in later passes over
    the same rows; 0 keeps none."""
    auto_batch_size: bool = False
    """Whether both are chosen anew, with the same product, so that the longest batch fits into memory."""
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear warm-up."""
    curve: Curve = "cosine"
    """How the learning rate falls after the warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest total gradient norm; 0 turns clipping off."""
    validation_steps: int | None = Field(default=None, ge=1)
    """Steps between two validation losses; None is a tenth of the run."""
    validation_rows: int = Field(default=256, ge=1)
    """How many validation rows the loss is computed on, a seeded choice."""
    save_steps: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints; None is whenever the validation loss is computed."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints stay, besides the best one."""
    select_best: bool = True
    """Whether the adapter of the lowest validation loss is kept, else the last one."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a lower loss; None never stops early."""
    log_steps: int = Field(default=1, ge=1)
    """Steps between two lines of the event log."""
    trackers: tuple[Tracker, ...] = ()
    """Experiment trackers, passed on to transformers; each needs its own package."""
    seed: int = Field(default=42, ge=0)
    """Root of all random streams."""


class EvaluationSettings(DecodingSettings):
    """Scoring on the test split, and how answers are decoded."""

    enabled: bool = True
    """Whether test outputs are generated and scored."""
    before: bool = True
    """Whether the base is scored too, before training."""
    num_samples: int | None = Field(default=None, ge=1)
    """How many test examples to score; None means all."""
    batch_size: int | None = Field(default=None, ge=1)
    """Prompts generated together; None takes as many as are fast and fit the memory."""

    @model_validator(mode="after")
    def _has_effect(self) -> EvaluationSettings:
        if not self.enabled and self.num_samples is not None:
            raise ValueError("num_samples (--eval_samples) has no effect where evaluation is off (--no_eval)")
        if not self.enabled and self.perplexity:
            raise ValueError("perplexity has no effect where evaluation is off (--no_eval)")
        return self


class OutputSettings(Settings):
    """Where the run folder goes."""

    directory: Path = Path("runs")
    """Folder in which run folders are made."""
    name: str | None = None
    """Start of the run folder's name; None makes one from the config."""

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str | None) -> str | None:
        if name is not None and (not name or name != Path(name).name or name.startswith(".")):
            raise ValueError(
                "a name must be one plain folder name; the folder to put it in is output.directory"
            )
        return name


class RunConfig(Settings):
    """One run, whole."""

    model: ModelSettings = ModelSettings()
    task: TaskSettings = TaskSettings()
    adapters: tuple[AdapterSettings, ...] = Field(default=(AdapterSettings(),), min_length=1)
    """What is added and trained, one adapter for each scope."""
    schedule: ScheduleSettings = ScheduleSettings()
    training: TrainingSettings = TrainingSettings()
    probes: dict[str, dict[str, Any]] = Field(default={"gradient_norms": {}})
    """Measurements during training, by name, with their settings."""
    evaluation: EvaluationSettings = EvaluationSettings()
    output: OutputSettings = OutputSettings()

    @model_validator(mode="before")
    @classmethod
    def _single_method(cls, values: Any) -> Any:
        """Read `method: {name: lora, rank: 8}` as the single adapter."""
        if not isinstance(values, Mapping) or "method" not in values:
            return values
        if "adapters" in values:
            raise ValueError("give 'method' (one adapter) or 'adapters' (a list), not both")
        rest = dict(values)
        method = rest.pop("method")
        if not isinstance(method, Mapping):
            raise ValueError(f"'method' must be a mapping such as {{name: lora, rank: 8}}, not {method!r}")
        settings = dict(method)
        return rest | {"adapters": [{"method": settings.pop("name", "lora"), "settings": settings}]}

    @field_validator("adapters")
    @classmethod
    def _one_for_each_scope(cls, adapters: tuple[AdapterSettings, ...]) -> tuple[AdapterSettings, ...]:
        scopes = [adapter.scope for adapter in adapters]
        twice = sorted({scope for scope in scopes if scopes.count(scope) > 1})
        if twice:
            raise ValueError(
                f"{len(scopes)} adapters for the scopes {', '.join(scopes)}: each scope has one, {twice[0]} has several"
            )
        return adapters

    @field_validator("probes")
    @classmethod
    def _known_probes(cls, probes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            PROBES.check(name): validate(
                PROBES.load(name).Settings, settings or {}, where=f"probes.{name}"
            ).model_dump(mode="json")
            for name, settings in probes.items()
        }

    @model_validator(mode="after")
    def _phases_fit(self) -> RunConfig:
        self.make_schedule()
        return self

    def make_schedule(self) -> Schedule:
        """The phases and the learning-rate curve of this run.

        Returns:
            The schedule; one phase with everything where neither a strategy nor phases are given.

        Raises:
            ScheduleError: The phases do not fit the run.
        """
        asked, steps = self.schedule, self.training.max_steps
        phases = asked.phases
        if asked.strategy:
            phases = strategy_phases(
                asked.strategy, total_steps=steps, ends=(asked.phase1_end, asked.phase2_end)
            )
        return Schedule(
            place_phases(phases, total_steps=steps),
            steps,
            self.training.learning_rate,
            self.training.warmup_steps,
            self.training.curve,
        )

    @property
    def data_seed(self) -> int:
        """Seeds which rows train, validate and test."""
        return self.training.seed if self.task.seed is None else self.task.seed

    def fingerprint(self) -> str:
        """Eight hexadecimal digits of everything but where the output goes: equal configs, equal fingerprints."""
        plain = self.model_dump(mode="json", exclude={"output": True, "model": {"auto_dtype"}})
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]

    def run_name(self) -> str:
        """The run folder's name, made from the final config: `{name}-{fingerprint}`."""
        parts = [self.task.name.rpartition(".")[2]]
        for adapter in self.adapters:
            targets = (
                adapter.settings.get("targets") or ""
            )  # some methods have none, some choose them themselves
            parts += [adapter.method, targets if isinstance(targets, str) else "+".join(targets)]
            parts += [adapter.scope] if adapter.scope != "model" else []
        parts.append((self.schedule.strategy or "").replace("->", "-"))
        stem = self.output.name or re.sub(r"[^\w+.-]+", "-", "-".join(p for p in parts if p))[:80]
        return f"{stem}-{self.fingerprint()}"

    def to_yaml(self) -> str:
        """The whole config as YAML, every default written out."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> Path:
        """Write the config as YAML.

        Args:
            path: Where.

        Returns:
            The path.

        Raises:
            OutputError: It cannot be written.
        """
        return write_text(path, self.to_yaml())


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Check values and build the config.

    Args:
        values: A nested mapping as read from YAML.

    Returns:
        The config.

    Raises:
        ConfigError: Something is unknown or invalid; all problems at once.

    Example:
        >>> build_config({"training": {"max_steps": 10}}).training.max_steps
        10
    """
    return validate(RunConfig, values)
