"""A run's numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.comparison import evaluation_of, metrics_of, status_of
from peftlab.errors import DataError
from peftlab.files import write_text
from peftlab.losses import read_losses
from peftlab.run import RunFolder
from peftlab.tables import phase_rows, render_text, show_bytes, show_count, show_score, show_seconds


def generate_summary_report(run_folder: RunFolder | str | Path, output_path: str | Path | None = None) -> str:
    """A run's statistics as text: scores, costs, losses, phases, gradient norms.

    Args:
        run_folder: A run folder, finished or not, or any folder with gradient files.
        output_path: A file to write the text to as well.

    Returns:
        The text; parts that are not there yet are left out.

    Raises:
        DataError: The folder does not exist, or holds nothing of a run.
        RunError: A file is damaged.
        OutputError: The file cannot be written.
    """
    run = run_folder if isinstance(run_folder, RunFolder) else RunFolder(run_folder)
    if not run.path.is_dir():
        raise DataError(f"{run.path} is not a folder; give a run folder")
    parts = [
        part for part in (_scores(run), _costs(run), _losses(run), _phases(run), _gradients(run)) if part
    ]
    if not parts and not run.has(RunFolder.CONFIG):
        raise DataError(f"{run.path} holds nothing of a run: neither {RunFolder.CONFIG} nor gradient files")
    head = f"{run.name}\n{'=' * len(run.name)}"
    status = f"status: {status_of(run)}" if run.has(RunFolder.CONFIG) else ""
    text = "\n\n".join(part for part in (head, status, *parts) if part) + "\n"
    if output_path is not None:
        write_text(Path(output_path), text)
    return text


def _scores(run: RunFolder) -> str:
    """Scores before and after."""
    evaluation = evaluation_of(run)
    before, after = metrics_of(evaluation, "before"), metrics_of(evaluation, "after")
    if evaluation is None or not (before or after):
        return ""
    rows = [
        [name, show_score(before.get(name)), show_score(after.get(name)), (after or before)[name]["unit"]]
        for name in (after or before)
    ]
    title = f"SCORES on {evaluation['num_examples']:,} {evaluation['split']} examples of {evaluation['task']}"
    return render_text([["metric", "before", "after", "unit"], *rows], title=title)


def _costs(run: RunFolder) -> str:
    """Parameters, time and memory."""
    if not run.has(RunFolder.SUMMARY):
        return ""
    summary = run.summary()
    counts, memory, rate = summary["counts"], summary["peak_memory_bytes"], summary["tokens_per_second"]
    rows: list[list[Any]] = [
        [
            "trainable parameters",
            show_count(counts["trainable_parameters"], of=counts["total_parameters"]),
        ],
        ["trainable tensors", counts["trainable_tensors"]],
        ["steps", summary["steps"]],
        *([f"time: {name.replace('_', ' ')}", show_seconds(v)] for name, v in summary["seconds"].items()),
        ["training tokens per second", None if rate is None else f"{rate:,.0f}"],
        ["peak memory, host", show_bytes(memory["host"])],
        ["peak memory, device", show_bytes(memory["device"])],
    ]
    return render_text([["cost", ""], *rows], title="COSTS")


def _losses(run: RunFolder) -> str:
    """First, last and best losses."""
    losses = read_losses(run)
    lines = []
    if losses.steps:
        lines.append(
            f"training    {losses.training[0]:.4f} at step {losses.steps[0]:,}"
            f" → {losses.training[-1]:.4f} at step {losses.steps[-1]:,}"
            + (f" (holds {losses.beside} too)" if losses.beside else "")
        )
    if losses.validation:
        low = min(range(len(losses.validation)), key=losses.validation.__getitem__)
        lines.append(
            f"validation  {losses.validation[0]:.4f} → {losses.validation[-1]:.4f};"
            f" lowest {losses.validation[low]:.4f} at step {losses.validation_steps[low]:,}"
        )
    return "\n".join(["LOSSES", *lines]) if lines else ""


def _phases(run: RunFolder) -> str:
    """The phases."""
    if not run.has(RunFolder.PREFLIGHT):
        return ""
    return render_text(phase_rows(run.preflight["phases"]), title="PHASES")


def _gradients(run: RunFolder) -> str:
    """Gradient norms by group and by layer."""
    if not run.has(RunFolder.GRADIENTS):
        return ""
    summary = run.gradient_log().summarize()
    moment = "after clipping" if summary["clipped"] else "before clipping"
    title = f"GRADIENT NORMS (L2, {moment}, {summary['num_steps']:,} steps; std over those steps)"
    parts = [render_text(_statistics("group", summary["groups"]), title=title)]
    for name, key in (
        ("", "attention_to_mlp_ratio"),
        (" per parameter", "attention_to_mlp_ratio_per_parameter"),
    ):
        ratio = summary[key]
        text = "none: never active in the same step" if ratio is None else f"{ratio:.4f}"
        parts.append(f"attention / MLP{name}: {text}")
    layers = {n: facts for n, facts in summary["layers"].items() if facts["count"]}
    if layers:
        highest = sorted(layers, key=lambda name: -layers[name]["mean"])[:5]
        rows = _statistics("layer", {name: layers[name] for name in highest})
        parts.append("\n" + render_text(rows, title="LAYERS with the highest mean norm"))
    return "\n".join(parts)


def _statistics(kind: str, columns: Mapping[str, Mapping[str, Any]]) -> Sequence[Sequence[Any]]:
    """Rows of statistics."""
    keys = ("mean", "std", "min", "max", "peak_step", "count", "non_finite_steps")
    header = [kind, "mean", "std", "min", "max", "peak at step", "active steps", "not finite"]
    rows = [
        [name, *(f"{facts[k]:.4g}" if isinstance(facts[k], float) else facts[k] for k in keys)]
        for name, facts in columns.items()
    ]
    return [header, *rows]
