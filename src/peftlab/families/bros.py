"""BROS: every word has a box on the page."""

from typing import Any


def inputs(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Boxes beside the tokens.

    Args:
        model: The twin.
        given: The usual inputs.

    Returns:
        The inputs with `bbox` (batch, seq, 4).
    """
    import torch

    return {**given, "bbox": torch.rand(*given["input_ids"].shape, 4)}
