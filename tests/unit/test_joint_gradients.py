"""What a joint pass gives each run is what it has alone, in float64, and each way of getting it wrong is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import tiny_models
import tiny_runs
from peftlab.batches import Collator
from peftlab.joint import blocks, layers, losses, meeting, streams, training
from peftlab.joint.adapters import AdapterOfRun, JoinedAdapters
from peftlab.mapping import map_model
from peftlab.methods.lora import Settings
from peftlab.objective import ModelLoss, labelled_loss

EXACT = 1e-11
ADAPTERS = {
    "one": AdapterOfRun(Settings(rank=2, alpha=4, targets="both", dropout=0.0), 1),
    "two": AdapterOfRun(Settings(rank=4, alpha=12, targets="attention", dropout=0.0), 2),
    "three": AdapterOfRun(Settings(rank=3, alpha=3, targets="both", dropout=0.0, use_dora=True), 3),
}


def join(model: Any, head: str, adapters: dict[str, AdapterOfRun] = ADAPTERS) -> JoinedAdapters:
    """Adapters on a model in float64, B not zero."""
    joined = JoinedAdapters(model, map_model(model), adapters, head=head)
    joined.model.to(torch.float64)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for made in joined.attachments.values():
            for name, parameter in made.parameters().items():
                parameter.requires_grad_(True)
                if "lora_magnitude" not in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    return joined


def batches(joined: JoinedAdapters, head: str) -> dict[str, dict[str, torch.Tensor]]:
    rows = {name: tiny_runs.make_rows(head, 2 + i, seed=i) for i, name in enumerate(joined.attachments)}
    return {name: Collator(0, head)(own) for name, own in rows.items()}


def alone(joined: JoinedAdapters, head: str) -> dict[str, dict[str, torch.Tensor]]:
    """Each run's gradients of its own loss, by peft's own layers."""
    found = {}
    objective: Any = labelled_loss(joined.model, head=head)  # transformers' own is never wider than float32
    for name, batch in batches(joined, head).items():
        own = joined.attachments[name].parameters()
        with joined.alone(name):
            loss = objective.total(joined.model, batch) / objective.count(batch)
        found[name] = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
    return found


def together(joined: JoinedAdapters, head: str) -> dict[str, dict[str, torch.Tensor]]:
    """The same from one pass, through the meeting's own threads."""
    place = meeting.Meeting(joined, pad_id=0, isolation=None)
    given, found = batches(joined, head), {}

    def act(name: str) -> Callable[[], None]:
        def compute() -> None:
            place.compute(name, given[name], ModelLoss(head).count(given[name]))
            own = joined.attachments[name].parameters()
            found[name] = {key: p.grad.clone() for key, p in own.items() if p.grad is not None}

        return compute

    runs = {name: (act(name), tuple(made.parameters().values())) for name, made in joined.attachments.items()}
    failed = place.hold(runs)
    for error in failed.values():
        raise error
    return found


def difference(model: Any, head: str) -> float:
    """How far the gradients of a joint pass are from those of runs alone, and infinite where one is missing."""
    joined = join(model, head)
    expected, found = alone(joined, head), together(joined, head)
    if any(found[name].keys() != expected[name].keys() for name in expected):
        return float("inf")
    return max(
        float((found[name][key] - gradient).abs().max())
        for name, own in expected.items()
        for key, gradient in own.items()
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_gradients_are_those_of_runs_alone(name: str) -> None:
    assert difference(tiny_models.build(name), tiny_models.HEADS[name]) < EXACT


def _every_row(patch: pytest.MonkeyPatch) -> None:
    """Each adapter sees the rows of the others."""
    patch.setattr(blocks.Blocks, "mask", lambda self, ranks, hidden: torch.ones_like(hidden))


def _next_scale(patch: pytest.MonkeyPatch) -> None:
    """One run's scale for all."""
    patch.setattr(blocks.Blocks, "scale", lambda self, scales, like: next(iter(scales.values())))


def _count_of_all(patch: pytest.MonkeyPatch) -> None:
    """The loss is normalised by the terms of all runs."""
    compute = meeting.Meeting.compute
    patch.setattr(
        meeting.Meeting, "compute", lambda self, name, batch, terms: compute(self, name, batch, 3 * terms)
    )


def _sum_of_all(patch: pytest.MonkeyPatch) -> None:
    """The loss of one run holds that of another."""
    totals = losses.LabelledLosses.totals

    def leaking(*given: Any) -> list[torch.Tensor]:
        first, *others = totals(*given)
        return [first, *(other + 0.1 * first for other in others)]

    patch.setattr(losses.LabelledLosses, "totals", leaking)


def _rows_shifted(patch: pytest.MonkeyPatch) -> None:
    """A view gets the rows of another run."""
    merge = layers.Shares.merge

    def swapped(self: Any, pieces: Any, like: torch.Tensor, **axes: Any) -> torch.Tensor:
        moved = [pieces[0] + pieces[1].mean(), *pieces[1:]] if len(pieces) > 1 else pieces
        return merge(self, moved, like, **axes)

    patch.setattr(layers.Shares, "merge", swapped)


@pytest.mark.parametrize("wrong", [_every_row, _next_scale, _count_of_all, _sum_of_all, _rows_shifted])
def test_what_is_wrong_is_seen(
    wrong: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(monkeypatch)
    assert difference(tiny_models.build("llama"), "causal") > 1e-6


def test_a_run_that_is_not_finite_leaves_the_gradients_of_others_alone() -> None:
    joined = join(tiny_models.build("llama"), "causal")
    expected = alone(joined, "causal")
    bad = next(iter(joined.attachments["one"].parameters().values()))
    with torch.no_grad():
        bad.fill_(float("nan"))
    found = together(joined, "causal")
    for name in ("two", "three"):
        for key, gradient in expected[name].items():
            torch.testing.assert_close(found[name][key], gradient, rtol=0, atol=EXACT)


@contextmanager
def ends(folder: Any, **changes: Any) -> Iterator[float]:
    """How far runs that train together end from where each ends alone."""
    from test_joint import RUNS, join, train_alone

    runs = {name: RUNS[name] | {"targets": "both", "rate": 1e-2} for name in ("small", "attentive")}
    joined, joint = join("llama", folder, runs, steps=4, packed=True)
    training.train_together(joined, joint)
    apart = 0.0
    with pytest.MonkeyPatch.context() as clean:
        for undo in changes.get("clean", ()):
            undo(clean)
        for name, run in runs.items():
            expected = train_alone("llama", folder / name, run, steps=4, packed=True)
            tensors = expected.parts.attachment.tensors()
            own = joined.attachments[name].tensors()
            apart = max(apart, *(float((own[key] - tensors[key]).abs().max()) for key in tensors))
    yield apart


def test_one_dropout_stream_for_all_is_seen(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ends(tmp_path / "right") as apart:
        assert apart < 1e-5
    of = streams.DividedDraws.of

    def first(self: Any, name: str) -> Any:
        return of(self, self._shares.names[0])

    monkeypatch.setattr(streams.DividedDraws, "of", first)
    with ends(tmp_path / "wrong") as apart:
        assert apart > 1e-5


def test_clipping_over_all_adapters_is_seen(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    take = meeting.Meeting._take_gradients

    def left(self: Any, seat: Any) -> None:
        take(self, seat)
        for parameter, gradient in zip(seat.parameters, seat.gradients, strict=True):
            parameter.grad = gradient  # the next run's clipping sees them too

    monkeypatch.setattr(meeting.Meeting, "_take_gradients", left)
    with ends(tmp_path) as apart:
        assert apart > 1e-5
