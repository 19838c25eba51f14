"""Charts of a run, drawn from its files, and its numbers as text.

Every chart is `plot_x(source, output_path, *, phases=None) -> Path`.
"""

from __future__ import annotations

from peftlab.figures.digest import generate_summary_report
from peftlab.figures.layers import plot_gradient_evolution, plot_layer_comparison, plot_layer_heatmap
from peftlab.figures.losses import plot_training_loss
from peftlab.figures.norms import plot_gradient_norms
from peftlab.figures.ranks import plot_rank_allocation, plot_rank_heatmap

__all__ = [
    "generate_summary_report",
    "plot_gradient_evolution",
    "plot_gradient_norms",
    "plot_layer_comparison",
    "plot_layer_heatmap",
    "plot_rank_allocation",
    "plot_rank_heatmap",
    "plot_training_loss",
]
