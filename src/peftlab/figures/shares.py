"""Where a model's parameters are: each layer's groups as bars, and the parts outside the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.figures.canvas import GROUP_COLOURS, GROUP_NAMES, heading, plain, sheet

_GROUPS = ("attention", "mlp", "embed", "lm_head", "other")
_ADAPTER = "#56b4e9"


def plot_parameter_shares(
    rows: Sequence[Mapping[str, Any]], stacks: Sequence[str], output_path: str | Path
) -> Path:
    """Draw the parameters of every layer by group, and beside them those outside the layers.

    Args:
        rows: stack, layer, group, parameters and adapter_parameters, as in `inspection.json`.
        stacks: Names of the stacks, in order.
        output_path: The PNG file.

    Returns:
        The file.

    Raises:
        OutputError: The file cannot be written.
    """
    from matplotlib.patches import Patch

    unit, name = _unit(max((_total(rows, row["stack"], row["layer"]) for row in rows), default=1))
    outside = [row for row in rows if row["layer"] is None]
    widths = [max(1.0, 0.25 * len({r["layer"] for r in rows if r["stack"] == stack})) for stack in stacks]
    with sheet(output_path, width=10.0, height=3.9) as figure:
        heading(
            figure, "Where the parameters are", f"In {name} · a tensor that two modules share counts once"
        )
        ratios = [*widths, 0.16 * sum(widths) + 0.1]
        all_axes = figure.subplots(1, len(stacks) + 1, squeeze=False, width_ratios=ratios, sharey=True)[0]
        found: set[str] = set()
        for axes, stack in zip(all_axes, stacks, strict=False):
            layers = sorted(
                {row["layer"] for row in rows if row["stack"] == stack and row["layer"] is not None}
            )
            _draw_bars(
                axes,
                [[r for r in rows if (r["stack"], r["layer"]) == (stack, i)] for i in layers],
                layers,
                unit,
                found,
            )
            _layer_axis(axes, layers, stack if len(stacks) > 1 else "layer")
        _draw_bars(all_axes[-1], [outside], [0], unit, found)
        all_axes[-1].set_xticks([0], ["outside\nthe layers"])
        all_axes[-1].set_xlim(-0.9, 0.9)
        all_axes[-1].grid(visible=False, axis="x")
        all_axes[0].set_ylabel(f"parameters, {name}")
        handles = [Patch(color=GROUP_COLOURS[g], label=GROUP_NAMES[g]) for g in _GROUPS if g in found]
        handles += [Patch(color=_ADAPTER, label="adapter")] if "adapter" in found else []
        figure.legend(handles=handles, loc="outside right upper")
    return Path(output_path)


def _unit(most: float) -> tuple[float, str]:
    """The unit that bars are drawn in."""
    for size, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= size:
            return size, name
    return 1.0, "single parameters"


def _total(rows: Sequence[Mapping[str, Any]], stack: str, layer: int | None) -> int:
    """Parameters of one bar."""
    return sum(
        r["parameters"] + r["adapter_parameters"] for r in rows if (r["stack"], r["layer"]) == (stack, layer)
    )


def _draw_bars(
    axes: Any,
    bars: Sequence[Sequence[Mapping[str, Any]]],
    places: Sequence[int],
    unit: float,
    found: set[str],
) -> None:
    """Stacked bars; notes which groups were drawn."""
    for place, rows in zip(places, bars, strict=True):
        bottom = 0.0
        for group in _GROUPS:
            size = sum(row["parameters"] for row in rows if row["group"] == group) / unit
            if size:
                axes.bar(place, size, 0.8, bottom=bottom, color=GROUP_COLOURS[group])
                found.add(group)
                bottom += size
        added = sum(row["adapter_parameters"] for row in rows) / unit
        if added:
            axes.bar(place, added, 0.8, bottom=bottom, color=_ADAPTER)
            found.add("adapter")


def _layer_axis(axes: Any, layers: Sequence[int], label: str) -> None:
    """The x axis of one stack."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14, min_n_ticks=1))
    axes.set_xlabel(plain(label, 30, keep_end=True))
    axes.grid(visible=False, axis="x")
    if layers:
        axes.set_xlim(min(layers) - 0.7, max(layers) + 0.7)
