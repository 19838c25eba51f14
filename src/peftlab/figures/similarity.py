"""Layer-by-layer similarity of two models as heat-maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.figures.canvas import heading, plain, sheet


def plot_similarity(similarity: Mapping[str, Any], names: Sequence[str], output_path: str | Path) -> Path:
    """Draw debiased CKA of every layer of one model with every layer of another, with and without the top dimensions.

    Args:
        similarity: all_dimensions, without_top (lists of rows), chance, chance_without_top, words, left_out.
        names: The two models.
        output_path: The PNG file.

    Returns:
        The file.

    Raises:
        OutputError: The file cannot be written.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    panels = (
        ("all_dimensions", "chance", "all dimensions"),
        ("without_top", "chance_without_top", f"without the {similarity['left_out']} of largest variance"),
    )
    with sheet(output_path, width=10.0, height=5.2) as figure:
        heading(
            figure,
            "How alike the layers are",
            f"Debiased linear CKA over {similarity['words']:,} words · 1: the same up to rotation and scale ·"
            " 0: nothing in common",
        )
        all_axes = figure.subplots(1, 2)
        image = None
        for axes, (key, chance, title) in zip(all_axes, panels, strict=True):
            rows = np.array(
                [[np.nan if v is None else v for v in row] for row in similarity[key]], dtype=float
            )
            image = axes.imshow(
                np.ma.masked_invalid(rows), cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto"
            )
            axes.set_title(f"{title}\nby chance up to {similarity[chance]:.2f}", fontsize=9.5)
            axes.set_xlabel(f"layer of {plain(names[1], 26, keep_end=True)}")
            axes.set_ylabel(f"layer of {plain(names[0], 26, keep_end=True)}")
            axes.grid(visible=False)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
            if rows.size <= 64:
                _write_numbers(axes, rows)
        bar = figure.colorbar(image, ax=list(all_axes), label="CKA", fraction=0.03, pad=0.015, aspect=26)
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
    return Path(output_path)


def _write_numbers(axes: Any, rows: Any) -> None:
    """The numbers in the cells, where there are few."""
    import numpy as np

    for (y, x), value in np.ndenumerate(rows):
        if np.isfinite(value):
            colour = "white" if value < 0.6 else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=colour)
