"""Schedules: strategies, boundaries, halves, and the learning rate of every step."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peftlab.errors import ScheduleError, UnknownNameError
from peftlab.schedule import (
    GROUPS,
    STRATEGIES,
    Curve,
    LearningRateSettings,
    Phase,
    PhaseSettings,
    Schedule,
    canonical_strategy,
    place_phases,
    strategy_phases,
)


def _schedule(name: str, total: int, *ends: int | None) -> Schedule:
    return Schedule(
        place_phases(strategy_phases(name, total_steps=total, ends=ends), total_steps=total), total
    )


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("joint", ["->", "-", ",", ">"])
def test_every_spelling_of_a_strategy(name: str, joint: str) -> None:
    assert canonical_strategy(name.replace("->", joint)) == name
    assert canonical_strategy(name.replace("->", joint).replace("attn", "attention")) == name


@pytest.mark.parametrize("name", ["both", "both-", "", "mlp->both", "early->late->early", "->"])
def test_unknown_strategies(name: str) -> None:
    with pytest.raises(UnknownNameError, match="both->mlp->attn"):
        canonical_strategy(name)


def test_strategies_of_s1() -> None:
    groups = {name: [p.groups for p in strategy_phases(name, total_steps=9)] for name in STRATEGIES}
    assert groups["both->mlp->attn"] == [GROUPS, ("mlp",), ("attention",)]
    assert groups["attn->mlp->both"] == [("attention",), ("mlp",), GROUPS]
    assert groups["both->mlp->both"] == [GROUPS, ("mlp",), GROUPS]
    assert [p.half for p in strategy_phases("early->late", total_steps=9)] == ["early", "late"]


def test_recommended_boundaries() -> None:
    phases = _schedule("both->mlp->attn", 1500, 300, 600).phases
    assert [(p.start_step, p.end_step) for p in phases] == [(0, 300), (300, 600), (600, 1500)]


def test_boundaries_are_even_where_not_given() -> None:
    assert [p.end_step for p in _schedule("both->mlp->attn", 420).phases] == [140, 280, 420]
    assert [p.end_step for p in _schedule("early->late", 31).phases] == [15, 31]
    assert [p.end_step for p in _schedule("both->mlp->attn", 100, 20).phases] == [20, 60, 100]


@pytest.mark.parametrize(
    ("name", "ends", "message"),
    [
        ("both->mlp->attn", (0, 5), "phase1_end 0 does not fit"),
        ("both->mlp->attn", (20, 10), "phase2_end 10 does not fit: it must lie after 20"),
        ("both->mlp->attn", (10, 30), "before the run's 30 steps"),
        ("early->late", (10, 20), "has 2 phases, so phase2_end has no meaning"),
        ("both->mlp->attn", (5, 10, 15), "has 3 phases, so phase3_end has no meaning"),
    ],
)
def test_boundaries_that_do_not_fit(name: str, ends: tuple[int, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        _schedule(name, 30, *ends)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([(0, 10), (12, 30)], "a gap"),
        ([(0, 10), (8, 30)], "an overlap"),
        ([(2, 30)], "starts at step 2, expected 0"),
        ([(0, 10), (10, 10), (10, 30)], "no steps left"),
        ([(0, 10)], "cover 10 steps but the run has 30"),
        ([(0, 40)], "cover 40 steps but the run has 30"),
        ([], "cover 0 steps"),
    ],
)
def test_phases_are_contiguous(phases: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule(tuple(Phase(f"p{i}", *steps) for i, steps in enumerate(phases)), 30)


def test_only_the_last_phase_is_open() -> None:
    with pytest.raises(ScheduleError, match="only the last phase may be open"):
        place_phases([PhaseSettings(), PhaseSettings(steps=3)], total_steps=9)
    placed = place_phases([PhaseSettings(steps=3), PhaseSettings()], total_steps=9)
    assert [(p.name, p.end_step) for p in placed] == [("attention+mlp", 3), ("attention+mlp", 9)]


def test_no_phases_is_one_phase_with_everything() -> None:
    (phase,) = place_phases([], total_steps=9)
    assert (phase.groups, phase.start_step, phase.end_step) == (GROUPS, 0, 9)


@pytest.mark.parametrize(
    "values",
    [
        {"groups": ()},
        {"layers": (3, 1)},
        {"layers": (-1, 1)},
        {"layers": (0, 1), "half": "early"},
        {"steps": 0},
        {"half": "middle"},
    ],
)
def test_phases_that_make_no_sense(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        PhaseSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_layers", [1, 2, 5, 22])
def test_halves(num_layers: int) -> None:
    early, late = _schedule("early->late", 10).phases

    def layers(phase: Phase) -> list[int]:
        every = range(num_layers)
        return [i for i in every if phase.trains(group="mlp", role="mlp.up", layer=i, num_layers=num_layers)]

    assert layers(early) == list(range(num_layers // 2)), "the early half is the first floor(n/2)"
    assert layers(late) == list(range(num_layers // 2, num_layers))


def test_halves_outside_the_layers() -> None:
    early, late = _schedule("early->late", 10).phases

    def trains(phase: Phase, group: str) -> bool:
        return phase.trains(group=group, role=group, layer=None, num_layers=0)

    assert (trains(early, "embed"), trains(late, "embed")) == (True, False)
    assert (trains(early, "lm_head"), trains(late, "lm_head")) == (False, True)


def test_roles_and_layer_ranges() -> None:
    phase = Phase("own", 0, 5, groups=("attention.query",), layers=(1, 2))

    def trains(role: str, layer: int) -> bool:
        return phase.trains(group="attention", role=role, layer=layer, num_layers=4)

    assert [trains("attention.query", i) for i in range(4)] == [False, True, True, False]
    assert not trains("attention.key", 1)


@pytest.mark.parametrize("curve", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (30, 0), (30, 10), (97, 13), (10, 10), (5, 10)])
def test_learning_rate_is_that_of_transformers(curve: Curve, total: int, warmup: int) -> None:
    """Parity with `get_{curve}_schedule_with_warmup` at every step."""
    import torch
    from transformers import optimization

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    make = getattr(optimization, f"get_{curve}_schedule_with_warmup")
    lengths = {} if curve == "constant" else {"num_training_steps": total}
    theirs = make(optimizer, num_warmup_steps=warmup, **lengths)
    ours = Schedule((Phase("all", 0, total),), total, learning_rate=3e-4, warmup_steps=warmup, curve=curve)
    for step in range(total):
        assert ours.learning_rate_at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_the_parity_test_sees_one_percent() -> None:
    one = Schedule((Phase("all", 0, 30),), 30, learning_rate=3e-4)
    two = Schedule((Phase("all", 0, 30),), 30, learning_rate=3.03e-4)
    assert one.learning_rate_at(15) != pytest.approx(two.learning_rate_at(15), rel=1e-3)


def test_a_phases_own_curve_counts_from_its_first_step() -> None:
    own = LearningRateSettings(peak=1e-2, warmup_steps=2, curve="linear")
    phases = (Phase("one", 0, 10), Phase("two", 10, 20, learning_rate=own))
    schedule = Schedule(phases, 20, learning_rate=1e-3, warmup_steps=5)
    alone = Schedule((Phase("all", 0, 10),), 10, learning_rate=1e-2, warmup_steps=2, curve="linear")
    run = Schedule((Phase("all", 0, 20),), 20, learning_rate=1e-3, warmup_steps=5)
    assert [schedule.learning_rate_at(s) for s in range(10)] == [run.learning_rate_at(s) for s in range(10)]
    assert [schedule.learning_rate_at(10 + s) for s in range(10)] == [
        alone.learning_rate_at(s) for s in range(10)
    ]


@given(
    name=st.sampled_from(list(STRATEGIES)),
    total=st.integers(3, 5000),
    first=st.none() | st.integers(1, 5000),
    second=st.none() | st.integers(1, 5000),
)
def test_phases_cover_the_run_or_are_refused(
    name: str, total: int, first: int | None, second: int | None
) -> None:
    try:
        schedule = _schedule(name, total, first, second)
    except ScheduleError:
        assume(False)
    starts = [p.start_step for p in schedule.phases]
    ends = [p.end_step for p in schedule.phases]
    assert (starts[0], ends[-1]) == (0, total)
    assert starts[1:] == ends[:-1]
    assert all(start < end for start, end in zip(starts, ends, strict=True))
    assert first is None or ends[0] == first
    assert second is None or ends[1] == second
    for step in {0, total - 1, *starts, *(e - 1 for e in ends)}:
        phase = schedule.phase_at(step)
        assert phase.start_step <= step < phase.end_step
        assert schedule.phases[schedule.index_at(step)] is phase
        assert 0 <= schedule.learning_rate_at(step) <= schedule.learning_rate
    assert schedule.phase_at(total) is schedule.phases[-1], "from the end on, the last one"


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6), is_open=st.booleans())
def test_own_phases_cover_the_run(lengths: list[int], is_open: bool) -> None:
    settings = [PhaseSettings(steps=length) for length in lengths]
    if is_open:
        settings[-1] = PhaseSettings()
    total = sum(lengths)
    schedule = Schedule(place_phases(settings, total_steps=total), total, warmup_steps=0)
    owners = [schedule.index_at(step) for step in range(total)]
    assert owners == [i for i, length in enumerate(lengths) for _ in range(length)]
