"""The efficient fine-tuning document's efficiency score, mended: four measured values against those of a baseline.

The document adds `0.4 trainable/total parameters + 0.3 trainable/total memory + 0.2 seconds per epoch + 0.1 metrics`. Three
things are wrong with that sum. More parameters, more memory and slower epochs raise it; seconds are added to shares, so
that an epoch of 120 s outweighs everything else (full fine-tuning 24.8, LoRA at 60 s 12.1); and memory is four bytes per
trained parameter, where gradients, optimizer, activations and the frozen base are what fills a device.

Here each part compares one measured value with the same value of a baseline, mostly full fine-tuning:

    share = theirs / (own + theirs)        where lower is better (parameters, bytes, seconds)
    share = own / (own + theirs)           where higher is better (most metrics)
    efficiency_score = 0.4 parameters + 0.3 memory + 0.2 speed + 0.1 performance

Every share lies between 0 and 1, has no unit, rises whenever its value gets better, and is 0.5 where the method equals the
baseline; so the baseline scores 0.5, and a method above it is better by the document's weights. The weights are the
document's, and a matter of taste: performance counts least. Read the parts.

Source: the document's section "Evaluation Metrics".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peftlab.comparison import evaluation_of, metrics_of
from peftlab.errors import DataError, UnknownNameError
from peftlab.run import RunFolder

WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        "parameter_efficiency": 0.4,
        "memory_efficiency": 0.3,
        "training_speed": 0.2,
        "model_performance": 0.1,
    }
)
"""What each part counts, as in the document."""
_SAME = (
    ("model", "name"),
    ("model", "dtype"),
    ("task",),
    ("training", "batch_size"),
    ("training", "accumulation_steps"),
    ("evaluation",),
)
"""What must be the same in two configs for their numbers to be compared."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one method.

    Attributes:
        trainable_parameters: Parameters it trains.
        peak_memory: The most bytes that training held.
        time_per_epoch: Seconds for all training rows once.
        performance: Its score on the test split, not negative.
        higher_is_better: Whether a higher score is a better one.

    Raises:
        DataError: A value is negative or not finite, or nothing was trained, held or taken.
    """

    trainable_parameters: int
    peak_memory: float
    time_per_epoch: float
    performance: float
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        for name in ("trainable_parameters", "peak_memory", "time_per_epoch", "performance"):
            value = getattr(self, name)
            lowest_is_wrong = name != "performance" and value == 0
            if not math.isfinite(value) or value < 0 or lowest_is_wrong:
                wanted = "0 or more" if name == "performance" else "more than 0"
                raise DataError(
                    f"{name} is {value}; a measured value that is {wanted} and finite is expected"
                )


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How a method compares with a baseline; every part between 0 and 1, 0.5 where they are equal, higher is better.

    Attributes:
        parameter_efficiency: Of the trained parameters.
        memory_efficiency: Of the peak memory.
        training_speed: Of the time per epoch.
        model_performance: Of the score on the test split.
    """

    parameter_efficiency: float
    memory_efficiency: float
    training_speed: float
    model_performance: float

    @property
    def efficiency_score(self) -> float:
        """The weighted sum of the four, between 0 and 1."""
        return math.fsum(weight * getattr(self, name) for name, weight in WEIGHTS.items())


def score_efficiency(own: Measured, baseline: Measured) -> Efficiency:
    """Compare a method with a baseline.

    Args:
        own: What was measured of the method.
        baseline: The same of the baseline, in the same units and under the same conditions.

    Returns:
        The four parts; `.efficiency_score` is their weighted sum.

    Raises:
        DataError: The two scores point in different directions.

    Example:
        >>> full = Measured(100, 8e9, 120.0, 0.80)
        >>> round(score_efficiency(full, full).efficiency_score, 3)
        0.5
        >>> lora = Measured(1, 4e9, 60.0, 0.80)
        >>> round(score_efficiency(lora, full).efficiency_score, 3)
        0.779
    """
    if own.higher_is_better != baseline.higher_is_better:
        raise DataError("a higher score is better for one of the two only; give both the same metric")
    scores = own.performance, baseline.performance
    return Efficiency(
        _share(baseline.trainable_parameters, own.trainable_parameters),
        _share(baseline.peak_memory, own.peak_memory),
        _share(baseline.time_per_epoch, own.time_per_epoch),
        _share(*scores) if own.higher_is_better else _share(*reversed(scores)),
    )


def measure_efficiency(run_folder: RunFolder | str | Path, metric: str | None = None) -> Measured:
    """Read from a finished run what the score is made of.

    Args:
        run_folder: A run folder.
        metric: A metric of the run's task; the task's first where None.

    Returns:
        The measured values. `peak_memory` is the device's where there is one, else the whole process's. `time_per_epoch`
        is the mean over the steps of the last start, without validation and saving.

    Raises:
        DataError: The run is not finished, was not scored, or holds no speed.
        UnknownNameError: The run has no such metric.
        RunError: A file is damaged.
    """
    run = run_folder if isinstance(run_folder, RunFolder) else RunFolder(run_folder)
    if not run.path.is_dir() or not run.has(RunFolder.SUMMARY):
        raise DataError(f"{run.path} is no finished run; the efficiency of a method is read from its results")
    found = metrics_of(evaluation_of(run), "after")
    if not found:
        raise DataError(f"{run.path} was not scored after training; run it without --no_eval")
    if metric is not None and metric not in found:
        raise UnknownNameError("metric of this run", metric, found)
    score = found[metric or next(iter(found))]
    summary = run.summary()
    memory, rate = summary["peak_memory_bytes"], summary["tokens_per_second"]
    steps = [event for event in run.timeline() if event["event"] == "step"]
    if not rate or not steps:
        raise DataError(f"{run.path} has not logged how fast it trained")
    tokens_per_step = steps[-1]["tokens"] / steps[-1]["step"]
    return Measured(
        trainable_parameters=summary["counts"]["trainable_parameters"],
        peak_memory=memory["host"] if memory["device"] is None else memory["device"],
        time_per_epoch=tokens_per_step / rate * run.preflight["steps"]["per_epoch"],
        performance=score["value"],
        higher_is_better=score["higher_is_better"],
    )


def compare_efficiency(
    run_folder: RunFolder | str | Path, baseline: RunFolder | str | Path, metric: str | None = None
) -> Efficiency:
    """Score a run against a baseline run, mostly one of the method `full`.

    Args:
        run_folder: The run.
        baseline: The run to compare it with.
        metric: A metric of their task; the task's first where None.

    Returns:
        The four parts; `.efficiency_score` is their weighted sum.

    Raises:
        DataError: One is not finished or not scored, or they did not run under the same conditions; lists what differs.
        UnknownNameError: The runs have no such metric.
        RunError: A file is damaged.
    """
    runs = [r if isinstance(r, RunFolder) else RunFolder(r) for r in (run_folder, baseline)]
    own, theirs = (measure_efficiency(run, metric) for run in runs)
    conditions = [_conditions(run) for run in runs]
    differing = [
        f"{name} ({conditions[0][name]} and {conditions[1][name]})"
        for name in conditions[0]
        if conditions[0][name] != conditions[1][name]
    ]
    if differing:
        raise DataError(
            f"{runs[0].name} and {runs[1].name} cannot be compared: {'; '.join(differing)} differ"
        )
    return score_efficiency(own, theirs)


def _share(above: float, below: float) -> float:
    """One value as its share of two; a half where both are 0."""
    largest = max(above, below)
    return 0.5 if largest == 0 else (above / largest) / (above / largest + below / largest)


def _conditions(run: RunFolder) -> dict[str, Any]:
    """What must be the same for two runs' numbers to be compared, by name."""
    found: dict[str, Any] = {}
    for keys in _SAME:
        value: Any = run.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        found |= (
            {f"{keys[0]}.{name}": inner for name, inner in value.items()}
            if isinstance(value, Mapping)
            else {".".join(keys): value}
        )
    hardware = run.environment["hardware"]
    found |= {
        f"hardware {name}": hardware.get(name) for name in ("processor", "threads", "devices", "processes")
    }
    found["memory measured on"] = "host" if run.summary()["peak_memory_bytes"]["device"] is None else "device"
    return found
