"""`peftlab experiment demo`: every class shown, in numbers that are measured; and the verb itself."""

import json

import pytest
from command_line import commands

import tiny_models
from peftlab.catalog import EXPERIMENTS
from peftlab.commands.experimenting import make_folder
from peftlab.errors import ModelError
from peftlab.experiments import demo
from peftlab.verbs import VERBS


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the demo said and the folder that it left."""
    said: list[str] = []
    folder = tmp_path_factory.mktemp("demo")
    files = demo.carry_out(demo.Settings(steps=3), folder, said.append)
    return "\n".join(said), folder, files


def test_the_table_is_the_documents(shown):
    said, folder, files = shown
    assert [file.name for file in files] == ["table.md", "demo.json", "adapters"]
    found = json.loads((folder / "demo.json").read_text())["flan_t5_small"]
    assert found["base_parameters"] == 76_961_152
    assert found["trainable"] == {"LoRA": 688_128, "new layer": 2_360_320, "hybrid": 3_077_120}
    assert {key: round(value, 1) for key, value in found["ratios"].items()} == {
        "hybrid / LoRA": 4.5,
        "hybrid / new layer": 1.3,
    }
    table = (folder / "table.md").read_text()
    for row in (
        "| LoRA | 688,128 | 0.894% | 1.00 |",
        "| new layer | 2,360,320 | 3.067% | 3.43 |",
        "| hybrid | 3,077,120 | 3.998% | 4.47 |",
    ):
        assert row in table
    assert "4.47 (the document: 4.5)" in said


def test_every_class_starts_as_the_base_trains_and_comes_back(shown):
    said, folder, _ = shown
    found = json.loads((folder / "demo.json").read_text())
    assert [row["class"] for row in found["kinds"]] == [
        "LoRAExtension", "TransformerLayerExtension", "HybridExtension",
    ]  # fmt: skip
    for row in found["kinds"]:
        assert row["largest_difference_at_start"] <= 1e-5
        assert row["loss_last"] < row["loss_first"]
        assert row["loaded_answers_identical"]
        assert row["base_unchanged"]
    assert found["sharing"]["shared_layer_moves_both"]
    assert found["sharing"]["base_and_two_hybrids_bytes"] < 2 * found["sharing"]["base_bytes"]
    assert not any(word in said for word in ("DIFFERENT", "HAS CHANGED", "DOES NOT", "NOTHING WAS SAID"))
    assert {row["answer"].partition(":")[0] for row in found["errors"]} == {
        "ConfigError", "TargetError", "InputError", "OutputError", "UnknownNameError", "CheckpointError",
    }  # fmt: skip


def test_it_takes_a_model_of_ones_own(tmp_path):
    pytest.importorskip("tokenizers")
    tiny_models.save_model(tmp_path / "model", "gpt2")
    said: list[str] = []
    base = demo._base(demo.Settings(model=str(tmp_path / "model")))
    row = demo._try_face(
        "HybridExtension", demo.Settings(steps=2), base, base, tmp_path / "adapters", said.append
    )
    assert row["loaded_answers_identical"]
    assert "loss" in said[0]


def test_the_verb_lists_refuses_and_says_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    cases = {
        "list experiments": (0, "Demo of the model extensions"),
        "experiment --help": (0, "peftlab experiment demo --set rank=4"),
        "experiment": (2, "NAME"),
        "experiment dmeo": (2, "unknown experiment 'dmeo' (did you mean 'demo'?)"),
        "experiment demo --set rnak=3": (2, "unknown key 'rnak' (did you mean 'rank'?)"),
        "experiment demo --set rank=0": (2, "'rank': must be greater than or equal to 1"),
        "experiment demo --set rank": (2, "expected KEY=VALUE"),
        "experiment demo --set rank=3 --set rank=4": (2, "rank is given twice"),
        "experiment demo --model ./nowhere": (2, "there is no model folder ./nowhere"),
        "experiment demo --output file": (2, "(--output)"),
        "experiment demo --steps 3": (2, "unknown flag --steps"),
    }
    answers = commands([text.split() for text in cases], tmp_path)
    for (text, (code, said)), answer in zip(cases.items(), answers, strict=True):
        assert answer.code == code, text
        assert said in answer.out + answer.err, (text, answer)
        assert answer.loaded == (), text
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".given.json", ".taken.json"}


def test_each_time_has_a_folder_of_its_own(tmp_path):
    from peftlab.commands.experimenting import ExperimentRequest

    request = ExperimentRequest("mylab.experiments.demo", None, None, tmp_path / "out")
    assert [make_folder(request).name for _ in range(3)] == ["demo", "demo-2", "demo-3"]


def test_every_experiment_is_a_leaf_that_the_verb_can_carry_out():
    for name in EXPERIMENTS.names():
        leaf = EXPERIMENTS.load(name)
        assert leaf.Settings()
        assert callable(getattr(leaf, "carry_out", None) or leaf.arms)
        assert EXPERIMENTS.describe(name)
    assert "experiment" in VERBS


def test_a_model_that_reads_no_tokens_is_refused(tmp_path, monkeypatch):
    from peftlab import loading

    model = tiny_models.build("gpt2")
    monkeypatch.setattr(type(model), "main_input_name", "pixel_values")
    monkeypatch.setattr(loading, "find_model", lambda *args, **named: None)
    monkeypatch.setattr(loading, "load_model", lambda *args, **named: model)
    with pytest.raises(ModelError, match="reads pixel_values"):
        demo._base(demo.Settings(model="vision"))
