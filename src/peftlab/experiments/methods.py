"""Which method does best on one base and task: scores, parameters, seconds and memory of each, at its best learning rate.

All methods see the same rows in the same order for the same number of steps and are asked in the same way. The learning rate
of each is the one of the lowest validation loss after shorter runs, as many for every method; the test examples are looked
at for the table alone. Each run has a process of its own, so that its peak of memory is its own. With one seed no winner is
named: the intervals are of the test examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from peftlab.catalog import METHODS
from peftlab.config import RunConfig, build_config
from peftlab.errors import ConfigError, InputError
from peftlab.files import write_json, write_text
from peftlab.run_series import carry_out_run as _carry_out
from peftlab.run_series import choose_lowest, edge_note, rate_rows, render_markdown
from peftlab.settings import Settings as _Settings
from peftlab.tables import render_text, show_bytes, show_count, show_score, show_seconds

_FACTORS = (0.32, 1.0, 3.2)
_WITHOUT_SETTINGS = ("peft",)  # its type has no default: it is tried where it is named with one


class Settings(_Settings):
    """What can be set on the comparison."""

    model: str | None = None
    """A model's folder or hub name; none is the preset's."""
    preset: str = "embedded"
    """The preset that gives task, rows, steps and batch size; its method and schedule are left out."""
    methods: tuple[str, ...] = ()
    """The methods; none is all that need no settings and apply to the model."""
    factors: tuple[float, ...] = _FACTORS
    """Factors on the learning rate that a method begins with: the preset's times the method's `RATE_TO_LORA`."""
    max_steps: int | None = Field(default=None, ge=1)
    """Steps of each run; none is the preset's."""
    choosing_steps: int | None = Field(default=None, ge=1)
    """Steps of the runs that choose a learning rate; none is a third of a run's."""
    eval_samples: int | None = Field(default=None, ge=1)
    """Test examples; none is all."""
    seed: int = Field(default=42, ge=0)
    """Seeds the order of rows, the adapters and dropout."""
    runs: Path | None = None
    """Folder with the runs of an earlier try; what is finished there is not done again."""

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(METHODS.check(name) for name in methods)

    @field_validator("factors")
    @classmethod
    def _positive(cls, factors: tuple[float, ...]) -> tuple[float, ...]:
        if not factors or min(factors) <= 0:
            raise ValueError("at least one factor above 0 is needed")
        return factors


def carry_out(settings: Settings, folder: Path, show: Callable[[str], object]) -> list[Path]:
    """Train every method and compare.

    Args:
        settings: What was set.
        folder: Where runs and tables go.
        show: Is given each text for a person.

    Returns:
        `table.md` and `methods.json`.

    Raises:
        InputError: No method applies.
        RunError: A run failed; the others stay and are not done again where `runs` names them.
    """
    directory = (settings.runs or folder / "runs").expanduser().absolute()
    tried: dict[str, list[dict[str, Any]]] = {}
    done: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name in settings.methods or _plain_methods():
        reason = _refusal(_config(settings, name, settings.factors[0], directory))
        if reason:
            refused[name] = reason
            show(f"{name}: left out: {reason}")
            continue
        tried[name] = []
        for factor in settings.factors if len(settings.factors) > 1 else ():
            config = _config(settings, name, factor, directory, choosing=True)
            tried[name].append(_carry_out(config, folder / "configs") | {"factor": factor})
            rate, loss = config.training.learning_rate, tried[name][-1]["validation_loss"]
            show(f"{name}: learning rate {rate:g}: validation loss {loss:.4f}")
        lowest = choose_lowest(tried[name]) or {"factor": settings.factors[0]}
        done[name] = _carry_out(_config(settings, name, lowest["factor"], directory), folder / "configs")
        show(f"{name}: {done[name]['steps']} steps in {show_seconds(done[name]['seconds'])}")
    if not done:
        raise InputError("no method applies: " + "; ".join(f"{n}: {reason}" for n, reason in refused.items()))
    return _write(folder, done, tried, refused, show)


def _plain_methods() -> tuple[str, ...]:
    """The methods that need no settings."""
    return tuple(name for name in METHODS.names() if name not in _WITHOUT_SETTINGS)


def _config(
    settings: Settings, name: str, factor: float, directory: Path, *, choosing: bool = False
) -> RunConfig:
    """The config of one run.

    Args:
        settings: What was set.
        name: The method.
        factor: On the learning rate that it begins with.
        directory: Where the run goes.
        choosing: Whether it is one of the shorter runs that choose the learning rate.

    Returns:
        The config.
    """
    from peftlab.commands.sources import read_preset

    values = read_preset(settings.preset)
    values.pop("schedule", None)
    leaf = METHODS.load(name)
    rate = values["training"]["learning_rate"] * getattr(leaf, "RATE_TO_LORA", 1.0)
    method = {"name": name}
    if "dropout" in leaf.Settings.model_fields:
        method["dropout"] = values.get("method", {}).get("dropout", 0.0)
    values["method"] = method
    values["training"] |= {
        "learning_rate": float(f"{rate * factor:.2g}"),
        "seed": settings.seed,
    }
    steps = settings.max_steps or int(values["training"]["max_steps"])
    if choosing:
        steps = settings.choosing_steps or max(1, steps // 3)
    values["training"] |= {
        "max_steps": steps, "warmup_steps": steps // 20, "validation_steps": max(1, steps // 4)
    }  # fmt: skip
    if settings.model is not None:
        values["model"] = {"name": settings.model}
    values["evaluation"] = (
        {"enabled": False} if choosing else {"before": False, "num_samples": settings.eval_samples}
    )
    values["output"] = {"directory": str(directory), "name": name}
    return build_config(values)


def _refusal(config: RunConfig) -> str:
    """Why a method cannot be run here; "" where it can."""
    from peftlab.errors import MethodError, TargetError
    from peftlab.resolve import resolve

    try:
        resolve(config)
    except (MethodError, TargetError, ConfigError) as error:
        return str(error)
    return ""


def _write(
    folder: Path,
    done: Mapping[str, dict[str, Any]],
    tried: Mapping[str, list[dict[str, Any]]],
    refused: Mapping[str, str],
    show: Callable[[str], object],
) -> list[Path]:
    """Write and show the tables."""
    rows = list(_rows(done))
    choices = rate_rows(tried)
    notes = [f"Left out: {name}: {reason}" for name, reason in refused.items()]
    notes += edge_note(tried)
    notes.append("One seed: no winner is named. Intervals: 95 %, bootstrap over the test examples.")
    show(render_text(rows, title="\nlowest validation loss first"))
    for note in notes:
        show(note)
    parts = [
        render_markdown(rows),
        *(["Learning rates, after shorter runs:", render_markdown(choices)] if choices[1:] else []),
    ]
    table, numbers = folder / "table.md", folder / "methods.json"
    write_text(table, "\n\n".join([*parts, *notes]) + "\n")
    write_json(numbers, {"done": dict(done), "tried": dict(tried), "refused": dict(refused)})
    return [table, numbers]


def _rows(done: Mapping[str, dict[str, Any]]) -> Iterator[list[str]]:
    """The table, lowest validation loss first."""
    names = list(dict.fromkeys(metric for result in done.values() for metric in result["metrics"]))
    yield [
        "method", "learning rate", "validation loss", *names, "trainable", "time", "tokens/s", "peak memory", "adapter"
    ]  # fmt: skip
    for name, result in sorted(done.items(), key=lambda item: item[1]["validation_loss"]):
        yield [
            name,
            f"{result['learning_rate']:g}",
            f"{result['validation_loss']:.4f}",
            *(show_score(result["metrics"].get(metric)) for metric in names),
            show_count(result["trainable_parameters"], of=result["total_parameters"]),
            show_seconds(result["seconds"]),
            f"{result['tokens_per_second']:,.0f}",
            show_bytes(result["peak_memory_bytes"]),
            show_bytes(result["adapter_bytes"]),
        ]
