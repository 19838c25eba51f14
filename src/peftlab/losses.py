"""The losses of a run, as its event log has them."""

from __future__ import annotations

from dataclasses import dataclass

from peftlab.run import RunFolder

LOSS_LABEL = "loss (cross-entropy, nats)"


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of one run.

    Attributes:
        steps: Step of each training loss.
        training: The training losses.
        validation_steps: Step of each validation loss.
        validation: The validation losses.
        beside: What the training losses hold beside the cross-entropy, which the validation losses do not; "" for nothing.
    """

    steps: list[int]
    training: list[float]
    validation_steps: list[int]
    validation: list[float]
    beside: str = ""


def read_losses(run: RunFolder) -> Losses:
    """The losses that hold, in the order of their steps.

    Args:
        run: The run.

    Returns:
        The losses; empty where nothing was logged yet.

    Raises:
        RunError: The event log is damaged.
    """
    training: dict[int, float] = {}
    validation: dict[int, float] = {}
    for event in run.timeline():
        if event["event"] == "step":
            training[event["step"]] = float(event["loss"])
        elif event["event"] == "validated":
            validation[event["step"]] = float(event["validation_loss"])
    steps, marks = sorted(training), sorted(validation)
    return Losses(
        steps, [training[s] for s in steps], marks, [validation[s] for s in marks], beside=_beside(run)
    )


def _beside(run: RunFolder) -> str:
    """What a run's method adds to its training loss."""
    adapters = run.config.get("adapters") or [] if run.has(RunFolder.CONFIG) else []
    weights = [
        (adapter.get("settings") or {}).get("orthogonality")
        for adapter in adapters
        if adapter.get("method") == "adalora"
    ]
    return "AdaLoRA's orthogonality term" if any(weights) else ""
