"""Effective ranks: how they fall with the budget, and which modules kept them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.figures.canvas import (
    GROUP_COLOURS,
    INK,
    MUTED,
    draw_phases,
    heading,
    phase_spans,
    plain,
    say,
    sheet,
    step_axis,
)
from peftlab.rank_log import RankLog, load_rank_log
from peftlab.run import RunFolder

Source = RankLog | RunFolder | str | os.PathLike[str]
"""A rank log, a run folder, or its `ranks.csv`."""
_NOTHING = "no ranks have been recorded yet"
_LEGEND = ("mean", "lowest to highest", "budget per module")
_MOST_NUMBERS = 36
"""Layers up to which every cell of the map has its number in it."""


def plot_rank_allocation(
    source: Source, output_path: str | Path, *, phases: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    """Draw the effective rank of the modules over the run: mean, lowest and highest, and the budget per module.

    Args:
        source: A rank log, a run folder, or its `ranks.csv`.
        output_path: The PNG file.
        phases: Mappings with name, start_step and end_step; the run's own where None.

    Returns:
        The file.

    Raises:
        DataError: The source holds no ranks.
        RunError: Its files are damaged.
        OutputError: The file cannot be written.
    """
    log = _open(source)
    with sheet(output_path, height=4.6 if log.steps else 3.0) as figure:
        heading(figure, "Effective rank of the modules", _explain(log))
        axes = figure.subplots()
        if not log.steps:
            say(axes, _NOTHING)
            return Path(output_path)
        colour, few = GROUP_COLOURS["attention"], len(log) <= 60
        axes.fill_between(
            log.steps, log.lowest(), log.highest(), step="post", color=colour, alpha=0.14, linewidth=0,
            label="lowest to highest",
        )  # fmt: skip
        share = [budget / len(log.places) for budget in log.budgets]
        axes.step(
            log.steps, share, where="post", color=GROUP_COLOURS["mlp"], linewidth=5.5, alpha=0.45,
            label="budget per module",
        )  # fmt: skip
        axes.step(
            log.steps, log.mean_ranks(), where="post", color=colour, linewidth=1.6, marker="o" if few else None,
            markersize=3, label="mean", zorder=2.5,
        )  # fmt: skip
        step_axis(axes, min(1, log.steps[0]), log.steps[-1])
        axes.set_ylim(0, max(*log.highest(), *share) * 1.08 or 1)
        axes.set_ylabel("effective rank")
        spans = (
            []
            if isinstance(source, RankLog) and phases is None
            else phase_spans(_place(source), None, phases)
        )
        draw_phases([axes], spans)
        handles, labels = axes.get_legend_handles_labels()
        wanted = sorted(zip(labels, handles, strict=True), key=lambda pair: _LEGEND.index(pair[0]))
        figure.legend(
            [handle for _, handle in wanted], [label for label, _ in wanted], loc="outside right upper"
        )
    return Path(output_path)


def plot_rank_heatmap(
    source: Source, output_path: str | Path, *, phases: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    """Draw the last effective rank of every module, by role and layer.

    Args:
        source: A rank log, a run folder, or its `ranks.csv`.
        output_path: The PNG file.
        phases: Not drawn; taken so that all charts are called alike.

    Returns:
        The file.

    Raises:
        DataError: The source holds no ranks.
        RunError: Its files are damaged.
        OutputError: The file cannot be written.
    """
    log = _open(source)
    panels = _panels(log) if log.steps else {}
    most = max((len(layers) for _, layers in panels.values()), default=0)
    rows = [max(1.1, 0.34 * len(roles) + 0.55) for roles, _ in panels.values()]
    width = min(16.0, max(10.0, 4.0 + 0.42 * most))
    with sheet(output_path, width=width, height=1.2 + sum(rows) if panels else 3.0) as figure:
        heading(figure, "Where the ranks ended up", _explain_map(log))
        if not panels:
            say(figure.subplots(), "no module lies in a layer" if log.steps else _NOTHING)
            return Path(output_path)
        all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=rows)[:, 0]
        scale = _colours(log)
        for axes, (stack, (roles, layers)) in zip(all_axes, panels.items(), strict=True):
            _draw_cells(axes, _grid(log, stack, roles, layers), roles, layers, scale)
            axes.set_xlabel(f"{plain(stack, 30, keep_end=True)} layer" if len(panels) > 1 else "layer")
        bar = figure.colorbar(
            scale, ax=list(all_axes), label="effective rank", pad=0.015, fraction=0.04, aspect=24
        )
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
    return Path(output_path)


# -- inside -------------------------------------------------------------------------------------------------------


def _open(source: Source) -> RankLog:
    """The log that a source stands for."""
    return source if isinstance(source, RankLog) else load_rank_log(_place(source))


def _place(source: Any) -> Path:
    """The folder that a source stands for."""
    path = source.path if isinstance(source, RunFolder) else Path(source)
    return path if path.is_dir() else path.parent


def _explain(log: RankLog) -> str:
    """How to read the lines."""
    if not log.steps:
        return ""
    taken = "as they stood right after each allocation" if len(set(log.budgets)) > 1 else "no rank was taken"
    return f"Singular values that are not zero, over {len(log.places):,} modules · {taken}"


def _explain_map(log: RankLog) -> str:
    """How to read the map, and what it leaves out."""
    if not log.steps:
        return ""
    outside = sum(place.layer is None for place in log.places.values())
    left = f" · not shown: {outside} outside the layers" if outside else ""
    return f"Effective rank of each module after step {log.steps[-1]:,}, by role and layer{left}"


def _panels(log: RankLog) -> dict[str, tuple[list[str], list[int]]]:
    """Stack to its roles, in the model's order, and its layers."""
    found: dict[str, tuple[dict[str, None], set[int]]] = {}
    for place in log.places.values():
        if place.layer is not None:
            roles, layers = found.setdefault(place.stack, ({}, set()))
            roles[place.role] = None
            layers.add(place.layer)
    return {stack: (list(roles), sorted(layers)) for stack, (roles, layers) in found.items()}


def _grid(log: RankLog, stack: str, roles: Sequence[str], layers: Sequence[int]) -> Any:
    """Last ranks, shape (roles, layers): the mean where several modules share a place, NaN where there is none."""
    import numpy as np

    cells: dict[tuple[str, int | None], list[int]] = {}
    for path, place in log.places.items():
        if place.stack == stack:
            cells.setdefault((place.role, place.layer), []).append(log.ranks[path][-1])
    none = [np.nan]
    return np.array([[np.mean(cells.get((role, layer), none)) for layer in layers] for role in roles])


def _name(role: str) -> str:
    """A role for people."""
    return plain(role.replace("mlp", "MLP").replace(".", " ").replace("_", " "), 28)


def _colours(log: RankLog) -> Any:
    """From 0 to the highest rank that a module has had."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, max(1, *log.highest())), colormaps["viridis"])


def _draw_cells(axes: Any, grid: Any, roles: Sequence[str], layers: Sequence[int], scale: Any) -> None:
    """One stack: a cell for each module, its rank in it where there is room."""
    import numpy as np

    axes.imshow(
        np.ma.masked_invalid(grid), cmap=scale.cmap, norm=scale.norm, aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(len(roles)), [_name(role) for role in roles])
    every = max(1, -(-len(layers) // 30))
    axes.set_xticks(range(0, len(layers), every), layers[::every])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    for y, x in np.argwhere(np.isnan(grid)) if len(layers) <= _MOST_NUMBERS else ():
        axes.text(x, y, "–", ha="center", va="center", fontsize=8, color=MUTED)
    for y, x in np.argwhere(~np.isnan(grid)) if len(layers) <= _MOST_NUMBERS else ():
        dark = scale.norm(grid[y, x]) < 0.6
        axes.text(
            x, y, f"{grid[y, x]:.3g}", ha="center", va="center", fontsize=8.5, color="white" if dark else INK
        )  # fmt: skip
