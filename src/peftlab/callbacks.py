"""S1's public face on training: callbacks and a trainer that also work with a plain transformers `Trainer`.

`DynamicLoRACallback` switches phases, `GradientNormCallback` keeps gradient norms, `GradientMeasuringTrainer` shows it
the unclipped gradient. In a plain `Trainer` the callback sees gradients after clipping, and the log says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftlab.attaching.attachment import adapter_parameters
from peftlab.errors import ScheduleError
from peftlab.gradient_log import GradientNormLog, load_gradient_log
from peftlab.gradients import GradientGroups, measure_gradient_norms, read_gradients
from peftlab.mapping import map_model
from peftlab.phases import PhaseSwitch
from peftlab.schedule import GROUPS, Phase, Schedule

__all__ = [
    "DynamicLoRACallback",
    "GradientMeasuringTrainer",
    "GradientNormCallback",
    "create_layerwise_lora_config",
    "create_phased_lora_config",
    "measure_gradient_norms",
    "print_trainable_parameters",
    "setup_model_with_lora",
]

PhaseConfig = dict[str, Any]
"""S1's phase: start_step, end_step (None: to the end), active_modules, layer_range (both ends included) or None."""


def create_phased_lora_config(
    phase1_steps: tuple[int, int | None] = (0, 100),
    phase2_steps: tuple[int, int | None] = (100, 200),
    phase3_steps: tuple[int, int | None] = (200, None),
    phase1_modules: Sequence[str] = ("attention",),
    phase2_modules: Sequence[str] = ("mlp",),
    phase3_modules: Sequence[str] = ("attention", "mlp"),
) -> list[PhaseConfig]:
    """Three phases by parameter group, as S1 documents them.

    Args:
        phase1_steps: First step and the step after the last one; None leaves the end open.
        phase2_steps: The same for the second phase.
        phase3_steps: The same for the third.
        phase1_modules: Groups that train: attention, mlp, embed, lm_head, other.
        phase2_modules: The same for the second phase.
        phase3_modules: The same for the third.

    Returns:
        Phase configs for `DynamicLoRACallback`.

    Raises:
        ScheduleError: The phases leave a gap, overlap, or name an unknown group.
    """
    steps = (phase1_steps, phase2_steps, phase3_steps)
    modules = (phase1_modules, phase2_modules, phase3_modules)
    return _checked(
        [
            {"start_step": start, "end_step": end, "active_modules": list(groups), "layer_range": None}
            for (start, end), groups in zip(steps, modules, strict=True)
        ]
    )


def create_layerwise_lora_config(
    num_layers: int = 22,
    phase1_steps: tuple[int, int | None] = (0, 200),
    phase2_steps: tuple[int, int | None] = (200, None),
    active_modules: Sequence[str] = ("attention", "mlp"),
) -> list[PhaseConfig]:
    """Two phases by depth: the early half of the layers, then the late half.

    Args:
        num_layers: Number of layers of the model; the early half is the first floor(n/2).
        phase1_steps: First step and the step after the last one.
        phase2_steps: The same for the second phase.
        active_modules: Groups that train in both.

    Returns:
        Phase configs for `DynamicLoRACallback`.

    Raises:
        ScheduleError: The phases leave a gap or overlap, or there are fewer than two layers.
    """
    if num_layers < 2:
        raise ScheduleError(f"a model of {num_layers} layers has no two halves")
    half = num_layers // 2
    ranges = ((0, half - 1), (half, num_layers - 1))
    return _checked(
        [
            {
                "start_step": start,
                "end_step": end,
                "active_modules": list(active_modules),
                "layer_range": layers,
            }
            for (start, end), layers in zip((phase1_steps, phase2_steps), ranges, strict=True)
        ]
    )


def _checked(phases: list[PhaseConfig]) -> list[PhaseConfig]:
    """The phases, after a look at their order and groups."""
    last = phases[-1]["end_step"]
    _schedule(phases, total_steps=last if last is not None else phases[-1]["start_step"] + 1)
    for phase in phases:
        unknown = [group for group in phase["active_modules"] if group not in GROUPS]
        if unknown:
            raise ScheduleError(f"unknown groups {unknown}; there is: {', '.join(GROUPS)}")
    return phases


def _schedule(phases: Iterable[Mapping[str, Any]], *, total_steps: int) -> Schedule:
    """S1's phase configs as a schedule over a run."""
    placed = []
    for number, phase in enumerate(phases):
        end = phase.get("end_step")
        layers = phase.get("layer_range")
        groups = tuple(phase["active_modules"])
        placed.append(
            Phase(
                name=phase.get("name") or f"phase {number + 1} ({'+'.join(groups)})",
                start_step=phase["start_step"],
                end_step=total_steps if end is None else end,
                groups=groups,
                layers=None if layers is None else (layers[0], layers[1]),
            )
        )
    if placed and placed[-1].end_step < total_steps:
        raise ScheduleError(
            f"the last phase ends at step {placed[-1].end_step} but training runs to {total_steps}: leave it open (None)"
        )
    if placed and placed[-1].end_step > total_steps:
        raise ScheduleError(
            f"the last phase ends at step {placed[-1].end_step} but training has only {total_steps} steps"
        )
    return Schedule(tuple(placed), total_steps=total_steps)


class DynamicLoRACallback(TrainerCallback):  # type: ignore[misc]
    """Switches which LoRA tensors train, by the step, in any transformers `Trainer`.

    Frozen tensors have no gradient, so neither weight decay nor momentum moves them. Tensors that were frozen before the
    Trainer built its optimizer are added to it, so a later phase really trains them. A resumed run enters the phase of
    its step.

    Args:
        phase_configs: From `create_phased_lora_config` or `create_layerwise_lora_config`, or of the same shape.
        verbose: Whether a line is printed at every switch.
    """

    def __init__(self, phase_configs: list[PhaseConfig], verbose: bool = True) -> None:
        if not phase_configs:
            raise ScheduleError("DynamicLoRACallback needs at least one phase")
        self.phase_configs, self.verbose = phase_configs, verbose
        self._switch: PhaseSwitch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fit the phases to the model and enter the phase of the current step."""
        model = kwargs["model"]
        parameters = adapter_parameters(model)
        schedule = _schedule(self.phase_configs, total_steps=state.max_steps)
        self._switch = PhaseSwitch(schedule, map_model(model), parameters)
        _complete_optimizer(kwargs.get("optimizer"), parameters)
        self._update_lora_modules(state.global_step, kwargs.get("optimizer"))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter the next phase where one begins."""
        self._update_lora_modules(state.global_step, kwargs.get("optimizer"))

    def _update_lora_modules(self, step: int, optimizer: Any) -> None:
        """Apply the phase of a step."""
        if self._switch is None:
            return
        phase = self._switch.apply(step, getattr(optimizer, "optimizer", optimizer))
        if phase is not None and self.verbose:
            active = self._switch.active(phase)
            count = sum(p.numel() for p in active.values())
            print(f"step {step}: {phase.name}: {len(active)} tensors, {count:,} parameters train")

    def _get_layer_number(self, parameter_name: str, model: nn.Module | None = None) -> int | None:
        """The layer a parameter lies in, by its place in the model."""
        if model is not None:
            return map_model(model).locate(parameter_name).layer
        if self._switch is None:
            return None
        site = self._switch._sites.get(parameter_name)
        return None if site is None else site.layer


def _complete_optimizer(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Add the tensors to an optimizer that it does not have yet."""
    if optimizer is None:
        return
    inner = getattr(optimizer, "optimizer", optimizer)
    there = {id(p) for group in inner.param_groups for p in group["params"]}
    for parameter in parameters.values():
        if id(parameter) not in there:
            inner.param_groups[0]["params"].append(parameter)


class GradientNormCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradient norms of a training run and writes the three gradient files at its end.

    Args:
        config: Anything with `log_frequency`, `measure_group_norm`, `measure_layer_norm` (S1's
            `GradientAnalysisConfig`); defaults where None.
        output_dir: Folder for the files; nothing is written where None.
    """

    def __init__(self, config: Any = None, output_dir: str | Path | None = None) -> None:
        self.frequency = int(getattr(config, "log_frequency", 1))
        self.layers = bool(getattr(config, "measure_layer_norm", True))
        self.enabled = bool(getattr(config, "measure_group_norm", True)) or self.layers
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.log = GradientNormLog(clipped=True)
        self._groups: GradientGroups | None = None
        self._parameters: Mapping[str, nn.Parameter] = {}
        self.sees_unclipped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Map the model."""
        model = kwargs["model"]
        self._parameters = adapter_parameters(model)
        self._groups = GradientGroups(map_model(model), self._parameters)
        self.log = GradientNormLog(clipped=not self.sees_unclipped and args.max_grad_norm > 0)
        files = self.output_dir is not None and list(self.output_dir.glob("gradient_analysis.*"))
        if (
            state.global_step > 0 and files and self.output_dir is not None
        ):  # a resumed run goes on with its rows
            self.log = load_gradient_log(self.output_dir)
            self.log.truncate(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, unless a `GradientMeasuringTrainer` has shown the gradient before it was clipped."""
        if not self.sees_unclipped:
            self.measure(state.global_step + 1)

    def measure(self, step: int, *, scale: float = 1.0) -> None:
        """Record one row from the gradients as they stand now.

        Args:
            step: The optimizer step, counted from 1.
            scale: What the loss was multiplied by; divided out.
        """
        if self._groups is None or not self.enabled or step % self.frequency:
            return
        reading = read_gradients(self._parameters, scale=scale)
        self.log.append(step, self._groups.sum(reading, layers=self.layers))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the three files."""
        if self.output_dir is not None and self.log.steps:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.log.write(self.output_dir)


class GradientMeasuringTrainer(Trainer):  # type: ignore[misc]
    """A plain `Trainer` that shows its gradient callback the whole step's gradient, unscaled and before clipping.

    Args:
        gradient_callback: The callback that keeps the norms; may also stand in `callbacks`.
        *args: As for transformers' `Trainer`.
        **kwargs: As for transformers' `Trainer`.
    """

    def __init__(
        self, *args: Any, gradient_callback: GradientNormCallback | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_callback = gradient_callback
        if gradient_callback is not None:
            gradient_callback.sees_unclipped = True
            if gradient_callback not in self.callback_handler.callbacks:
                self.add_callback(gradient_callback)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One forward and backward pass; after the last of a step, the gradients are measured."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.gradient_callback is not None and self.accelerator.sync_gradients:
            scaler = getattr(self.accelerator, "scaler", None)
            scale = scaler.get_scale() if scaler is not None else 1.0
            self.gradient_callback.measure(self.state.global_step + 1, scale=scale)
        return loss


def setup_model_with_lora(model_config: Any, lora_config: Any) -> tuple[Any, Any]:
    """Load a base, add LoRA, freeze the base: S1's one call.

    Args:
        model_config: S1's `ModelConfig` (model id, dtype, gradient checkpointing).
        lora_config: S1's `LoRAConfig` (r, alpha, dropout, target group).

    Returns:
        The peft model and its tokenizer.

    Raises:
        ModelError: The base cannot be loaded.
        TargetError: The targets match nothing in it.
    """
    from peftlab.experiment_config import ExperimentConfig
    from peftlab.loading import find_model, load_model
    from peftlab.methods import lora

    config = ExperimentConfig(model=model_config, lora=lora_config).to_run_config()
    source = find_model(config.model)
    base = load_model(source, config.model)
    settings = lora.Settings(**config.adapters[0].settings)
    attached = lora.attach(base, map_model(base), settings, head=source.head, seed=config.training.seed)
    return attached.model, source.tokenizer


def print_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Print and return what trains: parameters and tensors are different numbers.

    Args:
        model: Any model.

    Returns:
        Trainable parameters and all parameters, each shared tensor once.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    count, total = sum(p.numel() for p in trainable), sum(p.numel() for p in model.parameters())
    share = 100 * count / total if total else 0.0
    with contextlib.suppress(BrokenPipeError):
        print(f"trainable: {count:,} parameters in {len(trainable)} tensors, {share:.4f}% of {total:,}")
    return count, total
