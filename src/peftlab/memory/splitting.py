"""The rows of an optimizer step in as few forward passes as fit into memory.

How many rows make a step is part of what is learned; in how many passes they are computed is not (decision 0004: the loss
is a sum over the step's terms). So only the second is chosen from the memory that there is.
"""

from __future__ import annotations

from peftlab.batches import IGNORED, Row
from peftlab.config import RunConfig
from peftlab.devices import num_processes
from peftlab.errors import ConfigError, ModelError
from peftlab.loading import ModelSource
from peftlab.memory.fitting import BatchChoice, choose_batch_size
from peftlab.memory.measuring import confirm_with
from peftlab.memory.prediction import find_structure
from peftlab.memory.steps import BatchShape


def longest_batch(rows: list[Row], num_rows: int) -> BatchShape:
    """The batch that takes the most memory.

    Args:
        rows: All rows that are trained on.
        num_rows: Rows of one batch.

    Returns:
        Its shape: the longest input and the longest labels of any row, and as many labelled tokens as the rows with the
        most of them have on average.
    """
    labelled = sorted((sum(label != IGNORED for label in row.labels) for row in rows), reverse=True)[
        :num_rows
    ]
    return BatchShape(
        num_rows,
        max(len(row.input_ids) for row in rows),
        max(len(row.labels) for row in rows),
        -(-sum(labelled) // len(labelled)),
    )


def split_step(
    config: RunConfig,
    *,
    source: ModelSource | None = None,
    shape: BatchShape | None = None,
    memory: int | None = None,
    confirm: bool = True,
) -> tuple[RunConfig, BatchChoice]:
    """Choose batch size and accumulation steps anew, with the same product, so that the longest batch fits.

    Args:
        config: The run; `batch_size` times `accumulation_steps` rows make its step.
        source: The base; None finds it by its config, for a prediction alone.
        shape: The longest rows, whatever their number; None takes `task.max_length` tokens.
        memory: Bytes there are; None looks at the device.
        confirm: Whether real steps on the longest batch, with the base's weights, are taken and measured.

    Returns:
        The config with both numbers, which asks for no further choice, and what was predicted and measured of it.

    Raises:
        ConfigError: Several processes would have to choose the same; or rows are longer than the model's positions.
        ModelError: Not even one row fits, or its memory cannot be predicted.
        RunError: The real step took more than there is.
    """
    if num_processes() > 1:
        raise ConfigError(
            "training.auto_batch_size (--auto_batch_size) looks at the memory of one process, and this run has"
            f" {num_processes()}; set training.batch_size and training.accumulation_steps, `peftlab plan` says what fits"
        )
    # what is chosen once is kept: the same config, given back on another machine, repeats the run
    fixed = _with_training(config, auto_batch_size=False)
    source = source or find_structure(config)
    try:
        choice = choose_batch_size(
            fixed,
            source=source,
            shape=shape,
            memory=memory,
            keep_step=True,
            confirm=confirm_with(source) if confirm else None,
        )
    except ModelError as error:
        raise ModelError(
            f"training.auto_batch_size (--auto_batch_size) finds no batch size: {error}"
        ) from error
    chosen = {"batch_size": choice.batch_size, "accumulation_steps": choice.accumulation_steps}
    return _with_training(fixed, **chosen), choice


def _with_training(config: RunConfig, **changed: int) -> RunConfig:
    """The config with other settings of training."""
    return config.model_copy(update={"training": config.training.model_copy(update=changed)})


def describe_split(choice: BatchChoice) -> str:
    """A choice in words.

    Args:
        choice: What was chosen.

    Returns:
        One line for a pre-flight.
    """
    passes = (
        "1 forward pass" if choice.accumulation_steps == 1 else f"{choice.accumulation_steps} forward passes"
    )
    said = (
        f"auto_batch_size: {choice.batch_size} rows x {passes} a step; predicted peak of the longest batch"
        f" {choice.prediction.peak_bytes:,} bytes"
    )
    if choice.measured is not None:
        said += f", measured {choice.measured.peak_bytes:,} ({choice.measured.account})"
    return said
