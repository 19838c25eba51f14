"""The parts of a run's page: each a function from a run to a Section, or None where it does not apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from peftlab.comparison import evaluation_of
from peftlab.rank_log import RANK_FILE, RankLog
from peftlab.report.answers import answer_section
from peftlab.report.page import Section, absent, picture, scrolling, tiles
from peftlab.report.score_table import score_section
from peftlab.run import RunFolder
from peftlab.tables import (
    preflight_rows,
    render_html,
    show_bytes,
    show_groups,
    show_seconds,
)


def scores(run: RunFolder) -> Section:
    """Scores before and after, with intervals and units."""
    return score_section(evaluation_of(run))


def costs(run: RunFolder) -> Section:
    """Parameters, time, memory, speed."""
    if not run.has(RunFolder.SUMMARY):
        return Section("Cost", absent("time, memory and speed are written when the run ends"))
    summary = run.summary()
    counts, seconds, memory = summary["counts"], summary["seconds"], summary["peak_memory_bytes"]
    rate, best = summary["tokens_per_second"], summary["best_checkpoint"]
    facts = [
        ("parameters trained", f"{counts['trainable_parameters']:,}"),
        (
            "of the base's parameters",
            f"{100 * counts['trainable_parameters'] / counts['total_parameters']:.3g} %",
        ),
        ("tensors trained", f"{counts['trainable_tensors']:,}"),
        ("optimizer steps", f"{summary['steps']:,}"),
        ("training time", show_seconds(seconds.get("train"))),
        ("total time", show_seconds(seconds.get("total"))),
        ("training tokens per second", "-" if rate is None else f"{rate:,.0f}"),
        ("peak memory, host", show_bytes(memory["host"])),
    ]
    if memory["device"] is not None:
        facts.append(("peak memory, device", show_bytes(memory["device"])))
    if best:
        facts.append(
            (f"best validation loss, at step {best['step']:,}", f"{best['validation_loss']:.4f}"),
        )
    others = {k: v for k, v in seconds.items() if k not in ("train", "total")}
    rest = " · ".join(f"{name.replace('_', ' ')} {show_seconds(v)}" for name, v in others.items())
    kept = "unchanged, tensor by tensor" if summary["base_unchanged"] else "trained itself"
    stopped = "Training stopped early. " if summary.get("stopped_early") else ""
    return Section(
        "Cost",
        tiles(facts) + f'<p class="muted">{stopped}Also: {escape(rest)}. The base came out {kept}.</p>',
    )


def phases(run: RunFolder) -> Section | None:
    """The phases, what each trains, and what was proved of it."""
    if not run.has(RunFolder.PREFLIGHT):
        return Section("Phases", absent("the phases are written before training"))
    started: dict[str, Any] = {}
    proved: dict[str, Any] = {}
    for event in run.timeline():
        if event["event"] == "phase_started":
            started[event["phase"]] = event
        elif event["event"] == "phase_proved":
            proved[event["phase"]] = event
    rows: list[list[Any]] = [["phase", "steps", "trains", "tensors", "parameters", "shown to train"]]
    for phase in run.preflight["phases"]:
        name = phase["name"]
        steps = f"{phase['start_step'] + 1:,} to {phase['end_step']:,}"
        counts = [phase["trainable_tensors"], phase["trainable_parameters"]]
        rows.append([name, steps, show_groups(phase), *counts, _proof(proved.get(name), name in started)])
    unreached = [n for event in proved.values() for n in event.get("unreached", [])]
    note = (
        '<p class="muted">Shown to train: every active tensor that the forward pass reaches had a finite, non-zero'
        " gradient and changed; every frozen one had none and stayed bit-equal.</p>"
    )
    if unreached:
        listed = "".join(f"<li>{escape(str(n))}</li>" for n in dict.fromkeys(unreached))
        note += (
            f"<details><summary>{len(set(unreached))} tensors the forward pass does not reach</summary>"
            f"<ul>{listed}</ul></details>"
        )
    return Section("Phases", scrolling(render_html(rows)) + note + _alarms(run))


def _proof(event: Mapping[str, Any] | None, started: bool) -> str:
    """What is known of a phase."""
    if event is None:
        return "not yet" if started else "not started"
    needed = event["steps_needed"]
    extra = f", {len(event['unreached'])} unreached" if event.get("unreached") else ""
    return f"all {event['tensors']:,} within {needed} step{'s' if needed != 1 else ''}{extra}"


def _alarms(run: RunFolder) -> str:
    """Alarms, where there are any."""
    alarms = [event for event in run.timeline() if event["event"] == "alarm"]
    if not alarms:
        return ""
    rows: list[list[Any]] = [["step", "alarm", "names"]]
    for event in alarms:
        names = [str(name) for name in event.get("names", [])]
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        rows.append([event.get("step"), event.get("kind"), ", ".join(names[:6]) + more])
    return "<h3>Alarms</h3>" + scrolling(render_html(rows), wide=True)


def losses(run: RunFolder) -> Section:
    """The loss chart."""
    from peftlab.figures import plot_training_loss

    if not any(event["event"] in ("step", "validated") for event in run.timeline()):
        return Section("Loss", absent("no step has been logged"))
    return Section("Loss", _draw(run, "training_loss", plot_training_loss))


def gradients(run: RunFolder) -> Section | None:
    """The gradient charts."""
    from peftlab.figures import (
        plot_gradient_evolution,
        plot_gradient_norms,
        plot_layer_comparison,
        plot_layer_heatmap,
    )

    if not run.has(RunFolder.GRADIENTS):
        if run.has_ended:
            return None
        return Section("Gradient norms", absent("the gradient norms are written when training ends"))
    log = run.gradient_log()
    summary = log.summarize()
    charts = {"gradient_norms": plot_gradient_norms}
    if log.layer_data:
        charts |= {
            "layer_heatmap": plot_layer_heatmap,
            "layer_comparison": plot_layer_comparison,
            "gradient_evolution": plot_gradient_evolution,
        }
    ratio, per = summary["attention_to_mlp_ratio"], summary["attention_to_mlp_ratio_per_parameter"]
    text = "Attention and MLP were never active in the same step, so their norms are not compared."
    if ratio is not None:
        text = f"Over the steps with both active, attention's mean norm is {ratio:.3f} of the MLP's"
        text += f" ({per:.3f} per parameter)." if per is not None else "."
    return Section(
        "Gradient norms", f"<p>{text}</p>" + "".join(_draw(run, n, plot) for n, plot in charts.items())
    )


def ranks(run: RunFolder) -> Section | None:
    """The ranks that a method gave to modules, where it is one that does."""
    from peftlab.figures import plot_rank_allocation, plot_rank_heatmap

    if not run.has(RANK_FILE):
        adapters = run.config.get("adapters") or [] if run.has(RunFolder.CONFIG) else []
        allocates = any("target_rank" in (adapter.get("settings") or {}) for adapter in adapters)
        if run.has_ended or not allocates:
            return None
        return Section("Ranks", absent("the ranks of the modules are written when training ends"))
    log = RankLog.read(run.path)
    if not log.steps:
        return Section("Ranks", absent("no rank was recorded: training ended before the first allocation"))
    charts = {"rank_allocation": plot_rank_allocation, "rank_heatmap": plot_rank_heatmap}
    return Section("Ranks", _tell_ranks(log) + "".join(_draw(run, n, plot) for n, plot in charts.items()))


def _tell_ranks(log: RankLog) -> str:
    """What the ranks came to, in a paragraph."""
    first, last, modules = log.summarize()["first"], log.summarize()["last"], len(log.places)
    if len(set(log.budgets)) == 1:
        return f"<p>No rank was taken: {modules:,} modules have {last['mean']:.3g} each on average.</p>"
    empty = sum(values[-1] == 0 for values in log.ranks.values())
    none = f" {empty:,} of them {'has' if empty == 1 else 'have'} lost all." if empty else ""
    return (
        f"<p>{modules:,} modules began with {first['total']:,} ranks together and ended with {last['total']:,}, in a"
        f" budget of {last['budget']:,}: {last['mean']:.3g} each on average, from {last['min']} to {last['max']}.{none}</p>"
    )


def _draw(run: RunFolder, name: str, plot: Callable[..., Path]) -> str:
    """A chart of the run's plots in the page; drawn only where it is older than what it shows."""
    path = run.plots / f"{name}.png"
    sources = [*run.path.glob("gradient_analysis.*"), run.path / RANK_FILE, run.path / RunFolder.EVENTS]
    newest = max(p.stat().st_mtime_ns for p in sources if p.exists())
    if not path.exists() or path.stat().st_mtime_ns < newest:
        plot(run, path)
    return picture(path, name.replace("_", " "))


def examples(run: RunFolder) -> Section | None:
    """Some test examples with the answers before and after."""
    evaluation = evaluation_of(run) or {}
    halves = {when: evaluation[when] for when in ("before", "after") if evaluation.get(when)}
    answers = {when: run.predictions(half["predictions"]) for when, half in halves.items()}
    if not answers:
        return None if run.has_ended else Section("Answers", absent("the answers to the test examples"))
    return answer_section([*halves.values()][-1].get("examples"), answers)


def preflight(run: RunFolder) -> Section:
    """What was counted before anything heavy."""
    if not run.has(RunFolder.PREFLIGHT):
        return Section("Data", absent("rows and tokens are counted before training"))
    counted = run.preflight
    tokens, steps = counted["tokens"], counted["steps"]
    text = (
        f"{tokens['train']:,} training tokens, {100 * tokens['labelled_share']:.3g} % of them labelled; the longest row"
        f" has {tokens['longest']:,}. {steps['total']:,} steps are {steps['epochs']:.3g} epochs of"
        f" {steps['per_epoch']:,} steps."
    )
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in counted.get("notes", []))
    listed = f"<ul>{notes}</ul>" if notes else ""
    return Section("Data", scrolling(render_html(preflight_rows(counted))) + f"<p>{text}</p>{listed}")


def environment(run: RunFolder) -> Section:
    """What it ran on."""
    if not run.has(RunFolder.ENVIRONMENT):
        return Section("Environment", absent("versions and hardware"))
    found = run.environment
    git = found.get("git")
    rows: list[list[Any]] = [["", ""]]
    rows.append(["command", " ".join(map(str, found["command"]))])
    if git:
        rows.append(["git", git["commit"] + (", with uncommitted changes" if git["dirty"] else "")])
    for part in ("hardware", "versions"):
        for name, value in found[part].items():
            text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            rows.append([name, text])
    table = render_html(rows).replace("<thead><tr><th></th><th></th></tr></thead>", "")
    return Section("Environment", scrolling(table, wide=True))


def configuration(run: RunFolder) -> Section:
    """The resolved config, as it lies in the folder."""
    if not run.has(RunFolder.CONFIG):
        return Section("Config", absent("the resolved config"))
    text = (run.path / RunFolder.CONFIG).read_text(encoding="utf-8")
    note = f"Given back to <code>peftlab run {escape(str(run.path / RunFolder.CONFIG))}</code>, it repeats this run."
    return Section("Config", f'<p class="muted">{note}</p><pre>{escape(text)}</pre>')


SECTIONS: tuple[Callable[[RunFolder], Section | None], ...] = (
    scores,
    costs,
    phases,
    losses,
    gradients,
    ranks,
    examples,
    preflight,
    environment,
    configuration,
)
"""The parts of a run's page in order; a new feature adds a function here."""
