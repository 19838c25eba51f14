"""Phases on a live model: who trains, who stands still, what happens to moments, which phases are refused."""

import pytest
import torch

import tiny_models
from peftlab.catalog import METHODS
from peftlab.errors import ScheduleError
from peftlab.mapping import map_model
from peftlab.methods import lora
from peftlab.phases import PhaseSwitch
from peftlab.schedule import (
    STRATEGIES,
    LearningRateSettings,
    PhaseSettings,
    Schedule,
    place_phases,
    strategy_phases,
)


def attach(name="llama", *, targets="both", num_layers=3):
    base = tiny_models.build(name, num_layers)
    settings = lora.Settings(targets=targets, dropout=0, rank=2)
    return lora.attach(base, map_model(base), settings, head=tiny_models.HEADS[name], seed=0)


def schedule(*phases, total=6):
    return Schedule(place_phases(phases, total_steps=total), total, 1e-2, 0)


def switch_of(attached, *phases, total=6):
    return PhaseSwitch(schedule(*phases, total=total), attached.family, attached.parameters())


def trained(attached):
    return {name for name, p in attached.parameters().items() if p.requires_grad}


def step(attached, optimizer, name="llama", seed=0):
    optimizer.zero_grad(set_to_none=True)
    attached.model(**tiny_models.training_inputs(name, seed=seed)).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_what_it_says(strategy):
    attached = attach(targets="all")
    made = Schedule(place_phases(strategy_phases(strategy, total_steps=6), total_steps=6), 6, 1e-2, 0)
    switch = PhaseSwitch(made, attached.family, attached.parameters())
    for phase in made.phases:
        assert switch.apply(phase.start_step, None) is phase
        for name, parameter in attached.parameters().items():
            site = attached.family.locate(name)
            wanted = site.group in phase.groups
            if phase.half and site.layer is not None:
                wanted = wanted and (site.layer < 1) == (phase.half == "early")
            assert parameter.requires_grad is wanted, (phase.name, name)


def test_the_early_half_of_three_layers_is_the_first():
    attached = attach()
    switch = switch_of(attached, PhaseSettings(steps=3, half="early"), PhaseSettings(half="late"))
    switch.apply(0, None)
    assert {attached.family.locate(n).layer for n in trained(attached)} == {0}
    switch.apply(3, None)
    assert {attached.family.locate(n).layer for n in trained(attached)} == {1, 2}


def test_roles_and_layer_ranges():
    attached = attach()
    switch = switch_of(
        attached,
        PhaseSettings(steps=3, groups=("attention.query", "mlp.down"), layers=(1, 2)),
        PhaseSettings(groups=("mlp",), layers=(0, 0)),
    )
    switch.apply(0, None)
    sites = [attached.family.locate(n) for n in trained(attached)]
    assert {(s.role, s.layer) for s in sites} == {
        (role, layer) for role in ("attention.query", "mlp.down") for layer in (1, 2)
    }
    switch.apply(3, None)
    assert {(s.group, s.layer) for s in (attached.family.locate(n) for n in trained(attached))} == {
        ("mlp", 0)
    }


def test_halves_are_counted_in_each_stack():
    attached = attach("t5", num_layers=2)
    switch = switch_of(attached, PhaseSettings(steps=3, half="early"), PhaseSettings(half="late"))
    switch.apply(0, None)
    places = {(attached.family.locate(n).stack, attached.family.locate(n).layer) for n in trained(attached)}
    assert places == {("encoder", 0), ("decoder", 0)}


def test_a_phase_is_entered_once_and_a_resume_enters_the_right_one():
    attached = attach()
    switch = switch_of(
        attached, PhaseSettings(steps=3, groups=("mlp",)), PhaseSettings(groups=("attention",))
    )
    assert switch.apply(0, None).groups == ("mlp",)
    assert [switch.apply(s, None) for s in (1, 2)] == [None, None]
    assert switch.apply(3, None).groups == ("attention",)
    fresh = switch_of(attach(), PhaseSettings(steps=3, groups=("mlp",)), PhaseSettings(groups=("attention",)))
    assert fresh.apply(5, None).groups == ("attention",)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
)
def test_a_frozen_tensor_stands_still_under_decay_and_momentum(make):
    attached = attach()
    parameters = attached.parameters()
    optimizer = make(list(parameters.values()))
    switch = switch_of(attached, PhaseSettings(steps=2), PhaseSettings(groups=("mlp",)))
    switch.apply(0, optimizer)
    for i in range(2):
        step(attached, optimizer, seed=i)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    switch.apply(2, optimizer)
    for i in range(3):
        step(attached, optimizer, seed=i)
    for name, parameter in parameters.items():
        assert torch.equal(before[name], parameter) is (".mlp." not in name), name


def test_companion_freezing_by_zero_gradients_would_move_them():
    """Why `grad = None`: with a zero gradient both decay and momentum go on."""
    attached = attach()
    parameters = attached.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.5)
    step(attached, optimizer)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not any(torch.equal(before[n], p) for n, p in parameters.items())


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_moments_are_kept_or_cleared_on_entry(moments):
    attached = attach()
    parameters = attached.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    switch = switch_of(attached, PhaseSettings(steps=2), PhaseSettings(groups=("mlp",), moments=moments))
    switch.apply(0, optimizer)
    for i in range(2):
        step(attached, optimizer, seed=i)
    kept = {n: optimizer.state[p]["exp_avg"].clone() for n, p in parameters.items()}
    switch.apply(2, optimizer)
    for name, parameter in parameters.items():
        if moments == "reset" and ".mlp." in name:
            assert parameter not in optimizer.state
        else:
            assert torch.equal(optimizer.state[parameter]["exp_avg"], kept[name])
            assert optimizer.state[parameter]["step"] == 2


def test_a_resume_inside_a_phase_does_not_clear_moments_again():
    attached = attach()
    parameters = attached.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    step(attached, optimizer)
    phases = (PhaseSettings(steps=2), PhaseSettings(moments="reset"))
    switch_of(attached, *phases).apply(3, optimizer)
    assert all(p in optimizer.state for p in parameters.values())
    switch_of(attached, *phases).apply(2, optimizer)
    assert not any(p in optimizer.state for p in parameters.values())


def test_what_a_phase_trains_in():
    attached = attach(targets="all")
    switch = switch_of(
        attached, PhaseSettings(steps=1, groups=("mlp", "attention")), PhaseSettings(groups=("lm_head",))
    )
    first, second = switch.schedule.phases
    assert switch.active_groups(first) == ["attention", "mlp"], "in the fixed order"
    assert switch.active_groups(second) == ["lm_head"]
    assert len(switch.active(second)) == 1


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (PhaseSettings(groups=("mpl",)), "'mpl' is neither a group .attention, mlp.* nor a role .*mlp.down"),
        (PhaseSettings(layers=(1, 3)), r"layers \[1, 3\] go beyond this model's 3 layers \(0 to 2\)"),
        (PhaseSettings(groups=("embed",)), "trains nothing: the adapter has tensors in attention, mlp"),
        (PhaseSettings(groups=("lm_head", "other")), "widen method.targets or change the phase"),
    ],
)
def test_phases_that_do_not_fit_are_refused(phase, message):
    with pytest.raises(ScheduleError, match=message):
        switch_of(attach(), phase)


def test_a_phase_for_a_group_without_an_adapter_is_refused():
    with pytest.raises(ScheduleError, match=r"'mlp'|mlp.*trains nothing"):
        switch_of(
            attach(targets="attention"), PhaseSettings(name="m", steps=2, groups=("mlp",)), PhaseSettings()
        )


def test_a_learning_rate_of_its_own_changes_nothing_about_who_trains():
    attached = attach()
    switch = switch_of(
        attached, PhaseSettings(learning_rate=LearningRateSettings(peak=1.0), groups=("mlp",)), total=2
    )
    switch.apply(0, None)
    assert all(".mlp." in name for name in trained(attached))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_an_adapter_that_rests_runs_without_dropout(method):
    base = tiny_models.build("llama", 2)
    leaf = METHODS.load(method)
    attached = leaf.attach(
        base, map_model(base), leaf.Settings(dropout=0.5, targets="both"), head="causal", seed=0
    )
    rates = {
        path: module.lora_dropout["default"]
        for path, module in attached.model.named_modules()
        if hasattr(module, "lora_dropout")
    }
    made = schedule(PhaseSettings(groups=("attention",), steps=3), PhaseSettings(groups=("mlp",)))
    switch = PhaseSwitch(made, attached.family, attached.parameters(), attached.model)
    for at, trained_part in ((0, "self_attn"), (3, "mlp")):
        switch.apply(at, None)
        attached.model.train()  # as the trainer does in every step
        assert {path: dropout.p for path, dropout in rates.items()} == {
            path: 0.5 if f".{trained_part}." in path else 0.0 for path in rates
        }
    resting = attached.model.get_submodule(next(path for path in rates if ".self_attn." in path))
    given = torch.randn(1, 3, tiny_models.HIDDEN)
    assert torch.equal(resting(given), resting(given))
    switch.end()
    assert {dropout.p for dropout in rates.values()} == {0.5}
