"""What the benchmarks of training share: peftlab's own trainer as a run has it, a clock of steps, an equal start."""

from __future__ import annotations

import sys
import time
import zlib
from pathlib import Path
from typing import Any


class StepClock:
    """A transformers callback's two moments, kept as seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def callback(self) -> Any:
        """The callback."""
        from transformers import TrainerCallback

        clock = self

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock._began = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.seconds.append(time.perf_counter() - clock._began)

        return Clock()


def logged(trainer: Any) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def start_alike(model: Any) -> Any:
    """Give every A of LoRA the numbers that its name gives, in all contenders, so that their losses are comparable."""
    import torch

    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            place = name.rpartition(".layers.")[2].partition(".lora_A.")[0]
            made = torch.Generator().manual_seed(zlib.crc32(place.encode()))
            bound = parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=made)
            parameter.data.copy_(values)
    return model


def make_parts(
    attached: Any,
    tokenizer: Any,
    rows: list[Any],
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    trunk_bytes: int = 0,
    probes: dict[str, Any] | None = None,
    **training: Any,
) -> tuple[Any, Any]:
    """What a run's trainer is made of, and its arguments, by which it neither validates nor writes.

    Args:
        attached: The adapter on its base.
        tokenizer: Its tokenizer.
        rows: The rows.
        folder: Where it might write.
        steps: How many.
        batch_size: Rows of each.
        trunk_bytes: Most bytes of kept hidden states.
        probes: Running probes by name; all that there are where None.
        training: Further settings of `training`.

    Returns:
        The parts, and transformers' arguments.
    """
    from peftlab.batches import Collator
    from peftlab.config import build_config
    from peftlab.step_engine import choose_engine
    from peftlab.training import TrainingParts, make_arguments

    asked = {
        "max_steps": steps, "batch_size": batch_size, "learning_rate": 2e-4, "warmup_steps": 0,
        "curve": "constant", "validation_steps": steps + 1, "save_steps": steps + 1,
    }  # fmt: skip
    config = build_config({"training": asked | training, "model": {"device": "cpu"}})
    pad_id, schedule = tokenizer.pad_token_id, config.make_schedule()
    engine = choose_engine(attached, rows, config.training, head="causal", pad_id=pad_id)
    print(engine.found, file=sys.stderr)
    parts = TrainingParts(
        attached, schedule, engine.objective, Collator(pad_id, "causal"), rows, rows[:1], trunk_bytes=trunk_bytes,
        probes=all_probes(attached) if probes is None else probes, **engine.layout(),
    )  # fmt: skip
    arguments = make_arguments(config, folder, schedule)
    arguments.save_strategy = arguments.eval_strategy = "no"
    return parts, arguments


def make_lab_trainer(
    attached: Any, tokenizer: Any, rows: list[Any], folder: Path, clock: StepClock, **how: Any
) -> Any:
    """A run's trainer on rows in their order; `how` is as `make_parts` takes it."""
    from peftlab.batches import EpochOrder
    from peftlab.trainer import LabTrainer

    trainer = LabTrainer(*make_parts(attached, tokenizer, rows, folder, **how), [clock.callback()])
    order = trainer.order
    assert isinstance(order, EpochOrder)
    order._epoch_rows = lambda epoch: list(range(len(rows)))  # type: ignore[method-assign]
    return trainer


def all_probes(attached: Any) -> dict[str, Any]:
    """Every probe that there is, those of the method too, running."""
    from peftlab.catalog import PROBES
    from peftlab.gradients import GradientGroups
    from peftlab.probe import ProbeContext, Recording

    context = ProbeContext(GradientGroups(attached.family, attached.parameters()))
    found = {}
    for name in PROBES.names():
        leaf = PROBES.load(name)
        found[name] = leaf.start(context, leaf.Settings())
    return found | (attached.probes() if isinstance(attached, Recording) else {})
