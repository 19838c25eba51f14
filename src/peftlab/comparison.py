"""What is compared between runs: settings that differ, results, and what stands in the way of comparing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.run import RunFolder
from peftlab.tables import show_bytes, show_count, show_score, show_seconds

_NOT_SETTINGS = ("output",)
"""Sections of the config that say where results go, not what is done."""
_ABSENT = "-"
"""Stands for what a run does not have: no such setting, or one that is not set; no result yet."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        labels: One per run, different from each other.
        runs: The runs.
        settings: Table of the settings that differ; only a header where none does.
        results: Table of what came out.
        notes: What stands against comparing the numbers.
    """

    labels: list[str]
    runs: list[RunFolder]
    settings: list[list[Any]]
    results: list[list[Any]]
    notes: list[str]

    @property
    def rows(self) -> list[list[Any]]:
        """Settings that differ and results in one table."""
        return [*self.settings, *self.results[1:]]


def compare_runs(folders: Sequence[str | Path | RunFolder]) -> Comparison:
    """Put several runs side by side.

    Args:
        folders: The runs, finished or not.

    Returns:
        The comparison; "-" stands where a run has no such number yet.

    Raises:
        RunError: A file is damaged.
    """
    runs = [f if isinstance(f, RunFolder) else RunFolder(f) for f in folders]
    labels = _labels(runs)
    header = ["", *labels]
    return Comparison(
        labels=labels,
        runs=runs,
        settings=[header, *differing_settings(runs)],
        results=[header, *result_rows(runs)],
        notes=find_obstacles(runs),
    )


def _labels(runs: Sequence[RunFolder]) -> list[str]:
    """Names of runs; with more of the path, or a number, where names are the same."""
    names = [run.name for run in runs]
    longer = [f"{run.path.absolute().parent.name}/{run.name}" for run in runs]
    chosen = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
    return [f"{c} ({i + 1})" if chosen.count(c) > 1 else c for i, c in enumerate(chosen)]


def differing_settings(runs: Sequence[RunFolder]) -> list[list[Any]]:
    """The settings that are not the same in all runs.

    Args:
        runs: The runs.

    Returns:
        Rows of dotted key and one value per run.

    Raises:
        RunError: A config is damaged.
    """
    flat = [_flatten(run.config) if run.has(RunFolder.CONFIG) else {} for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [[key, *(settings.get(key, _ABSENT) for settings in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1 and row[0].partition(".")[0] not in _NOT_SETTINGS]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted key to text."""
    if isinstance(value, Mapping):
        pairs = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, (Mapping, list)) for inner in value):
        pairs = [(f"{prefix}[{i}]", inner) for i, inner in enumerate(value)]
    else:
        return {prefix: _plain(value)}
    return {key: text for name, inner in pairs for key, text in _flatten(inner, name).items()}


def _plain(value: Any) -> str:
    """A value as text: what is not set, or an empty list, as what is absent."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or _ABSENT
    return (
        _ABSENT if value in (None, {}, "none") else str(value)
    )  # "none" is a setting's own word for nothing


def result_rows(runs: Sequence[RunFolder]) -> list[list[Any]]:
    """What came out of each run.

    Args:
        runs: The runs.

    Returns:
        Rows of a name and one value per run, "-" where a run has none yet.

    Raises:
        RunError: A file is damaged.
    """
    evaluations = [evaluation_of(run) for run in runs]
    names = dict.fromkeys(
        name for e in evaluations for when in ("before", "after") for name in metrics_of(e, when)
    )
    rows: list[list[Any]] = [["status", *(status_of(run) for run in runs)]]
    for name in names:
        for when in ("before", "after"):
            scores = [metrics_of(e, when).get(name) for e in evaluations]
            unit = next((score["unit"] for score in scores if score), None)
            if unit is not None:
                rows.append([f"{name} {when} ({unit})", *map(show_score, scores)])
    summaries = [run.summary() if run.has(RunFolder.SUMMARY) else {} for run in runs]
    rows += [[name, *(show(s) if s else "-" for s in summaries)] for name, show in _FACTS]
    return [*rows, *_ratio_rows(runs)]


def _phases(summary: Mapping[str, Any]) -> str:
    """The phases' names and lengths."""
    parts = [f"{phase['name']} {phase['end_step'] - phase['start_step']:,}" for phase in summary["phases"]]
    return " → ".join(parts)


def _validation(summary: Mapping[str, Any]) -> str:
    """The best checkpoint's validation loss and step."""
    best = summary["best_checkpoint"]
    return f"{best['validation_loss']:.4f} (step {best['step']:,})" if best else "-"


def _rate(summary: Mapping[str, Any]) -> str:
    """Tokens per second."""
    rate = summary["tokens_per_second"]
    return f"{rate:,.0f}" if rate is not None else "-"


def _trainable(summary: Mapping[str, Any]) -> str:
    """Trainable parameters and their share."""
    counts = summary["counts"]
    return show_count(counts["trainable_parameters"], of=counts["total_parameters"])


_FACTS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("validation loss, best", _validation),
    ("trainable parameters", _trainable),
    ("steps", lambda s: show_count(s["steps"])),
    ("phases (steps)", _phases),
    ("training time", lambda s: show_seconds(s["seconds"].get("train"))),
    ("total time", lambda s: show_seconds(s["seconds"].get("total"))),
    ("tokens per second", _rate),
    ("peak memory, host", lambda s: show_bytes(s["peak_memory_bytes"]["host"])),
    ("peak memory, device", lambda s: show_bytes(s["peak_memory_bytes"]["device"])),
)


def _ratio_rows(runs: Sequence[RunFolder]) -> list[list[Any]]:
    """Attention to MLP ratios of the gradient norms."""
    found = [run.gradient_log().summarize() if run.has(RunFolder.GRADIENTS) else {} for run in runs]
    rows = []
    for key, name in (
        ("attention_to_mlp_ratio", "gradient norm, attention / MLP"),
        ("attention_to_mlp_ratio_per_parameter", "the same per parameter (RMS)"),
    ):
        values = [summary.get(key) for summary in found]
        rows.append([name, *("-" if value is None else f"{value:.3f}" for value in values)])
    return rows


def evaluation_of(run: RunFolder) -> dict[str, Any] | None:
    """A run's evaluation, None where there is none yet.

    Args:
        run: The run.

    Raises:
        RunError: The file is damaged.
    """
    return run.evaluation() if run.evaluation_path() is not None else None


def metrics_of(evaluation: Mapping[str, Any] | None, when: str) -> dict[str, Any]:
    """The scores of one half of an evaluation; empty where it was not done.

    Args:
        evaluation: The content of `{task}_evaluation.json`, or None.
        when: "before" or "after".
    """
    half = (evaluation or {}).get(when)
    return dict(half["metrics"]) if half else {}


def status_of(run: RunFolder) -> str:
    """How far a run has got.

    Args:
        run: The run.

    Returns:
        "finished", "failed: ..." or "not finished, at step N".

    Raises:
        RunError: The event log is damaged.
    """
    if run.has_ended:
        return "finished"
    events = run.timeline()
    if events and events[-1]["event"] == "run_failed":
        return f"failed: {events[-1].get('error', 'see events.jsonl')}"
    steps = [event["step"] for event in events if event["event"] == "step"]
    return f"not finished, at step {steps[-1]:,}" if steps else "not finished, before the first step"


def find_obstacles(runs: Sequence[RunFolder]) -> list[str]:
    """What stands against comparing the scores of runs (law 10).

    Args:
        runs: The runs.

    Returns:
        Sentences; the last one always says what the intervals cover.

    Raises:
        RunError: A file is damaged.
    """
    evaluations = [evaluation_of(run) for run in runs]
    halves = [(e or {}).get("after") or {} for e in evaluations]
    configs = [run.config if run.has(RunFolder.CONFIG) else {} for run in runs]
    facts = {
        "The tasks differ": [(e or {}).get("task") for e in evaluations],
        "The numbers of test examples differ": [(e or {}).get("num_examples") for e in evaluations],
        "The decoding differs": [
            {k: v for k, v in half.get("decoding", {}).items() if k != "batch_size"} or None
            for half in halves
        ],
        "The base models differ": [config.get("model", {}).get("name") for config in configs],
        "The numbers of training steps differ": [
            config.get("training", {}).get("max_steps") for config in configs
        ],
    }
    notes = [
        f"{sentence}: {' / '.join(_plain(v) for v in values)}"
        for sentence, values in facts.items()
        if len({str(value) for value in values if value is not None}) > 1
    ]
    unfinished = [run.name for run in runs if not run.has_ended]
    if unfinished:
        notes.append(f"Not finished: {', '.join(unfinished)}")
    return [
        *notes,
        "Intervals are over test examples, not over seeds: a difference between single runs names no winner; repeat with"
        " at least three seeds",
    ]
