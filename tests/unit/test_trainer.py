"""The lab's trainer: phases hold to the bit, the numbers are those of the mathematics, watching changes nothing."""

import math
import pickle

import pytest
import torch
from transformers import Trainer

import tiny_models
from peftlab.batches import IGNORED, EpochOrder, Row
from peftlab.checkpoint import last_good_checkpoint, list_checkpoints
from peftlab.errors import NonFiniteError, NotTrainingError
from peftlab.phases import PhaseSwitch
from peftlab.schedule import LearningRateSettings, PhaseSettings
from peftlab.trainer import LabTrainer
from tiny_runs import RATE, STEPS, make_rows, prepare, run, same

HEAVY_DECAY = {"weight_decay": 0.5, "warmup_steps": 0}


def check_stand_still(finished):
    """Every phase moves its own tensors and leaves every other one bit-unchanged through all its steps."""
    switch, tensors = finished.trainer.switch, finished.watcher.tensors
    for phase in finished.trainer.parts.schedule.phases:
        active = set(switch.active(phase))
        for step in range(phase.start_step, phase.end_step):
            moved = {n for n in tensors[step] if not torch.equal(tensors[step][n], tensors[step + 1][n])}
            assert moved <= active, f"step {step}: {sorted(moved - active)[:3]} moved in '{phase.name}'"
        start, end = tensors[phase.start_step], tensors[phase.end_step]
        assert {n for n in start if not torch.equal(start[n], end[n])} == active, (
            f"'{phase.name}' trains all of its own"
        )


@pytest.mark.parametrize("strategy", ["both->mlp->attn", "attn->mlp->both", "early->late"])
def test_frozen_tensors_stand_still_and_active_ones_train(strategy, tmp_path):
    finished = run(tmp_path, phases=strategy, **HEAVY_DECAY)
    check_stand_still(finished)
    proofs = finished.told("phase_proved")
    assert [p["phase"] for p in proofs] == [p.name for p in finished.trainer.parts.schedule.phases]
    # early->late: the late half has never trained before, so its A waits for B too
    assert proofs[0]["steps_needed"] == 2


def test_early_then_late_by_layer(tmp_path):
    finished = run(tmp_path, phases="early->late", num_layers=3, **HEAVY_DECAY)
    family, tensors = finished.attachment.family, finished.watcher.tensors
    for name in tensors[0]:
        early = family.locate(name).layer == 0
        assert torch.equal(tensors[0][name], tensors[6][name]) is not early, name
        assert torch.equal(tensors[6][name], tensors[STEPS][name]) is early, name
    optimized = {id(p) for group in finished.trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in finished.attachment.parameters().values()}, (
        "all phases, from the start"
    )
    for step, column in ((2, "layer_2_mlp"), (STEPS, "layer_0_mlp")):
        assert finished.log.layer_data[column][step - 1] is None, "blank while inactive"
    assert finished.log.layer_data["layer_2_mlp"][STEPS - 1] > 0


def test_companion_freezing_without_clearing_the_gradient_is_caught(tmp_path, monkeypatch):
    def forgetful(self, step, optimizer):
        index = self.schedule.index_at(step)
        if index == self.index:
            return None
        self.index = index
        active = self.active(self.schedule.phases[index])
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = torch.zeros_like(parameter)  # not None: AdamW goes on
        return self.schedule.phases[index]

    monkeypatch.setattr(PhaseSwitch, "apply", forgetful)
    with pytest.raises(NotTrainingError, match="frozen tensors have gradients"):
        run(tmp_path, **HEAVY_DECAY)


def test_companion_a_frozen_tensor_that_moves_fails_the_run(tmp_path, monkeypatch):
    made = prepare(tmp_path)
    frozen = next(n for n in made.attachment.parameters() if "self_attn" in n)
    observe = type(made.trainer.proof).observe

    def meddling(self, reading, *, step):
        if step == 6:  # in the mlp phase
            with torch.no_grad():
                self._parameters[frozen].view(-1)[0] += 1e-3
        observe(self, reading, step=step)

    monkeypatch.setattr(type(made.trainer.proof), "observe", meddling)
    with pytest.raises(NotTrainingError, match=f"phase 'mlp': frozen tensors have changed: {frozen}"):
        made.trainer.train()


def test_companion_a_late_half_outside_the_optimizer_fails_the_run(tmp_path, monkeypatch):
    """S1's early->late trap: frozen before the optimizer is built."""

    def too_late(self, model=None):
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(".layers.0." in name)
        return Trainer.create_optimizer(self)

    monkeypatch.setattr(LabTrainer, "create_optimizer", too_late)
    with pytest.raises(NotTrainingError, match=r"phase 'late': .*did not change"):
        run(tmp_path, phases="early->late")


def test_the_learning_rate_of_every_step_is_the_schedules(tmp_path):
    own = LearningRateSettings(peak=3e-2, warmup_steps=1, curve="linear")
    finished = run(tmp_path, phases=[PhaseSettings(steps=5), PhaseSettings(learning_rate=own)])
    schedule = finished.trainer.parts.schedule
    rates = finished.watcher.learning_rates
    assert list(rates) == list(range(STEPS))
    assert rates == pytest.approx({s: schedule.learning_rate_at(s) for s in range(STEPS)}, rel=1e-12)
    assert (rates[0], rates[2], rates[5], rates[6]) == pytest.approx((0.0, RATE, 0.0, 3e-2))
    assert finished.told("step")[0]["learning_rate"] == 0.0


def test_accumulation_equals_one_batch(tmp_path):
    setup = {"dtype": torch.float64, "dropout": 0.0}
    parts = run(tmp_path / "a", batch_size=2, accumulation_steps=2, **setup)
    whole = run(tmp_path / "b", batch_size=4, accumulation_steps=1, **setup)
    for step, tensors in whole.watcher.tensors.items():
        for name, tensor in tensors.items():
            mine = parts.watcher.tensors[step][name]
            distance = float((mine - tensor).abs().max())  # transformers' loss is in float32
            assert distance <= 1e-6, f"step {step}, {name}: {distance}"
    assert parts.log.total_norm == pytest.approx(whole.log.total_norm, rel=1e-5)
    losses = [[e["loss"] for e in r.told("step")] for r in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4), "the reported loss is that of the whole step"
    assert parts.trainer.num_tokens == whole.trainer.num_tokens


def test_companion_a_mean_of_means_would_not_be_equal(tmp_path, monkeypatch):
    """The rows differ in length, so dividing each batch by its own labels gives another gradient."""

    def mean_of_means(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch_mean = self.parts.objective.total(model, inputs) / self.parts.objective.count(inputs)
        return batch_mean / self.args.gradient_accumulation_steps

    setup = {"dtype": torch.float64, "dropout": 0.0, "max_steps": 4, "phases": []}
    right = run(tmp_path / "a", **setup)
    monkeypatch.setattr(LabTrainer, "compute_loss", mean_of_means)
    wrong = run(tmp_path / "b", **setup)
    assert wrong.log.total_norm != pytest.approx(right.log.total_norm, rel=1e-4)


def test_the_logged_gradient_is_the_whole_steps_unclipped(tmp_path):
    tight = run(tmp_path / "a", clip_norm=1e-3, phases=[])
    loose = run(tmp_path / "b", clip_norm=0, phases=[])
    assert tight.log.total_norm[:2] == loose.log.total_norm[:2], (
        "before the tensors differ, clipping is not seen"
    )
    assert min(v for v in tight.log.total_norm) > 1e-3
    assert tight.log.clipped is False
    assert tight.log.steps == list(range(1, STEPS + 1))
    assert not same(tight.tensors, loose.tensors), "but it does clip"


def test_law_3_watching_changes_nothing(tmp_path):
    watched = run(tmp_path / "a")
    alone = run(tmp_path / "b", probe=False)
    rarely = run(tmp_path / "c", probe=False, validation_steps=STEPS, save_steps=STEPS)
    assert same(watched.tensors, alone.tensors)
    assert same(watched.tensors, rarely.tensors), "validation and checkpoints are watching too"
    assert len(watched.log) == STEPS


def test_companion_a_probe_that_draws_numbers_or_touches_gradients_is_noticed(tmp_path, monkeypatch):
    expected = run(tmp_path / "a").tensors
    from peftlab.probes.gradient_norms import GradientNorms

    made = prepare(tmp_path / "b")

    def meddling(self, reading, *, step, phase):
        for parameter in made.attachment.parameters().values():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)

    monkeypatch.setattr(GradientNorms, "on_gradients", meddling)
    made.trainer.train()
    assert not same(made.tensors, expected)


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2", "llama_tied"])
def test_every_head_goes_through_one_trainer(name, tmp_path):
    targets = "all" if name == "llama_tied" else "both"
    setup = {"phases": "both->mlp->both", "targets": targets, "max_steps": 9}
    finished = run(tmp_path, name, keep=3, **setup)
    assert len(finished.told("phase_proved")) == 3
    losses = [e["validation_loss"] for e in finished.told("validated")]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert len(finished.log) == 9
    resumed = run(tmp_path / "again", name, resume=tmp_path / "checkpoint-4", **setup)
    assert same(resumed.tensors, finished.tensors)


def test_training_on_few_rows_learns_them(tmp_path):
    finished = run(
        tmp_path, rows=make_rows("causal", 4), phases=[], max_steps=25, warmup_steps=0, dropout=0.0
    )
    losses = [e["loss"] for e in finished.told("step")]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(tmp_path):
    poison = tiny_models.VOCABULARY - 1
    rows = make_rows("causal", 20)
    rows[13] = Row("poisoned", [5, 6, poison, 7], [IGNORED, IGNORED, poison, 7])
    made = prepare(tmp_path, rows=rows)
    with torch.no_grad():
        made.attachment.model.get_input_embeddings().weight[poison] = math.nan
    order = EpochOrder(20, rows_per_step=4, batch_size=2, seed=42)
    step = next(s for s in range(5) if 13 in order.rows_of_step(s))
    with pytest.raises(NonFiniteError) as caught:
        made.trainer.train()
    message = str(caught.value)
    assert message.startswith(f"step {step + 1}: the loss is nan")
    assert "poisoned" in message
    assert all(rows[i].id in message for i in order.rows_of_step(step))


def test_a_validation_loss_that_is_not_finite_stops(tmp_path):
    poison = tiny_models.VOCABULARY - 1
    made = prepare(tmp_path, validation_rows=[Row("v", [5, poison, 7], [5, poison, 7])])
    with torch.no_grad():
        made.attachment.model.get_input_embeddings().weight[poison] = math.nan
    with pytest.raises(NonFiniteError, match="step 4: the validation loss is nan"):
        made.trainer.train()


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_the_validation_loss_does_not_depend_on_the_batch(name, tmp_path):
    rows = make_rows(tiny_models.HEADS[name], 7, seed=3)
    losses = []
    for size in (1, 2, 7):
        made = prepare(tmp_path, name, validation_rows=rows, batch_size=size, dtype=torch.float64)
        losses.append(made.trainer.evaluate()["eval_loss"])
    exact = 1e-6 if name == "llama" else 1e-12  # transformers' causal loss is in float32
    assert losses == pytest.approx([losses[0]] * 3, rel=exact)
    terms = [term for row in rows for term in negative_log_likelihoods(made.attachment.model, name, row)]
    assert losses[0] == pytest.approx(sum(terms) / len(terms), rel=exact)


@torch.no_grad()
def negative_log_likelihoods(model, name, row):
    """The loss terms of one row, one by one, from the logits."""
    given = {"input_ids": torch.tensor([row.input_ids])}
    labels = row.labels
    if name == "t5":
        given["decoder_input_ids"] = torch.tensor([[0, *labels[:-1]]])
    logits = model.eval()(**given).logits[0].log_softmax(dim=-1)
    if name == "bert":
        return [-float(logits[labels[0]])]
    if name == "llama":
        logits, labels = logits[:-1], labels[1:]
    return [-float(logits[i, label]) for i, label in enumerate(labels) if label != IGNORED]


# -- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_pickle(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something is pickled")

    for module, name in ((torch, "save"), (pickle, "dump"), (pickle, "dumps"), (pickle, "Pickler")):
        monkeypatch.setattr(module, name, refuse)


def test_checkpoints_hold_no_pickle(tmp_path, no_pickle):
    run(tmp_path)
    checkpoints = list_checkpoints(tmp_path)
    assert checkpoints
    for _, path in checkpoints:
        files = {p.name for p in path.iterdir()}
        assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}, files
        for file in path.iterdir():
            content = file.read_bytes()
            assert not content.startswith((b"\x80", b"PK\x03\x04")), file
            assert b"torch._utils" not in content
            assert b"collections\nOrderedDict" not in content


def test_companion_the_trainers_own_checkpoint_pickles(tmp_path, no_pickle, monkeypatch):
    monkeypatch.setattr(LabTrainer, "_save_checkpoint", Trainer._save_checkpoint)
    with pytest.raises(AssertionError, match="something is pickled"):
        run(tmp_path, max_steps=3, phases=[], validation_steps=1, save_steps=1)


def test_a_damaged_last_checkpoint_is_left_out(tmp_path):
    finished = run(tmp_path, keep=3)
    damaged = tmp_path / f"checkpoint-{STEPS}" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    good, problems = last_good_checkpoint(tmp_path)
    assert good == tmp_path / "checkpoint-8"
    assert len(problems) == 1
    assert "optimizer.safetensors not as written" in problems[0]
    assert same(run(tmp_path / "again", resume=good).tensors, finished.tensors)


def test_the_best_checkpoint_is_kept_and_can_be_put_back(tmp_path):
    finished = run(tmp_path, learning_rate=0.3, validation_steps=1, save_steps=1, keep=1, warmup_steps=0)
    losses = {e["step"]: e["validation_loss"] for e in finished.told("validated")}
    state = finished.trainer.state
    assert state.best_global_step == min(losses, key=losses.get)
    assert state.best_metric == min(losses.values())
    assert state.best_global_step != STEPS, "a rate this high makes it worse again"
    assert {step for step, _ in list_checkpoints(tmp_path)} == {state.best_global_step, STEPS}
    finished.trainer.load_checkpoint_adapter(state.best_global_step)
    now = {n: p.detach() for n, p in finished.attachment.parameters().items()}
    assert same(now, finished.watcher.tensors[state.best_global_step])
    assert finished.trainer.evaluate()["eval_loss"] == min(losses.values())


def test_patience_stops_early(tmp_path):
    finished = run(
        tmp_path, learning_rate=0.5, validation_steps=1, save_steps=STEPS, patience=2, warmup_steps=0
    )
    losses = [e["validation_loss"] for e in finished.told("validated")]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < STEPS
    assert list_checkpoints(tmp_path)[-1][0] == len(losses), "the last step is saved"
