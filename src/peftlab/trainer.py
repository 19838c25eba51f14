"""The trainer: one narrow subclass of transformers' `Trainer`.

It owns five things: the objective, the optimizer's parameters, the moment at which gradients are seen (the whole
accumulated step, unscaled, before clipping), the order of rows, and the checkpoint files. Everything else is
transformers' or lies in callbacks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from peftlab.batches import EpochOrder, count_tokens
from peftlab.checkpoint import (
    ADAPTER_FILE,
    STATE_FILE,
    load_adapter,
    load_optimizer,
    prune_checkpoints,
    read_state,
    save_optimizer,
)
from peftlab.errors import ConfigError, NonFiniteError
from peftlab.files import new_folder, verify_folder, write_json
from peftlab.moments import Moments
from peftlab.passes import RowPasses
from peftlab.phases import PhaseSwitch
from peftlab.proof import PhaseProof, TrainingProof
from peftlab.streams import seed_for
from peftlab.training import TrainingParts
from peftlab.watching import StepWatch


class LabTrainer(Trainer):  # type: ignore[misc]
    """Trains an adapter and shows that it trains.

    Args:
        parts: What it is made of.
        args: transformers' arguments; `output_dir` is where checkpoints go.
        callbacks: Further transformers callbacks.
    """

    lr_scheduler: Any
    optimizer: Any
    control: Any

    def __init__(
        self, parts: TrainingParts, args: TrainingArguments, callbacks: list[Any] | None = None
    ) -> None:
        passes = RowPasses(
            parts.attachment, parts.collator, parts.isolation, trunk_bytes=parts.trunk_bytes if args.world_size == 1 else 0
        )  # fmt: skip
        super().__init__(
            model=parts.attachment.model,
            args=args,
            train_dataset=parts.train_rows,
            eval_dataset=parts.validation_rows,
            data_collator=passes.collate,
            callbacks=callbacks,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "FSDP and DeepSpeed are not supported yet: peftlab's checkpoints do not know their shards"
            )
        self.parts, self.passes = parts, passes
        parts.attachment.begin(parts.schedule)
        self.parameters = parts.attachment.parameters()
        self.switch = PhaseSwitch(
            parts.schedule, parts.attachment.family, self.parameters, parts.attachment.model
        )
        self.proof = TrainingProof(self.parameters, parts.attachment.steps_to_train)
        self.num_tokens = 0
        self.aside_seconds = 0.0
        self.stopped_early = False
        self.order = EpochOrder(
            len(parts.train_rows),
            rows_per_step=args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
            batch_size=args.per_device_train_batch_size,
            seed=parts.seed,
            lengths=None if parts.grouping is None else parts.grouping.lengths(parts.train_rows),
        )
        self.watch = StepWatch(
            self.parameters, self.proof, parts.probes, rows_of_step=self._ids_of_step, every=max(1, int(args.logging_steps))
        )  # fmt: skip
        self._micro_step = 0
        # the objective divides by the labels of the whole step, so nothing is left for the Trainer to divide by
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        self.add_callback(Moments(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **others: Any) -> Any:
        """Train, from a checkpoint or from the start: then the method sees the first rows, where it starts from them.

        Args:
            resume_from_checkpoint: The checkpoint's folder.
            rest: As transformers takes them.
            others: As transformers takes them.

        Returns:
            transformers' output.
        """
        if not resume_from_checkpoint:
            self.parts.attachment.prepare(self._first_batches())
        return super().train(resume_from_checkpoint, *rest, **others)

    def _first_batches(self) -> Iterator[dict[str, Any]]:
        """The batches of one epoch in the order of training, of all processes: what a method may start from."""
        size = self.args.per_device_train_batch_size
        for step in range(self.order.steps_per_epoch):
            rows = [self.parts.train_rows[i] for i in self.order.rows_of_step(step)]
            for start in range(0, len(rows), size):
                yield self.parts.collator(rows[start : start + size])

    def _ids_of_step(self, step: int) -> list[str]:
        """The ids of the rows of a step, counted from 0, of all processes."""
        return [self.parts.train_rows[i].id for i in self.order.rows_of_step(step)]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in the run's own order, shared among the processes."""
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset, batch_sampler=self.order, collate_fn=self.data_collator, pin_memory=False
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimizer step and the number of loss terms in them, over all processes."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        terms = sum(self.parts.objective.count(batch) for batch in batches)
        tokens = sum(count_tokens(batch) for batch in batches)
        counts = torch.tensor([terms, tokens], device=device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        total = counts.tolist()
        self.num_tokens += int(total[1])
        return batches, int(total[0])

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's sum over this batch as its share of the whole step's mean."""
        total = self.parts.objective.total(model, inputs)
        # DDP averages gradients over processes, the step's mean is a sum of shares
        return total * (self.args.world_size / num_items_in_batch)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The passes over one batch, each in its own random stream; after the last of a step, the gradients are seen."""
        step, grouping = self.state.global_step, self.parts.grouping
        batches = [inputs] if grouping is None else grouping.split(inputs)
        shares = []
        for number, batch in enumerate(batches):
            place = (step, self._micro_step, self.args.process_index, *([number] if number else []))
            torch.manual_seed(seed_for(self.parts.seed, "dropout", *place))
            is_last = number == len(batches) - 1
            apart = nullcontext() if is_last else self.accelerator.no_sync(model)
            with self.passes.around(batch), apart:
                shares.append(super().training_step(model, batch, num_items_in_batch))
        self._micro_step += 1
        loss = torch.stack(shares).sum()
        self.watch.note_loss(loss, step + 1)
        if self.accelerator.sync_gradients:
            self._micro_step = 0
            scaler = getattr(self.accelerator, "scaler", None)
            scale = scaler.get_scale() if scaler is not None else 1.0
            self.watch.note_gradients(step + 1, self.parts.schedule.phase_at(step).name, scale=scale)
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer over every tensor of every phase; phases are applied when training begins."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decay = self.args.weight_decay
            self.optimizer = self.parts.attachment.make_optimizer(kind, options, weight_decay=decay)
        optimizer: torch.optim.Optimizer = (
            super().create_optimizer() if model is None else super().create_optimizer(model)
        )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Transformers' place for the learning rate, filled by the schedule."""
        if self.lr_scheduler is None:
            peak = self.parts.schedule.learning_rate
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: self.parts.schedule.learning_rate_at(step) / peak,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def enter_phase(self) -> None:
        """Put the model into the phase of the step about to be taken."""
        step = self.state.global_step
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        phase = self.switch.apply(step, optimizer)
        if phase is None:
            return
        self.watch.look()  # what was not looked at belongs to the phase before
        self.proof.enter(phase.name)
        kind = "phase_started" if step == phase.start_step else "phase_resumed"
        found = self.passes.enter(
            phase, list(self.switch.active(phase)), self.order, self.parts.train_rows, self.parts.validation_rows
        )  # fmt: skip
        self.parts.event(kind, **self.switch.describe(phase), step=step, **found)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation loss: the mean over all terms of all rows, whatever the batches.

        Args:
            eval_dataset: Rows; the validation rows where None.
            ignore_keys: Unused, transformers passes it.
            metric_key_prefix: Prefix of the returned key.

        Returns:
            `{prefix}_loss`.

        Raises:
            NonFiniteError: The loss is NaN or infinite.
        """
        self.watch.look()
        began = time.perf_counter()
        rows = self.parts.validation_rows if eval_dataset is None else eval_dataset
        if (grouping := self.parts.grouping) is not None:
            rows = sorted(rows, key=grouping.length)
        model, size = self.parts.attachment.answering, self.args.per_device_eval_batch_size
        mine = [rows[i : i + size] for i in range(0, len(rows), size)][
            self.args.process_index :: self.args.world_size
        ]
        sums = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for chunk in mine:
                batch = self._prepare_inputs(self.data_collator(chunk))
                with self.passes.around(batch):
                    sums[0] += float(self.parts.objective.total(model, batch))
                sums[1] += self.parts.objective.count(batch)
        self.model.train()
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").cpu()
        loss = float(sums[0] / sums[1])
        if not torch.isfinite(sums).all():
            raise NonFiniteError(f"step {self.state.global_step}: the validation loss is {loss}")
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.aside_seconds += time.perf_counter() - began
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the validation loss is the lowest so far of an adapter that is what it shall be."""
        complete = self.parts.attachment.is_complete(self.state.global_step)
        return complete and bool(super()._determine_best_metric(metrics, trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write adapter, optimizer, progress and logs aside, then rename."""
        step = self.state.global_step
        path = Path(self.args.output_dir) / f"checkpoint-{step}"
        if self.args.should_save:
            began = time.perf_counter()
            with new_folder(path) as folder:
                self.write_checkpoint(folder)
            prune_checkpoints(
                path.parent, keep=self.parts.keep_checkpoints, best_step=self.state.best_global_step
            )
            seconds = time.perf_counter() - began
            self.aside_seconds += seconds
            self.parts.event("checkpoint_saved", step=step, path=path.name, seconds=round(seconds, 3))
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    def write_checkpoint(self, folder: Path) -> None:
        """Fill a checkpoint folder.

        Args:
            folder: The folder, aside of its final place.
        """
        from safetensors.torch import save_file

        self.watch.look()
        save_file(self.parts.attachment.tensors(), folder / ADAPTER_FILE)
        save_optimizer(getattr(self.optimizer, "optimizer", self.optimizer), self._names(), folder)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        step = self.state.global_step
        state = {
            "step": step,
            "phase": self.parts.schedule.phase_at(max(0, step - 1)).name,
            "num_tokens": self.num_tokens,
            "best_step": self.state.best_global_step,
            "best_loss": self.state.best_metric,
            "stopped_early": self.stopped_early,
            "probes": {name: probe.state() for name, probe in self.parts.probes.items()},
        }
        write_json(folder / STATE_FILE, state)

    def _names(self) -> dict[torch.Tensor, str]:
        """The name of every tensor that an optimizer may hold: LoRA-FA's holds frozen ones too."""
        return {parameter: name for name, parameter in self.parts.attachment.model.named_parameters()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put the adapter's tensors back."""
        self.parts.attachment.load(load_adapter(Path(resume_from_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Put the optimizer's moments, the learning rate and the logs back."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        load_optimizer(getattr(self.optimizer, "optimizer", self.optimizer), self._names(), folder)
        step = self.restore_logs(folder)
        for group, rate in zip(self.optimizer.param_groups, self._rates(step), strict=True):
            group["lr"] = rate
        scheduler: Any = self.lr_scheduler
        scheduler.last_epoch, scheduler._last_lr = step, self._rates(step)

    def restore_logs(self, folder: Path) -> int:
        """Go on from a checkpoint's token count and probe records.

        Args:
            folder: The checkpoint folder.

        Returns:
            Its step.
        """
        state = read_state(folder)
        step = int(state["step"])
        self.num_tokens = int(state["num_tokens"])
        for name, probe in self.parts.probes.items():
            if name in state["probes"]:
                probe.restore(state["probes"][name], step=step)
        return step

    def _rates(self, step: int) -> list[float]:
        """The learning rate of a step for each parameter group, as the scheduler would have set it."""
        factor = self.parts.schedule.learning_rate_at(step) / self.parts.schedule.learning_rate
        return [float(base) * factor for base in self.lr_scheduler.base_lrs]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: random streams are keyed by step."""

    def load_checkpoint_adapter(self, step: int) -> None:
        """Put the adapter of an earlier step of this run back.

        Args:
            step: A step that has a checkpoint.

        Raises:
            CheckpointError: It is gone or damaged.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        verify_folder(folder)
        self.parts.attachment.load(load_adapter(folder))

    def prove_step(self) -> None:
        """Compare the tensors after the optimizer has moved, report a phase once it is proved; then the method's turn."""
        step = self.state.global_step
        rate = self.parts.schedule.learning_rate_at(step)
        proof: PhaseProof | None = self.proof.after_step(learning_rate=rate, step=step + 1)
        if proof is not None:
            self.parts.event(
                "phase_proved",
                step=step + 1,
                phase=proof.phase,
                tensors=proof.tensors,
                steps_needed=proof.steps_needed,
                unreached=list(proof.unreached),
            )
        self.parts.attachment.after_step(step + 1)
