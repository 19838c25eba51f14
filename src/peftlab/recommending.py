"""Which method to begin with: the document's rule, and what finished runs say of it.

The rule is a rule of thumb for a kind of task. Runs on one's own data are evidence, of the kind that they are: of one seed
each they name no method better, of three they may.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftlab.comparison import evaluation_of, metrics_of
from peftlab.efficiency import compare_efficiency
from peftlab.errors import DataError
from peftlab.method_guide import Recommendation
from peftlab.method_guide import recommend as _rule
from peftlab.run import RunFolder

LEAST_SEEDS = 3
_FULL = "full"


def recommend(task_type: str, runs: str | Path | Sequence[str | Path] | None = None) -> Recommendation:
    """The document's rule of thumb for a kind of task and, where runs are given, what they say.

    Args:
        task_type: "general", "language", "complex" or "generation".
        runs: A folder with run folders, or run folders.

    Returns:
        The method and its settings; `evidence` has one sentence for each task and base that the runs are of.

    Raises:
        UnknownNameError: There is no such kind of task.
        DataError: A folder is not there.
        RunError: A file of a run is damaged.

    Example:
        >>> recommend("language").method, recommend("language").name
        ('ptuning', 'p_tuning')
    """
    advice = _rule(task_type)
    return advice if runs is None else replace(advice, evidence=tuple(weigh_runs(_find(runs))))


def weigh_runs(runs: Sequence[RunFolder]) -> list[str]:
    """What finished runs of several methods say.

    Args:
        runs: The runs; those that have not finished, have several adapters or were not scored are passed over.

    Returns:
        One sentence for each task and base with two methods or more.
    """
    groups: dict[tuple[str, str], dict[str, list[RunFolder]]] = {}
    for run in runs:
        config: Mapping[str, Any] = run.config if run.has_ended and run.has(RunFolder.SUMMARY) else {}
        adapters = config.get("adapters", [])
        if len(adapters) == 1 and metrics_of(evaluation_of(run), "after"):
            place = str(config["task"]["name"]), str(config["model"]["name"])
            groups.setdefault(place, {}).setdefault(str(adapters[0]["method"]), []).append(run)
    return [_sentence(*place, methods) for place, methods in groups.items() if len(methods) > 1]


def _sentence(task: str, model: str, methods: Mapping[str, list[RunFolder]]) -> str:
    """What the runs of one task and base say."""
    first = metrics_of(evaluation_of(next(iter(methods.values()))[0]), "after")
    name, score = next(iter(first.items()))
    values = {
        method: [float(found[name]["value"]) for run in runs if name in (found := metrics_of(evaluation_of(run), "after"))]
        for method, runs in methods.items()
    }  # fmt: skip
    means = {method: statistics.fmean(found) for method, found in values.items() if found}
    order = sorted(means, key=lambda method: means[method], reverse=bool(score["higher_is_better"]))
    told = ", ".join(f"{m} {means[m]:.3g} (of {len(values[m])}){_efficiency(m, methods)}" for m in order)
    fewest = min(len(values[method]) for method in order)
    limit = (
        f"; with {fewest} run{'s' * (fewest > 1)} of a method none is named better"
        if fewest < LEAST_SEEDS
        else "; whether the first is better, `peftlab experiment methods` tests"
    )
    return f"{task} on {model}, {name}: {told}{limit}"


def _efficiency(method: str, methods: Mapping[str, list[RunFolder]]) -> str:
    """The efficiency score against full fine-tuning, where one run of it was made under the same conditions."""
    pairs = [(own, full) for own in methods[method] for full in methods.get(_FULL, ()) if method != _FULL]
    found = next((score for score in (_score(own, full) for own, full in pairs) if score is not None), None)
    return "" if found is None else f", efficiency {found:.2f} (full: 0.50)"


def _score(own: RunFolder, full: RunFolder) -> float | None:
    """The efficiency score; None where the two ran under other conditions."""
    try:
        return compare_efficiency(own, full).efficiency_score
    except DataError:
        return None


def _find(runs: str | Path | Sequence[str | Path]) -> list[RunFolder]:
    """The run folders that are meant."""
    if not isinstance(runs, str | Path):
        return [RunFolder(run) for run in runs]
    folder = Path(runs).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one that holds run folders, or run folders")
    found = RunFolder.all_in(folder)
    return found or [RunFolder(folder)]
