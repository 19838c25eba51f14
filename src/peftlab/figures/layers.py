"""Charts over layers: heat-map, comparison of attention and MLP, profiles through the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.figures.canvas import (
    GROUP_COLOURS,
    GROUP_NAMES,
    INK,
    NORM_LABEL,
    Source,
    draw_phases,
    heading,
    log_axis,
    log_limits,
    open_log,
    phase_spans,
    plain,
    plain_ticks,
    say,
    segments,
    sheet,
    step_axis,
)
from peftlab.gradient_files import natural_order, parse_column
from peftlab.gradient_log import GradientNormLog
from peftlab.measurements import describe

_MOST_COLUMNS = 600
_PROFILES = 7
_LAYER_GROUPS = ("attention", "mlp")
_DECADES = 8
"""The colour scale spans at most this many powers of ten below its maximum."""
_UNMEASURED = "layers were not measured in this run"


def plot_layer_heatmap(
    source: Source, output_path: str | Path, *, phases: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    """Draw the norm of every layer's gradient over the run, attention and MLP apart.

    Grey hatched cells had no active tensor.

    Args:
        source: A gradient log, a run folder, or one of its gradient files.
        output_path: The PNG file.
        phases: Mappings with name, start_step and end_step; the source's own where None.

    Returns:
        The file.

    Raises:
        DataError: The source holds no gradient norms.
        RunError: Its files are damaged.
        OutputError: The file cannot be written.
    """
    log = open_log(source)
    panels = _panels(log)
    rows = [max(2.0, min(4.6, 0.9 + 0.13 * len(columns))) for columns in panels.values()]
    with sheet(output_path, height=1.5 + sum(rows) if panels else 3.0) as figure:
        bins, size = _bins(log)
        extra = f" · each column: mean over up to {size} rows" if size > 1 else ""
        heading(figure, "Gradient norm of each layer", "Frozen: no tensor had a gradient" + extra)
        if not panels:
            say(figure.subplots(), _UNMEASURED if log.steps else "no step has been measured yet")
            return Path(output_path)
        grids = {key: _grid(log, columns, bins) for key, columns in panels.items()}
        scale = _colours(list(grids.values()))
        all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=rows, sharex=True)[:, 0]
        for axes, ((stack, group), columns) in zip(all_axes, panels.items(), strict=True):
            layers = [parse_column(column).layer for column in columns]
            _draw_grid(axes, log, grids[stack, group], layers, bins, scale)
            axes.set_ylabel(f"{_panel_name(stack, group)} layer", color=GROUP_COLOURS[group])
            step_axis(axes, log.steps[0], log.steps[-1], label=axes is all_axes[-1])
            edges = _edges(log, bins)
            axes.set_xlim(edges[0], edges[-1])
        draw_phases(list(all_axes), phase_spans(source, log, phases))
        _colour_bar(figure, all_axes, scale, list(grids.values()))
    return Path(output_path)


def plot_layer_comparison(
    source: Source, output_path: str | Path, *, phases: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    """Draw each layer's mean norm, attention beside MLP, over the steps in which it was active.

    Args:
        source: A gradient log, a run folder, or one of its gradient files.
        output_path: The PNG file.
        phases: Not drawn; taken so that all charts are called alike.

    Returns:
        The file.

    Raises:
        DataError: The source holds no gradient norms.
        RunError: Its files are damaged.
        OutputError: The file cannot be written.
    """
    log = open_log(source)
    panels = _panels(log)
    stacks = list(dict.fromkeys(stack for stack, _ in panels))
    most = max((len(columns) for columns in panels.values()), default=0)
    width = min(18.0, max(10.0, 3.0 + 0.3 * most))
    with sheet(output_path, width=width, height=1.4 + 3.2 * len(stacks) if panels else 3.0) as figure:
        heading(
            figure,
            "Attention and MLP, layer by layer",
            "Bar: mean gradient norm over the steps in which the layer was active · whisker: standard deviation of"
            " those steps",
        )
        if not panels:
            say(figure.subplots(), _UNMEASURED if log.steps else "no step has been measured yet")
            return Path(output_path)
        all_axes = figure.subplots(len(stacks), 1, squeeze=False)[:, 0]
        handles: dict[str, Any] = {}
        for axes, stack in zip(all_axes, stacks, strict=True):
            _draw_bars(axes, log, {group: panels.get((stack, group), []) for group in _LAYER_GROUPS}, handles)
            axes.set_xlabel(f"{stack} layer".strip())
        figure.legend(handles=list(handles.values()), labels=list(handles), loc="outside right upper")
    return Path(output_path)


def plot_gradient_evolution(
    source: Source, output_path: str | Path, *, phases: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    """Draw the profile over layers at seven steps spread over the run.

    Args:
        source: A gradient log, a run folder, or one of its gradient files.
        output_path: The PNG file.
        phases: Mappings with name, start_step and end_step, named in the legend; the source's own where None.

    Returns:
        The file.

    Raises:
        DataError: The source holds no gradient norms.
        RunError: Its files are damaged.
        OutputError: The file cannot be written.
    """
    log = open_log(source)
    panels = _panels(log)
    spans = phase_spans(source, log, phases)
    stacks = list(dict.fromkeys(stack for stack, _ in panels))
    with sheet(output_path, height=1.4 + 3.6 * len(stacks) if panels else 3.0) as figure:
        heading(
            figure,
            "How the profile over layers changes",
            "One line per step, steps spread evenly over the run · frozen layers have no point",
        )
        if not panels:
            say(figure.subplots(), _UNMEASURED if log.steps else "no step has been measured yet")
            return Path(output_path)
        rows = _spread(len(log), _PROFILES)
        grid = figure.subplots(len(stacks), 2, squeeze=False, sharey=True)
        handles: dict[str, Any] = {}
        for line, stack in zip(grid, stacks, strict=True):
            for axes, group in zip(line, _LAYER_GROUPS, strict=True):
                _draw_profiles(axes, log, panels.get((stack, group), []), rows, handles)
                axes.set_title(_panel_name(stack, group), color=GROUP_COLOURS[group])
                axes.set_xlabel("layer")
            line[0].set_ylabel(NORM_LABEL + ", log scale")
        names = {s: next((p.name for p in spans if p.start < s <= p.end), "") for s in log.steps}
        labels = [
            f"step {log.steps[i]:,}" + (f", {plain(names[log.steps[i]], 16)}" if len(spans) > 1 else "")
            for i in rows
        ]
        figure.legend(
            handles=[handles[str(i)] for i in rows], labels=labels, loc="outside right upper", title=None
        )
    return Path(output_path)


# -- inside -------------------------------------------------------------------------------------------------------


def _panels(log: GradientNormLog) -> dict[tuple[str, str], list[str]]:
    """(stack, group) to its layer columns in order; stacks in order, attention before MLP."""
    columns = natural_order(log.layer_data) if log.steps else []
    parsed = {name: parse_column(name) for name in columns}
    stacks = dict.fromkeys(column.stack for column in parsed.values())
    keys = [(stack, group) for stack in stacks for group in _LAYER_GROUPS]
    panels = {key: [n for n, c in parsed.items() if (c.stack, c.group) == key] for key in keys}
    return {key: names for key, names in panels.items() if names}


def _panel_name(stack: str, group: str) -> str:
    """What a panel is called."""
    return f"{stack} {GROUP_NAMES[group]}".strip()


def _spread(rows: int, number: int) -> list[int]:
    """Row numbers spread evenly from the first to the last."""
    if rows <= number:
        return list(range(rows))
    return [round(i * (rows - 1) / (number - 1)) for i in range(number)]


def _bins(log: GradientNormLog) -> tuple[list[tuple[int, int]], int]:
    """Stretches of rows that share a column of the heat-map, none of them over a phase boundary, and their size."""
    size = max(1, math.ceil(len(log) / _MOST_COLUMNS))
    stretches = segments(log.steps, log.phases)
    return [(i, min(i + size, end)) for first, end in stretches for i in range(first, end, size)], size


def _edges(log: GradientNormLog, bins: Sequence[tuple[int, int]]) -> list[float]:
    """Step positions between the heat-map's columns."""
    steps = log.steps
    inner = [(steps[first - 1] + steps[first]) / 2 for first, _ in bins[1:]]
    half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    return [steps[0] - half, *inner, steps[-1] + half]


def _grid(log: GradientNormLog, columns: Sequence[str], bins: Sequence[tuple[int, int]]) -> Any:
    """Norms of one panel, shape (layers, columns): NaN where frozen, inf where not finite; bins are means."""
    import numpy as np

    rows = np.array(
        [
            [np.nan if v is None else v if math.isfinite(v) else np.inf for v in log.layer_data[c]]
            for c in columns
        ]
    )
    active = ~np.isnan(rows)
    starts = [first for first, _ in bins]
    total = np.add.reduceat(np.where(active, rows, 0.0), starts, axis=1)
    count = np.add.reduceat(active.astype(int), starts, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, np.nan)


def _colours(grids: Sequence[Any]) -> Any:
    """One colour scale for all panels: viridis over the positive values, black for zero, red for what is not finite."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    numbers = np.concatenate([grid.ravel() for grid in grids])
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    low, high = (float(numbers.min()), float(numbers.max())) if len(numbers) else (0.1, 1.0)
    low = max(low, high * 10.0**-_DECADES)
    low, high = log_limits(low, high)
    colours = colormaps["viridis"].with_extremes(under="black", over="#c1121f", bad=(0, 0, 0, 0))
    return ScalarMappable(LogNorm(low, high), colours)


def _draw_grid(
    axes: Any, log: GradientNormLog, grid: Any, layers: Sequence[int], bins: Any, scale: Any
) -> None:
    """One panel of the heat-map."""
    import numpy as np
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    axes.add_patch(
        Rectangle(
            (0, 0), 1, 1, transform=axes.transAxes, facecolor="#eceef0", edgecolor="#c3c7cc", hatch="////",
            linewidth=0, zorder=0,
        )
    )  # fmt: skip
    low, high = scale.get_clim()
    shown = np.where(grid <= 0, low * 1e-3, np.where(np.isinf(grid), high * 1e3, grid))
    shown = np.where((grid > 0) & (grid < low), low, shown)
    edges = np.array([layers[0] - 0.5, *[layer + 0.5 for layer in layers]])
    axes.pcolormesh(
        _edges(log, bins), edges, np.ma.masked_invalid(shown), cmap=scale.cmap, norm=scale.norm, zorder=1
    )
    axes.grid(visible=False)
    axes.set_ylim(edges[0], edges[-1])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _colour_bar(figure: Any, all_axes: Any, scale: Any, grids: Sequence[Any]) -> None:
    """The colour scale, and a legend for zero and not finite where they occur."""
    import numpy as np
    from matplotlib.patches import Patch

    bar = figure.colorbar(scale, ax=list(all_axes), label=NORM_LABEL, pad=0.015, fraction=0.04, aspect=30)
    plain_ticks(bar.ax.yaxis, *scale.get_clim())
    bar.outline.set_visible(False)
    bar.ax.grid(visible=False)
    special = [Patch(facecolor="#eceef0", edgecolor="#c3c7cc", hatch="////", label="frozen")]
    if any((grid == 0).any() for grid in grids):
        special.append(Patch(color="black", label="exactly zero"))
    if any(np.isinf(grid).any() for grid in grids):
        special.append(Patch(color="#c1121f", label="not finite"))
    if any(np.isnan(grid).any() for grid in grids) or len(special) > 1:
        figure.legend(handles=special, loc="upper right", ncols=len(special))  # beside the title


def _draw_bars(
    axes: Any, log: GradientNormLog, columns: Mapping[str, Sequence[str]], handles: dict[str, Any]
) -> None:
    """The bars of one stack."""
    from matplotlib.ticker import MaxNLocator

    top = 0.0
    for group, offset in zip(_LAYER_GROUPS, (-0.2, 0.2), strict=True):
        found = [(parse_column(c).layer, describe(log.steps, log.layer_data[c])) for c in columns[group]]
        active = [(layer, facts) for layer, facts in found if facts["count"]]
        name = GROUP_NAMES[group]
        places = [layer + offset for layer, _ in active]
        means = [facts["mean"] for _, facts in active]
        below = [min(facts["std"], facts["mean"]) for _, facts in active]
        above = [facts["std"] for _, facts in active]
        axes.bar(places, means, 0.38, color=GROUP_COLOURS[group], alpha=0.9 if active else 0.25)
        axes.errorbar(
            places, means, yerr=[below, above], fmt="none", ecolor=INK, elinewidth=0.9, capsize=2, capthick=0.9
        )  # fmt: skip
        label = name if active else f"{name}: no active tensor"
        handles.setdefault(label, _swatch(GROUP_COLOURS[group], pale=not active))
        top = max([top, *(mean + std for mean, std in zip(means, above, strict=True))])
    layers = [parse_column(c).layer for names in columns.values() for c in names]
    axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    axes.set_ylim(0, top * 1.05 if top > 0 else 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=25, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(NORM_LABEL)
    if top == 0:
        axes.text(
            0.5, 0.5, "no active tensor in any layer", transform=axes.transAxes, ha="center", va="center"
        )


def _swatch(colour: str, *, pale: bool) -> Any:
    """A coloured patch for a legend."""
    from matplotlib.patches import Patch

    return Patch(color=colour, alpha=0.25 if pale else 0.9)


def _draw_profiles(
    axes: Any, log: GradientNormLog, columns: Sequence[str], rows: Sequence[int], handles: dict[str, Any]
) -> None:
    """The profiles of one panel; fills `handles` with one line per row."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    layers = [parse_column(column).layer for column in columns]
    size = 4 if len(layers) <= 24 else 2.5
    drawn: list[float] = []
    for place, row in enumerate(rows):
        colour = colormaps["viridis"](0.9 * place / max(1, len(rows) - 1))
        look: dict[str, Any] = {
            "color": colour,
            "marker": "osD^vPX"[place % 7],
            "markersize": size,
            "linewidth": 1.4,
        }
        handles.setdefault(str(row), Line2D([], [], **look))
        values = [log.layer_data[column][row] for column in columns]
        numbers = [v if v is not None and math.isfinite(v) and v > 0 else math.nan for v in values]
        if any(not math.isnan(v) for v in numbers):
            axes.plot(layers, numbers, **look)
            drawn += [v for v in numbers if not math.isnan(v)]
    if drawn:
        _widen(axes, drawn)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
        axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    else:
        axes.set_xticks([])
        blank = all(log.layer_data[column][row] is None for column in columns for row in rows)
        note = "no active tensor\nat these steps" if blank else "no finite norm above zero\nat these steps"
        axes.text(
            0.5, 0.5, note, transform=axes.transAxes, ha="center", va="center",
            color=INK,
        )  # fmt: skip


def _widen(axes: Any, values: Sequence[float]) -> None:
    """Make room for values on a logarithmic axis that panels share."""
    low, high = min(values), max(values)
    if axes.get_yscale() == "log":
        low, high = min(low, axes.get_ylim()[0]), max(high, axes.get_ylim()[1])
    log_axis(axes, low, high)
