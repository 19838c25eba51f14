"""Any log of gradient norms survives its files and its JSON, and its summary is always strict JSON."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab.gradient_files import GROUPS
from peftlab.gradient_log import GradientNormLog
from peftlab.measurements import mean_and_std

norms = st.none() | st.just(math.nan) | st.floats(min_value=0, allow_infinity=True)
columns = st.builds(
    lambda stack, layer, group: f"{stack}layer_{layer}_{group}",
    st.sampled_from(["", "encoder_", "decoder_", "vision_"]),
    st.integers(0, 60),
    st.sampled_from(["attention", "mlp"]),
)
phase_names = st.none() | st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=12)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    row: dict[str, Any] = {f"{group}_norm": draw(norms) for group in GROUPS}
    row["layer_data"] = draw(st.dictionaries(columns, norms, max_size=4))
    row["num_parameters"] = draw(st.dictionaries(st.sampled_from(GROUPS), st.integers(0, 10**12)))
    name = draw(phase_names)
    return row | ({} if name is None else {"phase": name})


@st.composite
def logs(draw: st.DrawFn) -> GradientNormLog:
    log = GradientNormLog(clipped=draw(st.booleans()))
    for step in sorted(draw(st.sets(st.integers(1, 10**9), max_size=8))):
        log.append(step, draw(rows()))
    return log


@settings(max_examples=150, deadline=None)
@given(logs())
def test_files_round_trip(log: GradientNormLog) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log.write(folder)
        assert GradientNormLog.read(folder) == log
        text = (Path(folder) / "gradient_analysis.summary.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))


@settings(max_examples=150, deadline=None)
@given(logs())
def test_json_round_trip(log: GradientNormLog) -> None:
    text = json.dumps(log.to_json(), allow_nan=False)
    assert GradientNormLog.from_json(json.loads(text)) == log


@settings(max_examples=100, deadline=None)
@given(logs(), st.integers(0, 10**9))
def test_truncation_keeps_exactly_the_earlier_rows(log: GradientNormLog, step: int) -> None:
    before = log.to_json()
    log.truncate(step)
    kept = sum(s <= step for s in before["steps"])
    assert log.steps == before["steps"][:kept]
    assert log.to_json()["norms"] == {group: values[:kept] for group, values in before["norms"].items()}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(min_value=0, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_statistics_neither_overflow_nor_leave_the_range(numbers: list[float]) -> None:
    mean, std = mean_and_std(numbers)
    assert math.isfinite(mean)
    assert math.isfinite(std)
    assert mean <= max(numbers)
    assert 0 <= std <= max(numbers)
    assert mean >= min(numbers) * (1 - 1e-15) or max(numbers) > 1e290 * max(min(numbers), 5e-324)
