"""Whether a run fits into memory, what would make it fit, and the largest batch."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import command
from memory_cases import ALLOWED, make_config
from transformers import BertForSequenceClassification

from peftlab.cli import main
from peftlab.commands.parsing import read_bytes
from peftlab.config import RunConfig, build_config
from peftlab.errors import ConfigError, ModelError, RunError
from peftlab.memory import fitting, measuring
from peftlab.memory.budget import CUDA_CONTEXT_BYTES, Budget, find_budget
from peftlab.memory.fitting import BATCH_SIZES, choose_batch_size, plan_memory
from peftlab.memory.measuring import MeasuredPeak, confirm_with, measure_step
from peftlab.memory.prediction import MemoryPrediction, find_structure, predict_memory
from peftlab.memory.search import largest_fitting
from peftlab.memory.splitting import split_step
from peftlab.memory.steps import BatchShape
from peftlab.memory.text import render_memory

pytestmark = pytest.mark.usefixtures("quick_collection")


def linear(base: int, row: int, gradients: int = 0) -> Callable[..., MemoryPrediction]:
    """A stand-in for the prediction: a peak that is linear in rows and length; gradients stand in a second pass."""

    def predict(config: RunConfig, *, source: Any, shape: BatchShape, attach: Any) -> MemoryPrediction:
        share = 0.25 if config.model.gradient_checkpointing else 1.0
        half = 2 if config.model.dtype == "bfloat16" else 1
        peak = int(base / half + share * row * shape.rows * shape.length)
        peak += gradients * (config.training.accumulation_steps > 1)
        parts = {"weights": base, "activations": peak - base}
        dtype = "bfloat16" if half == 2 else "float32"
        return MemoryPrediction(
            peak, parts, "backward pass", shape, dtype, config.model.gradient_checkpointing, "cpu", 0.1
        )

    return predict


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "predict_memory", linear(1_000_000, 100))


@pytest.mark.parametrize(
    ("memory", "verdict", "batch", "that_fit"),
    [
        (30_000_000, "fits", 1144, set()),
        (1_080_000, "fits", 1, set()),
        (1_079_000, "fits if", 1, {"gradient checkpointing", "weights in bfloat16", "smaller batches"}),
        (1_060_000, "fits if", None, {"gradient checkpointing", "weights in bfloat16", "shorter rows"}),
        (532_000, "fits if", None, {"all of these"}),
        (500_000, "does not fit", None, set()),
    ],
)
@pytest.mark.usefixtures("stand_in")
def test_verdict(memory: int, verdict: str, batch: int | None, that_fit: set[str], tmp_path: Path) -> None:
    rows = 4 if memory == 1_079_000 else 1
    config = make_config(tmp_path, "llama", training={"batch_size": rows}, task={"max_length": 64})
    planned = plan_memory(config, shape=BatchShape(rows, 240, 240), memory=memory)
    assert planned.verdict == verdict
    assert (planned.batch.batch_size if planned.batch else None) == batch
    assert {option.change for option in planned.options if option.fits} >= that_fit
    assert planned.warning == planned.budget.warning(planned.prediction.peak_bytes)
    text = render_memory(json.loads(json.dumps(planned.as_dict())))
    assert verdict.split()[0] in text
    for option in planned.options:
        assert option.change in text
        assert option.fits == (option.needed_bytes <= memory)


@pytest.mark.usefixtures("stand_in")
def test_options_are_predictions_of_their_own(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", training={"batch_size": 64})
    planned = plan_memory(config, shape=BatchShape(64, 640, 640), memory=2_000_000)
    options = {option.change: option for option in planned.options}
    largest = options["smaller batches"].settings["training.batch_size"]
    assert largest == planned.batch.batch_size
    assert planned.batch.too_large == BATCH_SIZES[BATCH_SIZES.index(largest) + 1]
    assert options["shorter rows"].settings == {
        "task.max_length": options["shorter rows"].prediction.shape.length
    }
    assert options["gradient checkpointing"].prediction.checkpointing
    assert options["weights in bfloat16"].prediction.dtype == "bfloat16"


def test_a_real_plan(tmp_path: Path) -> None:
    config = make_config(tmp_path, "small", training={"batch_size": 8})
    peak = predict_memory(config).peak_bytes
    planned = plan_memory(config, memory=int(0.9 * peak))
    assert planned.prediction.peak_bytes == peak
    assert planned.verdict == "fits if"
    assert planned.batch is not None
    again = make_config(tmp_path, "small", training={"batch_size": planned.batch.batch_size})
    assert predict_memory(again).peak_bytes == planned.batch.prediction.peak_bytes


@pytest.mark.usefixtures("stand_in")
def test_batch_size_is_confirmed_by_one_step(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama")
    asked: list[tuple[int, BatchShape]] = []

    def confirm(config: RunConfig, shape: BatchShape, surplus: int = 0) -> MeasuredPeak:
        asked.append((config.training.batch_size, shape))
        return MeasuredPeak(1_000_000 + 6400 * shape.rows + surplus, 1_000_000, "tensors", shape)

    choice = choose_batch_size(config, memory=2_000_000, confirm=confirm)
    assert asked == [(136, choice.prediction.shape)]
    assert (choice.batch_size, choice.accumulation_steps) == (136, 1)
    assert choice.measured == confirm(config, choice.prediction.shape)
    with pytest.raises(RunError, match="was predicted to take 1,870,400 bytes and took 2,870,400"):
        choose_batch_size(
            config, memory=2_000_000, confirm=lambda config, shape: confirm(config, shape, 1_000_000)
        )
    with pytest.raises(ModelError, match="not even one row of 64 tokens fits: it needs 1,056,720 bytes"):
        choose_batch_size(config, memory=1_000_000)


def test_a_real_step_confirms(tmp_path: Path) -> None:
    config = make_config(tmp_path, "small")
    source = find_structure(config)
    BertForSequenceClassification(source.config).save_pretrained(tmp_path / "small")
    peak = predict_memory(config, shape=BatchShape(8, 64, 64)).peak_bytes
    choice = choose_batch_size(config, source=source, memory=int(peak * 1.051), confirm=confirm_with(source))
    assert choice.batch_size == 8
    assert choice.measured is not None
    assert choice.measured.peak_bytes == pytest.approx(peak, rel=ALLOWED)


@pytest.mark.parametrize(
    ("memory", "chosen"),
    [
        (1_104_000, (8, 1)),  # in a second pass the gradients of the first would be there
        (1_103_000, None),
    ],
)
def test_a_whole_step_may_fit_where_its_half_does_not(
    memory: int, chosen: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "predict_memory", linear(1_000_000, 100, 100_000))
    config = make_config(tmp_path, "llama", training={"batch_size": 2, "accumulation_steps": 4})
    shape = BatchShape(2, 64, 64)
    if chosen is None:
        with pytest.raises(
            ModelError, match=r"\(--auto_batch_size\) finds no batch size: not even one row of 64"
        ):
            split_step(config, shape=shape, memory=memory, confirm=False)
        return
    split, choice = split_step(config, shape=shape, memory=memory, confirm=False)
    assert (split.training.batch_size, split.training.accumulation_steps) == chosen
    assert (choice.batch_size, choice.accumulation_steps) == chosen


def test_a_split_step_is_predicted_and_confirmed_as_it_will_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"targets": "all", "rank": 64}  # gradients that count beside activations
    config = make_config(tmp_path, "small", method=large, training={"batch_size": 8, "auto_batch_size": True})
    source = find_structure(config)
    BertForSequenceClassification(source.config).save_pretrained(tmp_path / "small")
    ran: list[tuple[RunConfig, BatchShape]] = []

    def measure(attachment: Any, config: RunConfig, shape: BatchShape, **given: Any) -> MeasuredPeak:
        ran.append((config, shape))
        return measure_step(attachment, config, shape, **given)

    monkeypatch.setattr(measuring, "measure_step", measure)
    alone = predict_memory(config, shape=BatchShape(4, 64, 64)).peak_bytes
    split, choice = split_step(config, source=source, memory=int(alone * 1.051))
    assert (split.training.batch_size, split.training.accumulation_steps) == (2, 4)
    longest = BatchShape(2, 64, 64)
    assert choice.prediction.peak_bytes == predict_memory(split, shape=longest).peak_bytes
    assert ran == [(split, longest)]
    assert choice.measured is not None
    assert choice.measured.peak_bytes == pytest.approx(choice.prediction.peak_bytes, rel=ALLOWED)


def test_search_finds_the_largest() -> None:
    draw = random.Random(0)
    for _ in range(300):
        base, slope, bend = (
            draw.randrange(1000),
            draw.randrange(1, 100),
            draw.random() * draw.choice((0, 1, 0.01)),
        )
        sizes = draw.choice((range(1, draw.randrange(2, 600)), BATCH_SIZES, range(64, 2048, 64)))
        limit = draw.randrange(1, draw.choice((1000, 100_000, 3_000_000)))
        asked: list[int] = []

        def peak_of(size: int, b: int = base, s: int = slope, c: float = bend, a: list[int] = asked) -> int:
            a.append(size)
            return int(b + s * size + c * size * size)

        found = largest_fitting(sizes, peak_of, limit, near=draw.choice((None, 4, 16, 500)))
        assert len(asked) <= 14
        assert found == max((size for size in sizes if peak_of(size) <= limit), default=None)


def test_budgets() -> None:
    given = find_budget(torch.device("cpu"), memory=1000)
    assert (given.total_bytes, given.beside_bytes, given.fits(952), given.fits(953)) == (1000, 0, True, False)
    cuda = find_budget(torch.device("cuda"), memory=24_000_000_000)
    assert cuda.needed(10_000_000_000) == 11_000_000_000 + CUDA_CONTEXT_BYTES
    assert find_budget(torch.device("cpu")).total_bytes > 0
    assert Budget(1000, "host", held=2.0).warning(400) == ""
    assert "MALLOC_MMAP_THRESHOLD_" in Budget(1000, "host", held=2.0).warning(600)


# -- on the command line ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_in")
def test_plan_of_a_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    asked = [
        "plan",
        "--model",
        "./llama",
        "--method",
        "lora",
        "--r",
        "8",
        "--batch_size",
        "4",
        "--max_length",
        "2048",
    ]
    assert main(asked) == 2, "no run could have such rows"
    assert "task.max_length 2048 is longer than the 1024 positions of" in capsys.readouterr().err
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048}))
    assert main([*asked, "--memory", "1.5MB"]) == 0
    said = capsys.readouterr().out
    assert "4 rows of 2,048 tokens, weights in float32, on cpu" in said
    assert "fits only with a change: it needs 1.82 MiB of 1.43 MiB (as given)" in said
    assert "model.gradient_checkpointing=true" in said
    assert "largest batch that fits as it is: 2 rows, peak 1.34 MiB; 4 do not fit" in said
    assert main([*asked, "--checkpointing"]) == 0
    assert "checkpointed" in (said := capsys.readouterr().out)
    assert "\nfits: it needs" in said


@pytest.mark.usefixtures("stand_in")
def test_plan_of_a_model_alone_splits_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    asked = ["plan", "--model", "./llama", "--max_length", "64", "--batch_size", "6", "--grad_accum", "4"]
    assert main([*asked, "--auto_batch_size", "--memory", "1.1MB"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "auto_batch_size: 6 rows x 4 forward passes a step; predicted peak of the longest batch 1,038,400 bytes\n\n"
    )
    assert main([*asked, "--auto_batch_size", "--memory", "1.07MB"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("auto_batch_size: 2 rows x 12 forward passes a step")
    assert "memory of a training step, 2 rows of 64 tokens" in said
    assert "\nfits: it needs" in said
    assert main([*asked, "--memory", "1.07MB"]) == 0
    assert "auto_batch_size" not in (said := capsys.readouterr().out)
    assert "6 rows of 64 tokens" in said
    assert main([*asked, "--auto_batch_size", "--memory", "1MB"]) == 2
    assert "(--auto_batch_size) finds no batch size: not even one row of" in capsys.readouterr().err


@pytest.mark.usefixtures("stand_in")
def test_the_top_of_the_list_is_no_limit(tmp_path: Path) -> None:
    planned = plan_memory(make_config(tmp_path, "llama"), memory=10**12).as_dict()
    assert "largest batch that fits as it is: 4,096 or more rows, peak of 4,096 26 MiB" in render_memory(
        planned
    )
    planned = plan_memory(make_config(tmp_path, "llama"), memory=2_000_000).as_dict()
    assert "as it is: 136 rows, peak 1.78 MiB; 144 do not fit" in render_memory(planned)


def test_a_plan_with_a_task_is_of_its_longest_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from peftlab import execute
    from peftlab.commands.sources import config_from

    taken: list[Any] = []

    class Planned:
        def as_dict(self) -> dict[str, str]:
            return {"verdict": "fits"}

    def plan_in_its_place(config: RunConfig, **given: Any) -> Planned:
        taken.append((config, given))
        return Planned()

    monkeypatch.setattr(execute, "plan_memory", plan_in_its_place)
    values = config_from(preset="embedded").model_dump(mode="json")
    values["task"] |= {"num_samples": 30}
    values["output"] |= {"directory": str(tmp_path)}
    preflight = execute.plan(build_config(values), memory=123)
    (_, given), *rest = taken
    assert not rest
    assert given["memory"] == 123
    assert given["shape"].rows == values["training"]["batch_size"]
    assert given["shape"].length == given["shape"].label_length == preflight["tokens"]["longest"]
    assert preflight["memory"] == {"verdict": "fits"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GB", 24 * 10**9), ("24 gib", 24 << 30), ("1.5k", 1500), ("800", 800), ("0.5TiB", 1 << 39)],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert read_bytes(text, "memory") == expected


@pytest.mark.parametrize("text", ["lots", "0", "-3GB", "3 apples", "GB"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--memory: '{text}' is not an amount of memory; write 24GB"):
        read_bytes(text, "memory")


def test_a_wrong_amount_is_told_without_torch(tmp_path: Path) -> None:
    answer = command(["plan", "--model", ".", "--memory", "lots"], tmp_path)
    assert (answer.code, "torch" in answer.loaded) == (2, False)
    assert "write 24GB or 24GiB" in answer.err


@pytest.mark.usefixtures("stand_in")
def test_a_plan_that_need_not_look_for_the_largest_batch_says_so(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", training={"batch_size": 4}, task={"max_length": 64})
    shape = BatchShape(4, 240, 240)
    planned = plan_memory(config, shape=shape, memory=30_000_000, search=False)
    assert (planned.verdict, planned.batch, planned.searched) == ("fits", None, False)
    assert "was not looked for; --largest_batch does" in render_memory(planned.as_dict())
    tight = plan_memory(config, shape=shape, memory=1_079_000, search=False)
    assert tight.searched
    assert tight.batch is not None
    assert "was not looked for" not in render_memory(tight.as_dict())
