"""The benchmarks say what they are, can be asked for help, and judge as they say; their figures are no test's business."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
FILES = sorted(path.name for path in FOLDER.glob("*.py"))
SHARED = {"lab.py", "repeats.py"}
RUNNABLE = [name for name in FILES if name not in SHARED]


@pytest.fixture
def bench(monkeypatch):
    """Imports a file of the folder, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


LIGHT = [name for name in RUNNABLE if "\nimport torch" not in (FOLDER / name).read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", [name for name in LIGHT if name != "extraction.py"])
def test_each_file_tells_its_arguments(name):
    done = subprocess.run(
        [sys.executable, FOLDER / name, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_the_readme_names_every_file():
    told = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in FILES if name != "all.py" and f"`{name}`" not in told] == []


def test_all_of_them_are_run_by_the_full_form(bench):
    every = bench("all")
    assert {name.split()[0] for name in every.FULL} == set(RUNNABLE) - {"all.py"}
    assert {name.split()[0] for name in every.SHORT} <= set(RUNNABLE)


@pytest.mark.parametrize("form", ["SHORT", "FULL"])
def test_a_form_gives_options_that_the_files_have(form, bench):
    every = bench("all")
    for name, more in getattr(every, form).items():
        file, *fixed = name.split()
        source = (FOLDER / file).read_text(encoding="utf-8")
        given = {word.partition("=")[0] for word in [*fixed, *more] if word.startswith("--")}
        given |= {f"--{key}" for key in every.TAKES.get(file, ())}
        given |= {"--figure"} if file in every.DRAWN else set()
        assert {option for option in given if f'"{option}"' not in source} == set(), name


def test_a_page_tells_machine_versions_commit_and_peers(bench):
    told = bench("all").describe(None)
    record = json.loads(told.partition("```json\n")[2].partition("\n```")[0])
    assert {"versions", "hardware", "git", "peers"} <= set(record)
    assert record["peers"]["transformers"][0].isdigit()


def test_a_benchmark_that_fails_is_told_and_not_hidden(bench, tmp_path):
    every = bench("all")
    options = argparse_options(tmp_path)
    part, works = every.run("limits.py --no_such_option", [], options)
    assert not works
    assert "failed: " in part
    assert "no_such_option" in part


def argparse_options(tmp_path):
    from argparse import Namespace

    return Namespace(output=tmp_path / "page.md", data_dir=None, tokenizer=None, trl_python=None)


# -- repeats ----------------------------------------------------------------------------------------------------------


def repeat(own, peer):
    return {"own": {"speed": own}, "peer": {"speed": peer}}


def test_repeats_join_those_of_the_same_work_alone(bench, tmp_path):
    repeats, path = bench("repeats"), tmp_path / "repeats.json"
    assert repeats.read_repeats(None, {}) == repeats.read_repeats(path, {}) == []
    repeats.write_repeats(path, {"steps": "3"}, [repeat(2.0, 1.0)])
    assert repeats.read_repeats(path, {"steps": "3"}) == [repeat(2.0, 1.0)]
    with pytest.raises(SystemExit, match=r"steps differ"):
        repeats.read_repeats(path, {"steps": "4"})


def test_a_ratio_is_the_median_of_ratios_within_repeats(bench):
    repeats = bench("repeats")
    found = [repeat(10.0, 1.0), repeat(2.0, 1.0), repeat(30.0, 10.0)]  # the machine was slow in the second
    assert repeats.median_of(found, "own", "speed") == 10.0
    assert repeats.median_ratio(found, "own", "peer", "speed") == 3.0


# -- training ---------------------------------------------------------------------------------------------------------


def measured(losses, speed=1.0):
    return {"losses": losses, "tokens_per_second": speed, "peak_memory_bytes": 2**20}


def limits():
    return {f"{d}_{f}": 10.0 for d in ("float32", "bfloat16") for f in ("gflops", "tokens_per_second")}


def test_losses_that_differ_end_the_table(bench):
    training = bench("training")
    names = ["trainer_padded", "peftlab_float32", "peftlab"]
    good = {
        "trainer_padded": measured([2.0]),
        "peftlab_float32": measured([2.0001]),
        "peftlab": measured([2.003], 6.0),
    }
    told = training.render([good | {"limits": limits()}], names, "main")
    assert "6.00 x" in told
    assert "peftlab reaches 60%" in told
    for name, loss in (("peftlab_float32", 2.001), ("peftlab", 2.01)):
        bad = good | {name: measured([loss]), "limits": limits()}
        with pytest.raises(SystemExit, match=rf"{name} has losses that differ"):
            training.render([bad], names, "main")


def test_every_contender_starts_from_the_same_numbers(bench):
    import torch

    lab = bench("lab")
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(4, 2, bias=False)})
        holder = torch.nn.ModuleDict(
            {"layers": torch.nn.ModuleDict({"0": torch.nn.ModuleDict({"q": model})})}
        )
        lab.start_alike(torch.nn.ModuleDict({"base": holder}))
        made.append(model["lora_A"].weight.detach())
    assert torch.equal(*made)
    assert made[0].abs().max() <= 0.5


# -- limits, scaling, loss curve ----------------------------------------------------------------------------------------


def test_products_are_those_of_the_model(bench):
    import argparse

    limits, training = bench("limits"), bench("training")
    options = argparse.Namespace(layers=1, hidden=128)

    class Tokens:
        bos_token_id = eos_token_id = pad_token_id = 1

        def __len__(self):
            return 96

    model = training.make_model(Tokens(), options)
    shapes = limits.products(tokens=7, labelled=3, hidden=128, vocabulary=96)
    weights = {tuple(p.shape) for n, p in model.named_parameters() if "proj" in n or "embed" in n}
    assert weights <= {(s.outer, s.inner) for s in shapes}
    adapter = limits.adapter_size(1, 128)
    sides = [sum(p.shape) for n, p in model.named_parameters() if "proj" in n]
    assert adapter == 8 * sum(sides)


def test_growth_is_the_exponent(bench):
    scaling = bench("scaling")
    assert scaling.growth([1, 2, 8], [3.0, 12.0, 192.0]) == pytest.approx(2.0)
    assert scaling.growth([1, 2, 8], [5.0, 5.0, 5.0]) == pytest.approx(0.0, abs=1e-12)


def test_scaling_refuses_unequal_losses(bench):
    scaling = bench("scaling")
    cell = scaling.MIDDLE["short"]
    cells = {
        json.dumps([name, cell]): {"losses": [loss], "seconds": 1.0, "bytes": 1.0}
        for name, loss in (("trainer", 2.0), ("peftlab", 2.1))
    }
    with pytest.raises(SystemExit, match=r"apart by 5\.00%"):
        scaling.gather(cells, "short")


def test_both_drawings_are_drawn(bench, tmp_path):
    from argparse import Namespace

    scaling, loss_curve = bench("scaling"), bench("loss_curve")
    middle = scaling.MIDDLE["short"]
    cells = {
        json.dumps([name, middle | {axis: value}]): {
            "losses": [1.0],
            "seconds": value / 9,
            "bytes": 2**20 * value,
        }
        for axis, values in scaling.AXES["short"].items()
        for value in values
        for name in scaling.CONTENDERS
        if not (name == "trainer" and axis == "adapters" and value > 1)
    }
    curves = scaling.gather(cells, "short")
    scaling.draw(curves, tmp_path / "scaling.png", middle)
    assert "adapters^1.00" in scaling.render(curves)
    losses = [3.0 / math.sqrt(1 + step) for step in range(40)]
    drawn = {("float32", 0): losses, ("float32", 1): [x + 0.1 for x in losses], ("bfloat16", 0): losses}
    loss_curve.draw(drawn, Namespace(figure=tmp_path / "loss.png"))
    for name in ("scaling.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_noise_is_what_seeds_change(bench):
    loss_curve = bench("loss_curve")
    base = [float(step) for step in range(40)]
    curves = {("float32", s): [x + 0.1 * s for x in base] for s in range(3)} | {
        ("bfloat16", 0): [x + 0.05 for x in base]
    }
    found = loss_curve.compare(curves)
    assert found["apart"] == pytest.approx(0.05)
    assert found["noise"] == pytest.approx(0.1)
    assert found["least_noise"] == pytest.approx(0.1)


# -- start --------------------------------------------------------------------------------------------------------------


def test_the_start_table_judges(bench):
    start = bench("start")
    told = start.render({start.HELP: 0.31, start.PEER: 1.0, start.EMBEDDED: 3.9, start.FOLDER: 4.1})
    verdicts = [line.strip("|").split("|")[-1].strip() for line in told.splitlines()[2:6]]
    assert verdicts == ["does not hold", "", "holds", "does not hold"]


def test_a_plan_of_a_folder_reads_no_weights(bench, tmp_path):
    from peftlab.config import build_config
    from peftlab.execute import plan

    start = bench("start")
    folder = start.make_folder(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == start.NOISE
    text = (folder / "config.json").read_text(encoding="utf-8")
    small = re.sub(r'"num_hidden_layers": \d+', '"num_hidden_layers": 1', text)
    (folder / "config.json").write_text(small, encoding="utf-8")
    found = plan(
        build_config({"model": {"name": str(folder), "device": "cpu"}, "task": {"name": "embedded"}})
    )
    assert found["trainable"]["parameters"] > 0 if "trainable" in found else found
