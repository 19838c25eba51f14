"""The record of gradient norms: blanks, files, resume, statistics."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from run_folder_fixture import fabricate_log, norms_of

from peftlab.errors import DataError, RunError
from peftlab.gradient_files import natural_order, parse_column
from peftlab.gradient_log import GradientNormLog, load_gradient_log

GROUP_CSV = "gradient_analysis.group_norms.csv"


def row(attention: float | None, mlp: float | None) -> dict[str, object]:
    return norms_of({"layer_0_attention": attention, "layer_0_mlp": mlp})


def test_rows_stay_with_their_step_when_a_group_is_frozen(tmp_path: Path) -> None:
    log = GradientNormLog()
    log.append(1, row(1.0, 2.0))
    log.append(2, row(None, 3.0))
    log.append(3, row(4.0, None))
    log.write(tmp_path)
    assert (tmp_path / GROUP_CSV).read_text().splitlines()[1:] == [
        f"1,,1.0,2.0,,,,{math.sqrt(5.0)!r}",
        "2,,,3.0,,,,3.0",
        "3,,4.0,,,,,4.0",
    ]
    layers = (tmp_path / "gradient_analysis.layer_norms.csv").read_text().splitlines()
    assert layers == ["step,layer_0_attention,layer_0_mlp", "1,1.0,2.0", "2,,3.0", "3,4.0,"]


def test_layers_of_late_phases_do_not_move_into_early_rows() -> None:
    # The seed's log left frozen layers out of its lists, so late values landed in early rows.
    log = GradientNormLog()
    log.append(1, norms_of({"layer_0_mlp": 1.0}))
    log.append(2, norms_of({"layer_1_mlp": 2.0}))
    assert log.layer_data == {"layer_0_mlp": [1.0, None], "layer_1_mlp": [None, 2.0]}


def test_the_files_read_back_equal(tmp_path: Path) -> None:
    log = fabricate_log(steps=30, layers=12, stacks=("encoder", "decoder"))
    log.clipped = True
    log.write(tmp_path)
    again = GradientNormLog.read(tmp_path)
    assert again == log
    assert again.phases == log.phases
    assert again.num_parameters == log.num_parameters
    assert load_gradient_log(tmp_path / GROUP_CSV) == log
    assert load_gradient_log(tmp_path / "gradient_analysis.layer_norms.csv") == log


def test_the_record_goes_through_strict_json() -> None:
    log = GradientNormLog()
    log.append(1, row(math.nan, math.inf))
    text = json.dumps(log.to_json(), allow_nan=False)
    again = GradientNormLog.from_json(json.loads(text))
    assert again == log
    assert math.isnan(again.attention_norm[0] or 0)


def test_resuming_drops_later_rows() -> None:
    whole, cut = fabricate_log(steps=30), fabricate_log(steps=30)
    cut.truncate(20)
    assert cut.steps == list(range(1, 21))
    assert {len(values) for values in cut.layer_data.values()} == {20}
    for i, step in enumerate(whole.steps[20:], 20):
        layers = {name: values[i] for name, values in whole.layer_data.items()}
        cut.append(step, norms_of(layers) | {"phase": whole.phases[i]})
    assert cut == whole


def test_a_step_that_is_not_later_is_refused_and_leaves_the_log_as_it_was() -> None:
    log = fabricate_log(steps=3)
    with pytest.raises(RunError, match="step 3 came after those of step 3"):
        log.append(3, row(1.0, 1.0))
    with pytest.raises(RunError, match="lack lm_head_norm"):
        log.append(4, {k: v for k, v in row(1.0, 1.0).items() if k != "lm_head_norm"})
    with pytest.raises(RunError, match="'layer_x' is not a layer column"):
        log.append(4, row(1.0, 1.0) | {"layer_data": {"layer_x": 1.0}})
    assert log == fabricate_log(steps=3)


def test_statistics_are_those_of_the_active_finite_steps() -> None:
    log = GradientNormLog()
    values = [0.5, None, 2.0, math.inf, math.nan, 1.0]
    for step, value in enumerate(values, 1):
        log.append(step, row(value, 4.0))
    facts = log.summarize()["groups"]["attention"]
    assert facts["mean"] == pytest.approx(statistics.fmean([0.5, 2.0, 1.0]))
    assert facts["std"] == pytest.approx(statistics.pstdev([0.5, 2.0, 1.0]))
    assert (facts["max"], facts["min"], facts["peak_step"]) == (2.0, 0.5, 3)
    assert (facts["count"], facts["non_finite_steps"]) == (3, 2)
    assert log.summarize()["groups"]["embed"]["mean"] is None


def test_ratios_use_the_steps_with_both_active() -> None:
    log = GradientNormLog()
    log.append(1, row(1.0, 2.0) | {"num_parameters": {"attention": 100, "mlp": 400}})
    log.append(2, row(3.0, 2.0) | {"num_parameters": {"attention": 100, "mlp": 400}})
    log.append(3, row(900.0, None) | {"num_parameters": {"attention": 100}})
    summary = log.summarize()
    assert summary["attention_to_mlp_ratio"] == pytest.approx(1.0)
    assert summary["attention_to_mlp_ratio_per_parameter"] == pytest.approx((2 / 10) / (2 / 20))


@pytest.mark.parametrize(("attention", "mlp"), [(1.0, None), (None, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_a_ratio_that_cannot_be_is_null(attention: float | None, mlp: float | None) -> None:
    log = GradientNormLog()
    log.append(1, row(attention, mlp))
    assert log.summarize()["attention_to_mlp_ratio"] is None


def test_non_finite_norms_are_kept_in_the_csv_and_out_of_the_json(tmp_path: Path) -> None:
    log = GradientNormLog()
    log.append(1, row(math.nan, math.inf))
    log.write(tmp_path)
    assert (tmp_path / GROUP_CSV).read_text().splitlines()[1].startswith("1,,nan,inf,,,,")
    text = (tmp_path / "gradient_analysis.summary.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the summary"))


def test_columns_have_their_natural_order() -> None:
    names = ["layer_10_mlp", "layer_2_attention", "layer_2_mlp"]
    assert natural_order(names) == ["layer_2_attention", "layer_2_mlp", "layer_10_mlp"]
    both = ["decoder_layer_0_mlp", "encoder_layer_11_mlp", "encoder_layer_2_mlp"]
    assert natural_order(both) == ["encoder_layer_2_mlp", "encoder_layer_11_mlp", "decoder_layer_0_mlp"]
    assert parse_column("vision_tower_layer_3_mlp").stack == "vision_tower"


def test_an_empty_log_reads_back(tmp_path: Path) -> None:
    GradientNormLog().write(tmp_path)
    assert GradientNormLog.read(tmp_path) == GradientNormLog()


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no gradient_analysis\.group_norms\.csv"):
        load_gradient_log(tmp_path)
    with pytest.raises(DataError, match="no such folder or file"):
        load_gradient_log(tmp_path / "nowhere")
    fabricate_log(steps=3).write(tmp_path)
    path = tmp_path / GROUP_CSV
    whole = path.read_text()
    path.write_text(whole[: whole.rindex(",")])
    with pytest.raises(RunError, match=r"group_norms\.csv is damaged: a row has not the 8 cells"):
        load_gradient_log(tmp_path)
    path.write_text(whole.replace("1,both,", "1,both,x", 1))
    with pytest.raises(RunError, match=r"group_norms.*damaged"):
        load_gradient_log(tmp_path)
    path.write_text(whole)
    (tmp_path / "gradient_analysis.summary.json").write_text('{"clipped": ')
    with pytest.raises(RunError, match=r"summary\.json is damaged"):
        load_gradient_log(tmp_path)


@pytest.mark.parametrize("module", ["gradient_log", "run", "tables", "comparison", "figures", "report"])
def test_telling_loads_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "peft", "matplotlib", "numpy", "yaml", "pydantic")
    code = f"import sys, peftlab.{module}; print([m for m in {heavy} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
