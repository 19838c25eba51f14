"""The runs of an experiment: each arm with each seed, alike in everything but what the arm is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peftlab.config import RunConfig, build_config
from peftlab.errors import ConfigError
from peftlab.run import RunFolder
from peftlab.study.settings import StudySettings

Arms = Mapping[str, Mapping[str, Any]]
_ALIKE = (
    "model.name",
    "task",
    "training.max_steps",
    "training.batch_size",
    "training.accumulation_steps",
    "training.validation_steps",
    "training.validation_rows",
    "evaluation",
)
"""What must be the same in all runs for their scores and costs to be compared."""
_RATE = "training.learning_rate"
NUM_VALIDATIONS = 4


class Study(Protocol):
    """A leaf of `experiments/` that the machine carries out (a module satisfies this)."""

    QUESTION: str
    Settings: type[StudySettings]

    def arms(self, settings: Any) -> Arms:
        """What is compared.

        Args:
            settings: What was set.

        Returns:
            For each arm the dotted config keys in which it differs and their values. `method.name` also lays aside the
            settings that the preset has for another method.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of an experiment.

    Attributes:
        arm: What it stands for.
        seed: Its seed.
        config: The whole config; its folder follows from it.
    """

    arm: str
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Where the run lies, or will."""
        return self.config.output.directory / self.config.run_name()


def plan_runs(
    arms: Arms,
    settings: StudySettings,
    directory: Path,
    *,
    seeds: tuple[int, ...] | None = None,
    factors: Mapping[str, float] | None = None,
    steps: int | None = None,
    scored: bool = True,
) -> list[PlannedRun]:
    """The runs of all arms and seeds.

    Args:
        arms: What is compared.
        settings: What was set.
        directory: The folder of the runs.
        seeds: The seeds; the settings' own where None.
        factors: Factor on the learning rate by arm; 1 where there is none.
        steps: Steps of each; the settings' own where None.
        scored: Whether test answers are scored.

    Returns:
        The runs, seed by seed.

    Raises:
        ConfigError: A config is not valid, or the arms differ in what would make them unfair.
    """
    if len(arms) < 2:
        raise ConfigError(f"a comparison needs two arms or more, got {', '.join(arms) or 'none'}")
    planned = [
        PlannedRun(
            arm,
            seed,
            make_config(arm, changes, settings, directory, seed=seed, steps=steps, scored=scored,
                         factor=(factors or {}).get(arm, 1.0)),
        )
        for seed in (seeds or settings.seeds)
        for arm, changes in arms.items()
    ]  # fmt: skip
    check_alike(planned, arms)
    return planned


def check_alike(planned: list[PlannedRun], arms: Arms) -> None:
    """Refuse runs that differ in more than their arms say, or in what decides data, effort or decoding.

    Args:
        planned: The runs.
        arms: What is compared.

    Raises:
        ConfigError: They do; names arms and keys.
    """
    said = {key for changes in arms.values() for key in changes} | {_RATE}
    if any(key == "method" or key.startswith("method.") for key in said):
        said |= {"adapters"}
    by_seed: dict[int, list[PlannedRun]] = {}
    for run in planned:
        by_seed.setdefault(run.seed, []).append(run)
    for runs in by_seed.values():
        first = runs[0]
        for other in runs[1:]:
            for key, (one, two) in _differences(first.config, other.config):
                unfair = any(_inside(key, place) for place in _ALIKE)
                if unfair or not any(_inside(key, place) for place in said):
                    raise ConfigError(
                        f"{first.arm} and {other.arm} would not be compared fairly: {key} is {one!r} and {two!r};"
                        + (
                            " data, steps, rows of a step and decoding must be the same"
                            if unfair
                            else " the experiment does not say that they differ in it"
                        )
                    )


def make_config(
    arm: str,
    changes: Mapping[str, Any],
    settings: StudySettings,
    directory: Path,
    *,
    seed: int,
    factor: float = 1.0,
    steps: int | None = None,
    scored: bool = True,
    before: bool = False,
) -> RunConfig:
    """The config of one run.

    Args:
        arm: What it stands for; its folder's name begins with it.
        changes: Dotted config keys and their values, laid over the settings' config and preset.
        settings: What was set.
        directory: The folder of the runs.
        seed: Its seed.
        factor: On the learning rate.
        steps: Its steps; the settings' own where None.
        scored: Whether test answers are scored.
        before: Whether the base's are too.

    Returns:
        The config.

    Raises:
        ConfigError: It is not valid; names the arm.
    """
    from peftlab.commands.overlay import lay_over, put
    from peftlab.commands.sources import read_preset

    values = lay_over(read_preset(settings.preset) if settings.preset else {}, settings.config)
    if settings.model is not None:
        put(values, "model.name", settings.model)
    upper: dict[str, Any] = {}
    for key, value in changes.items():
        put(upper, key, value)
    values = lay_over(values, upper)
    training = dict(values.get("training") or {})
    whole = steps or settings.max_steps or int(training.get("max_steps", build_config({}).training.max_steps))
    training |= {"max_steps": whole, "seed": seed}
    if steps is not None or settings.max_steps is not None or "validation_steps" not in training:
        training |= {"validation_steps": max(1, whole // NUM_VALIDATIONS), "warmup_steps": whole // 20}
    if factor != 1.0:
        rate = training.get("learning_rate", build_config({}).training.learning_rate)
        training["learning_rate"] = float(f"{rate * factor:.3g}")
    values["training"] = training
    put(values, "task.seed", settings.data_seed)
    evaluation = dict(values.get("evaluation") or {})
    if scored:
        evaluation |= {"enabled": True, "before": before}
        evaluation |= {} if settings.eval_samples is None else {"num_samples": settings.eval_samples}
    else:
        evaluation = {"enabled": False}
    values["evaluation"] = evaluation
    values["output"] = {"directory": str(directory), "name": f"{_plain(arm)}-seed{seed}"}
    try:
        config = build_config(values)
    except ConfigError as error:
        raise ConfigError(f"{arm}: {error}") from None
    return _under_its_name(config)


def _under_its_name(config: RunConfig) -> RunConfig:
    """The config with the name of a run that is the same to the fingerprint, where another experiment has made one."""
    end = f"-{config.fingerprint()}"
    there = sorted(
        p.name for p in config.output.directory.glob(f"*{end}") if (p / RunFolder.CONFIG).is_file()
    )
    if not there or config.run_name() in there:
        return config
    output = config.output.model_copy(update={"name": there[0].removesuffix(end)})
    return config.model_copy(update={"output": output})


def _plain(arm: str) -> str:
    """An arm's name as the start of a folder's."""
    return "".join(c if c.isalnum() or c in "_+-." else "-" for c in arm).strip("-.") or "arm"


def _differences(one: RunConfig, other: RunConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The dotted keys in which two configs differ, without where results go."""
    from peftlab.commands.overlay import leaves

    flat = []
    for config in (one, other):
        plain = config.model_dump(mode="json", exclude={"output"})
        flat.append({key: value for name, inner in plain.items() for key, value in leaves(name, inner)})
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        pair = flat[0].get(key), flat[1].get(key)
        if pair[0] != pair[1]:
            yield key, pair


def _inside(key: str, place: str) -> bool:
    """Whether a key is a place or lies inside it."""
    return key == place or key.startswith(f"{place}.")
