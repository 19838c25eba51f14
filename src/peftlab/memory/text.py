"""A memory plan for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftlab.tables import render_text, show_bytes


def render_memory(plan: Mapping[str, Any]) -> str:
    """Whether a run fits into memory, in words and tables.

    Args:
        plan: As `MemoryPlan.as_dict` gives it; or a verdict with its reason alone, where nothing could be predicted.

    Returns:
        Several lines of text.
    """
    if "reason" in plan:
        return f"memory of a training step {plan['verdict']}: {plan['reason']}"
    prediction, budget = plan["prediction"], plan["budget"]
    asked = (
        f"memory of a training step, {describe_step(prediction)}, predicted in {prediction['seconds']:.1f} s"
    )
    lines = [
        render_text(part_rows(prediction), title=asked),
        "",
        f"{plan['verdict'].replace(' if', ' only with a change')}: it needs {show_bytes(plan['needed_bytes'])} of"
        f" {show_bytes(budget['total_bytes'])} ({budget['account']}); {_describe_needed(budget)}",
    ]
    if plan["options"]:
        lines += ["", render_text(option_rows(plan["options"]))]
    batch = plan["batch"]
    if not plan.get("searched", True):
        lines.append("the largest batch that fits was not looked for; --largest_batch does")
    elif batch is None:
        lines.append("not even a batch of one row fits as it is")
    else:
        lines.append(f"largest batch that fits as it is: {_describe_batch(batch)}")
    if plan["warning"]:
        lines.append(f"mind: {plan['warning']}")
    return "\n".join(lines)


def describe_step(prediction: Mapping[str, Any]) -> str:
    """The step that was predicted, in words.

    Args:
        prediction: As `MemoryPrediction.as_dict` gives it.

    Returns:
        E.g. "4 rows of 2,048 tokens, weights in bfloat16, on cpu".
    """
    shape = prediction["shape"]
    rows = "1 row" if shape["rows"] == 1 else f"{shape['rows']:,} rows"
    again = ", checkpointed" if prediction["checkpointing"] else ""
    return f"{rows} of {shape['length']:,} tokens, weights in {prediction['dtype']}{again}, on {prediction['device']}"


def part_rows(prediction: Mapping[str, Any]) -> list[list[Any]]:
    """What the peak consists of as a table.

    Args:
        prediction: As `MemoryPrediction.as_dict` gives it.

    Returns:
        Header, one row for each part and the sum.
    """
    whole = prediction["peak_bytes"]
    rows: list[list[Any]] = [["part", "memory", "share"]]
    rows += [
        [part, show_bytes(size), f"{100 * size / whole:.1f} %"] for part, size in prediction["parts"].items()
    ]
    return [*rows, [f"peak, {prediction['moment']}", show_bytes(whole), "100 %"]]


def option_rows(options: list[Mapping[str, Any]]) -> list[list[Any]]:
    """What could be changed as a table.

    Args:
        options: As `MemoryPlan.as_dict` gives them.

    Returns:
        Header and one row for each option.
    """
    rows: list[list[Any]] = [["change", "setting", "peak", "needs", "fits"]]
    for option in options:
        settings = ", ".join(f"{key}={_plain(value)}" for key, value in option["settings"].items())
        peak, needed = show_bytes(option["prediction"]["peak_bytes"]), show_bytes(option["needed_bytes"])
        rows.append([option["change"], settings, peak, needed, option["fits"]])
    return rows


def _describe_batch(batch: Mapping[str, Any]) -> str:
    """How large a batch can be; the largest that was considered is no limit."""
    rows, peak = batch["batch_size"], show_bytes(batch["prediction"]["peak_bytes"])
    if batch["too_large"] is None:
        return f"{rows:,} or more rows, peak of {rows:,} {peak}"
    return f"{rows:,} rows, peak {peak}; {batch['too_large']:,} do not fit"


def _describe_needed(budget: Mapping[str, Any]) -> str:
    """How what is needed follows from the peak."""
    beside = (
        f", and {show_bytes(budget['beside_bytes'])} for the device's context"
        if budget["beside_bytes"]
        else ""
    )
    return f"needed is the peak and {100 * budget['margin']:.0f} % of it{beside}"


def _plain(value: Any) -> str:
    """A setting's value as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
