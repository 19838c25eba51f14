"""What a run looks at stays on the device until it is time to look; nothing is lost, nothing bad is kept."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch

import tiny_models
from peftlab.batches import IGNORED, Row
from peftlab.errors import NonFiniteError
from peftlab.watching import StepWatch
from tiny_runs import STEPS, make_rows, prepare

EVERY = 4
TRANSFERS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


@contextmanager
def counted(monkeypatch, calls):
    """Count what brings a tensor's values to the host."""
    with monkeypatch.context() as patch:
        for name in TRANSFERS:
            own = getattr(torch.Tensor, name)

            def counting(tensor, *given, own=own, name=name, **named):
                calls.append(name)
                return own(tensor, *given, **named)

            patch.setattr(torch.Tensor, name, counting)
        yield


def transfers_of_steps(tmp_path, monkeypatch, **changes):
    """The transfers that proof and probes cause in each step of a run that logs every fourth."""
    made = prepare(tmp_path, phases=[], **changes)
    found: dict[int, int] = {}

    def watched(name):
        own = getattr(StepWatch, name)

        def call(self, value, step, *given, **named):
            calls: list[str] = []
            number = step if name == "note_loss" else value
            with counted(monkeypatch, calls):
                own(self, value, step, *given, **named)
            found[number] = found.get(number, 0) + len(calls)

        monkeypatch.setattr(StepWatch, name, call)

    watched("note_loss")
    watched("note_gradients")
    made.trainer.train()
    assert sorted(found) == list(range(1, STEPS + 1))
    return found, made


def test_nothing_is_brought_to_the_host_between_two_logged_steps(tmp_path, monkeypatch):
    found, made = transfers_of_steps(tmp_path, monkeypatch, log_steps=EVERY)
    proved = next(e["step"] for e in made.told("phase_proved"))
    assert proved < EVERY
    between = [step for step in found if step > proved and step % EVERY]
    assert len(between) >= 2 * (EVERY - 1)
    assert {found[step] for step in between} == {0}
    assert all(found[step] > 0 for step in range(EVERY, STEPS + 1, EVERY))


def test_companion_a_look_in_every_step_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(StepWatch, "_is_due", lambda self, step: True)
    found, _ = transfers_of_steps(tmp_path, monkeypatch, log_steps=EVERY)
    assert all(count > 0 for count in found.values())


def test_what_is_looked_at_late_is_the_same(tmp_path):
    logs = []
    for every in (1, 5):
        made = prepare(tmp_path / str(every), log_steps=every)
        made.trainer.train()
        logs.append(made.trainer.parts.probes["gradient_norms"].state())
    assert logs[0] == logs[1]
    assert len(logs[0]["steps"]) == STEPS


def poisoned(tmp_path, **changes):
    """A run whose second row of some step makes its loss NaN."""
    poison = tiny_models.VOCABULARY - 1
    rows = make_rows("causal", 20)
    rows[13] = Row("poisoned", [5, 6, poison, 7], [IGNORED, IGNORED, poison, 7])
    made = prepare(tmp_path, rows=rows, **changes)
    with torch.no_grad():
        made.attachment.model.get_input_embeddings().weight[poison] = math.nan
    return made


def test_a_loss_that_is_not_finite_is_named_at_the_next_look(tmp_path):
    made = poisoned(tmp_path, phases=[], log_steps=STEPS, validation_steps=STEPS, save_steps=STEPS)
    step = next(s for s in range(STEPS) if 13 in made.trainer.order.rows_of_step(s))
    with pytest.raises(NonFiniteError, match=rf"step {step + 1}: the loss is nan.*poisoned"):
        made.trainer.train()


def test_no_checkpoint_holds_what_a_bad_step_left(tmp_path):
    made = poisoned(tmp_path, phases=[], log_steps=10 * STEPS, validation_steps=10 * STEPS, save_steps=1)
    step = next(s for s in range(STEPS) if 13 in made.trainer.order.rows_of_step(s))
    with pytest.raises(NonFiniteError, match=rf"step {step + 1}: "):
        made.trainer.train()
    written = [int(p.name.partition("-")[2]) for p in tmp_path.rglob("checkpoint-*")]
    assert max(written, default=0) <= step


class _Closed:
    """A proof that has nothing left to see."""

    is_open = False

    def observe(self, reading, *, step):
        """Nothing."""


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch tells there when the host waits"
)
def test_on_a_gpu_the_host_does_not_wait_between_two_logged_steps():
    parameter = torch.nn.Parameter(torch.ones(64, device="cuda"))
    parameter.grad = torch.ones_like(parameter)
    watch = StepWatch({"weight": parameter}, _Closed(), {}, rows_of_step=lambda step: [], every=EVERY)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, EVERY):
            watch.note_loss(parameter.sum(), step)
            watch.note_gradients(step, "all")
        with pytest.raises(RuntimeError, match=r"synchronizing"):
            watch.note_gradients(EVERY, "all")
    finally:
        torch.cuda.set_sync_debug_mode(before)
