"""Charts of attention: heads over words as heat-maps, and what every head of every layer does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.figures.activations import LINE_STYLES
from peftlab.figures.canvas import FAINT, INK, MUTED, RUN_COLOURS, heading, plain, say, sheet

MOST_WORDS = 32
"""Words of a text that are drawn; a longer one is cut, and the chart says so."""
_MOST_PER_ROW = 4
_LONGEST_WORD = 14
_NAMES = {
    "entropy": ("entropy", "nats: how widely a query looks"),
    "sink_mass": ("on the first token", "share of a query's attention"),
    "previous_token_mass": ("on the previous token", "share"),
    "distance": ("distance", "tokens looked over"),
    "same_token_mass": ("on the same token", "share"),
    "learnt_sink_mass": ("on the learnt sink", "share"),
}
"""Statistic to its name and unit."""
_SHARES = ("sink_mass", "previous_token_mass", "same_token_mass", "learnt_sink_mass")


@dataclass(frozen=True, slots=True)
class HeadMap:
    """One head over words.

    Attributes:
        title: Which head, and why it is shown.
        weights: (query words, key words); NaN for a word without tokens.
    """

    title: str
    weights: Any


def plot_attention_words(
    maps: Sequence[HeadMap],
    output_path: str | Path,
    *,
    title: str,
    subtitle: str,
    queries: Sequence[str],
    keys: Sequence[str],
) -> Path:
    """Draw heads over words: a row is the word that looks, a column the word looked at.

    Args:
        maps: The heads.
        output_path: The PNG file.
        title: Which layer.
        subtitle: How to read it.
        queries: Words of the rows.
        keys: Words of the columns.

    Returns:
        The file.

    Raises:
        OutputError: The file cannot be written.
    """
    rows, columns = min(len(queries), MOST_WORDS), min(len(keys), MOST_WORDS)
    across = min(len(maps), _MOST_PER_ROW, 2 if columns > 14 else _MOST_PER_ROW)
    down = -(-len(maps) // across)
    cell = min(0.26, (8.1 - 0.2 * across) / across / max(columns, 1))
    label = 0.075 * min(_LONGEST_WORD, max(map(len, keys[:columns]), default=0))
    height = 0.75 + down * (0.4 + label + cell * rows)
    if len(queries) > rows or len(keys) > columns:
        subtitle += f" · the first {MOST_WORDS} words"
    with sheet(output_path, width=10.0, height=height) as figure:
        heading(figure, title, subtitle)
        grid = figure.subplots(down, across, squeeze=False)
        scale = None
        for place, axes in enumerate(grid.flat):
            if place >= len(maps):
                axes.set_axis_off()
                continue
            shown = maps[place].weights[:rows, :columns]
            scale = _draw_map(
                axes, shown, maps[place].title, queries[:rows], keys[:columns], first=place % across == 0
            )
        small = cell * rows < 1.6
        bar = figure.colorbar(
            scale, ax=list(grid.flat), label="attention", fraction=0.025, pad=0.015, aspect=18,
            shrink=0.9 if small else 0.5, ticks=[0, 0.2, 1] if small else [0, 0.05, 0.2, 0.5, 1],
        )  # fmt: skip
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
    return Path(output_path)


def _draw_map(
    axes: Any, weights: Any, title: str, queries: Sequence[str], keys: Sequence[str], *, first: bool
) -> Any:
    """One head."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    colours = colormaps["Blues"].with_extremes(bad="#eceef0")
    scale = PowerNorm(0.5, 0, 1)  # so that attention spread over many words is seen too
    image = axes.imshow(np.ma.masked_invalid(weights), cmap=colours, norm=scale, aspect="equal")
    axes.set_title(plain(title, 44), fontsize=9.5)
    axes.grid(visible=False)
    size = 8.0 if max(len(queries), len(keys)) <= 24 else 6.5
    axes.set_xticks(
        range(len(keys)), [plain(word, _LONGEST_WORD) for word in keys], rotation=90, fontsize=size
    )
    named = list(queries) if first else []
    axes.set_yticks(range(len(named)), [plain(word, _LONGEST_WORD) for word in named], fontsize=size)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(FAINT)
    return image


def plot_head_statistics(layers: Sequence[Mapping[str, Any]], output_path: str | Path, *, title: str) -> Path:
    """Draw what every head of every layer does: one panel for each statistic, a row is a layer, a column a head.

    Args:
        layers: For each layer "layer" and, by name of a statistic, one number for each head (None for a blank).
        output_path: The PNG file.
        title: Which stack and kind of attention.

    Returns:
        The file.

    Raises:
        OutputError: The file cannot be written.
    """
    names = [name for name in _NAMES if any(_known(layer.get(name)) for layer in layers)][:4]
    span = layers[-1]["layer"] - layers[0]["layer"] + 1 if layers else 0
    height = 1.6 + max(1.4, min(6.0, 0.3 + 0.2 * span))
    with sheet(output_path, width=10.0, height=height if names else 3.0) as figure:
        heading(
            figure,
            title,
            "A row is a layer, a column a head · means over the tokens of all texts, special ones included",
        )
        if not names:
            say(figure.subplots(), "no statistic could be taken")
            return Path(output_path)
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            _draw_panel(figure, axes, layers, name)
    return Path(output_path)


def _known(values: Sequence[float | None] | None) -> bool:
    """Whether any head has a number."""
    return any(value is not None for value in values or ())


def _draw_panel(figure: Any, axes: Any, layers: Sequence[Mapping[str, Any]], name: str) -> None:
    """One statistic."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    heads = max(len(layer.get(name) or ()) for layer in layers)
    first, last = layers[0]["layer"], layers[-1]["layer"]
    grid = np.full((last - first + 1, heads), np.nan)  # layers without attention stay blank
    for layer in layers:
        values = layer.get(name) or ()
        grid[layer["layer"] - first, : len(values)] = [np.nan if v is None else v for v in values]
    limits = (0.0, 1.0) if name in _SHARES else (0.0, max(float(np.nanmax(grid)), 1e-9))
    colours = colormaps["viridis"].with_extremes(bad="#eceef0")
    shown = np.ma.masked_invalid(grid)
    image = axes.imshow(
        shown, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", origin="lower",
        extent=(-0.5, heads - 0.5, first - 0.5, last + 0.5),
    )  # fmt: skip
    called, unit = _NAMES[name]
    axes.set_title(called, fontsize=10)
    axes.set_xlabel("head")
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", pad=0.02, aspect=18, shrink=0.9)
    bar.set_label(unit, fontsize=8, color=MUTED)
    bar.ax.tick_params(labelsize=7.5)
    bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.outline.set_visible(False)
    bar.ax.grid(visible=False)


def plot_attention_comparison(
    models: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], output_path: str | Path
) -> Path:
    """Draw the attention of two models layer by layer, word by word, so that tokenizers do not matter.

    Args:
        models: For each model its name and its layers, as for `plot_head_statistics`, with the statistics between words.
        output_path: The PNG file.

    Returns:
        The file.

    Raises:
        OutputError: The file cannot be written.
    """
    panels = {
        "word_entropy": ("entropy over words", "nats"),
        "no_word_mass": ("on tokens of no word", "share"),
        "previous_word_mass": ("on the previous word", "share"),
        "word_distance": ("distance", "words"),
    }
    names = [n for n in panels if any(_known(layer.get(n)) for _, layers in models for layer in layers)]
    with sheet(output_path, width=10.0, height=3.6) as figure:
        heading(
            figure,
            "Attention, layer by layer",
            "Line: mean over heads · dots: heads · depth 0 is the first layer, 1 the last",
        )
        if not names:
            say(figure.subplots(), "neither model's attention could be taken word by word")
            return Path(output_path)
        handles: dict[str, Any] = {}
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for number, (label, layers) in enumerate(models):
                found = [(layer["layer"], layer[name]) for layer in layers if _known(layer.get(name))]
                _draw_profile(axes, found, max(layers[-1]["layer"], 1), number, handles, label)
            axes.set_title(panels[name][0], fontsize=10)
            axes.set_ylabel(panels[name][1])
            axes.set_xlabel("depth")
            axes.set_ylim(0, max(axes.get_ylim()[1], 0.05))
        labels = [plain(label, 28, keep_end=True) for label in handles]
        figure.legend(handles=list(handles.values()), labels=labels, loc="outside lower center", ncols=2)
    return Path(output_path)


def _draw_profile(
    axes: Any, found: Sequence[tuple[int, Sequence[float | None]]], most: int, number: int, handles: dict[str, Any],
    label: str,
) -> None:  # fmt: skip
    """One model in one panel."""
    colour = RUN_COLOURS[number % len(RUN_COLOURS)]
    look = {"color": colour, "linestyle": LINE_STYLES[number % len(LINE_STYLES)]}
    depths = [place / most for place, _ in found]
    means = []
    for depth, (_, heads) in zip(depths, found, strict=True):
        known = [value for value in heads if value is not None]
        means.append(sum(known) / len(known))
        axes.plot([depth] * len(known), known, "o", color=colour, alpha=0.25, markersize=3, markeredgewidth=0)
    if found:
        (handles[label],) = axes.plot(depths, means, linewidth=1.8, marker="o", markersize=4, **look)
