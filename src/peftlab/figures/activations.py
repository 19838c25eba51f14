"""Charts of activations: norms of every token in every layer, and how the stream changes from layer to layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.figures.canvas import INK, MUTED, RUN_COLOURS, heading, log_axis, plain, plain_ticks, say, sheet

LINE_STYLES = ("-", (0, (4, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
"""Lines of several models: one that lies on another is seen."""
MOST_TOKENS = 60
"""Tokens that are drawn; a longer text is cut, and the chart says so."""


def plot_activation_norms(
    norms: Any, tokens: Sequence[str], output_path: str | Path, *, title: str, first_layer: int = 0
) -> Path:
    """Draw the length of every token's vector behind every layer.

    Args:
        norms: (layers, tokens), above 0.
        tokens: What each token stands for.
        output_path: The PNG file.
        title: Which stack and text.
        first_layer: Number of the first row.

    Returns:
        The file.

    Raises:
        OutputError: The file cannot be written.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    numbers = np.asarray(norms, dtype=float)[:, :MOST_TOKENS]
    shown = np.ma.masked_less_equal(np.ma.masked_invalid(numbers), 0)
    layers, count = numbers.shape
    extra = f" · the first {MOST_TOKENS} tokens" if len(tokens) > MOST_TOKENS else ""
    with sheet(output_path, width=10.0, height=2.0 + max(1.2, min(5.0, 0.2 * layers))) as figure:
        heading(figure, title, f"Norm of the vector behind each layer{extra}")
        axes = figure.subplots()
        if not shown.count():
            say(axes, "no norm is a number above zero")
            return Path(output_path)
        low, high = float(shown.min()), float(shown.max())
        scale = LogNorm(low, high) if high > 5 * low else Normalize(low, high)
        colours = colormaps["magma"].with_extremes(bad="#eceef0")
        image = axes.imshow(
            shown, cmap=colours, norm=scale, aspect="auto", origin="lower",
            extent=(-0.5, count - 0.5, first_layer - 0.5, first_layer + layers - 0.5),
        )  # fmt: skip
        size = 8.0 if count <= 36 else 6.5
        axes.set_xticks(range(count), [plain(t, 14) for t in tokens[:count]], rotation=90, fontsize=size)
        axes.tick_params(axis="x", length=0, colors=INK)
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, label="norm", pad=0.012, fraction=0.03, aspect=22)
        if high > 5 * low:
            plain_ticks(bar.ax.yaxis, low, high)
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
    return Path(output_path)


def plot_layer_profile(
    stacks: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], output_path: str | Path
) -> Path:
    """Draw norms, the largest single activation and the cosine to the next layer, over layers.

    Args:
        stacks: Name of each stack, or model, and the numbers of its layers.
        output_path: The PNG file.

    Returns:
        The file.

    Raises:
        OutputError: The file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    with sheet(output_path, width=10.0, height=3.8) as figure:
        heading(
            figure,
            "The stream from layer to layer",
            "Over the tokens of all texts, special ones included · whiskers reach from the median to the largest norm ·"
            " ringed: massive",
        )
        norm_axes, ratio_axes, cosine_axes = figure.subplots(1, 3)
        handles = {}
        drawn: dict[Any, list[float]] = {norm_axes: [], ratio_axes: []}
        for number, (name, layers) in enumerate(stacks):
            handles[name] = _draw_stack(norm_axes, ratio_axes, cosine_axes, layers, number, drawn)
        for axes, title in (
            (norm_axes, "norm of a token"),
            (ratio_axes, "largest activation / median"),
            (cosine_axes, "cosine to the next layer"),
        ):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
            positive = [value for value in drawn.get(axes, ()) if value > 0]
            if positive:
                log_axis(axes, min(positive), max(positive))
        low, high = cosine_axes.get_ylim()
        cosine_axes.set_ylim(min(low, 0.0), max(high, 1.02))
        if not any(layer["cosine_to_next"] is not None for _, layers in stacks for layer in layers):
            say(cosine_axes, "one layer only")
        if len(handles) > 1:
            labels = [plain(label, 28, keep_end=True) for label in handles]
            figure.legend(handles=list(handles.values()), labels=labels, loc="outside lower center", ncols=4)
    return Path(output_path)


def _draw_stack(
    norm_axes: Any, ratio_axes: Any, cosine_axes: Any, layers: Sequence[Mapping[str, Any]], number: int,
    drawn: dict[Any, list[float]],
) -> Any:  # fmt: skip
    """One stack in the three panels; returns its line for the legend."""
    colour = RUN_COLOURS[number % len(RUN_COLOURS)]
    style = LINE_STYLES[number % len(LINE_STYLES)]
    look = {"color": colour, "linestyle": style, "linewidth": 1.6, "marker": "o", "markersize": 3.5}
    norms = [
        (layer["layer"], layer["median_norm"], layer["largest_norm"])
        for layer in layers
        if layer["median_norm"] is not None and layer["largest_norm"] is not None
    ]
    places, middle, largest = zip(*norms, strict=True) if norms else ((), (), ())
    (line,) = norm_axes.plot(places, middle, **look)
    norm_axes.vlines(places, middle, largest, color=colour, alpha=0.5, linewidth=1.2)
    norm_axes.plot(places, largest, "_", color=colour, markersize=6)
    drawn[norm_axes] += [*middle, *largest]
    ratios = _known_pairs((layer["layer"], layer["top_dimensions"][0]["ratio"]) for layer in layers)
    ratio_axes.plot(list(ratios), list(ratios.values()), **look)
    drawn[ratio_axes] += ratios.values()
    cosines = _known_pairs((layer["layer"], layer["cosine_to_next"]) for layer in layers)
    cosine_axes.plot(list(cosines), list(cosines.values()), **look)
    massive = [layer["layer"] for layer in layers if layer["massive"]]
    ring = {"color": colour, "markersize": 9, "fillstyle": "none", "markeredgecolor": MUTED}
    ratio_axes.plot(massive, [ratios[place] for place in massive], "o", **ring)
    return line


def _known_pairs(pairs: Iterable[tuple[int, float | None]]) -> dict[int, float]:
    """Layer to number, without those that have none."""
    return {layer: value for layer, value in pairs if value is not None}
