"""Extensions on disk: a folder for each task, found by any process; what does not belong there is refused whole."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import environment
from extension_models import FACES, awaken, create, extension, load, logits, save, state_of, train, unchanged
from safetensors.torch import load_file, save_file

import tiny_models
from peftlab.errors import CheckpointError, InputError, OutputError, UnknownNameError
from peftlab.extensions import bundles
from peftlab.files import CHECKSUMS, checksums, write_json
from peftlab.store import MANIFEST, read_manifest

ODD_NAMES = (
    "..",
    ".",
    "",
    " ",
    "../out",
    "a/b",
    "/a",
    "a\\b",
    ".hidden",
    "a.",
    "a\n",
    "con",
    "nul.x",
    "a" * 101,
    "a\0b",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of a saved hybrid of a T5."""
    made = extension("hybrid", tiny_models.build("t5"), tmp_path_factory.mktemp("adapters"))
    return made.save_hybrid_model(awaken(made.create_hybrid("python")), "python", scores={"loss": 1.5})


@pytest.fixture
def saved(original, tmp_path):
    """The extension that finds a copy of it, and the copy."""
    folder = shutil.copytree(original, tmp_path / "python" / "hybrid")
    return extension("hybrid", tiny_models.build("t5"), tmp_path), folder


def tamper(folder: Path, file: str, change) -> None:
    """Change a file of tensors and make the checksums right again."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    write_json(folder / CHECKSUMS, checksums(folder))


_FRESH = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch, tiny_models
from extension_models import FACES, extension, load, logits
from pathlib import Path
found = {}
for kind, face in FACES.items():
    for name in ("t5", "bert") if kind == "hybrid" else ("t5",):
        made = extension(kind, tiny_models.build(name), Path(sys.argv[2]) / name)
        found[f"{kind} {name}"] = [getattr(made, face.tasks)(), logits(load(kind, made), name).tolist()]
print(json.dumps(found))
"""


def test_a_new_process_lists_and_loads_with_identical_answers(tmp_path):
    answers = {}
    for name in ("t5", "bert"):
        base = tiny_models.build(name)
        for kind in FACES if name == "t5" else ("hybrid",):
            made = extension(kind, base, tmp_path / name)
            model = train(create(kind, made), name)
            save(kind, made, model)
            answers[f"{kind} {name}"] = logits(model, name)
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _FRESH, json.dumps(folders), str(tmp_path)],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == answers.keys()
    for key, (tasks, values) in found.items():
        assert tasks == ["python"]
        assert torch.equal(torch.tensor(values), answers[key]), key


def test_a_hybrids_bundle_holds_both_kinds_and_says_what_it_is(saved):
    made, folder = saved
    made.load_hybrid_model("python")
    files = {"adapter_config.json", "adapter_model.safetensors", "new_layer.json", "new_layer.safetensors"}
    assert {file.name for file in folder.iterdir()} == files | {MANIFEST, CHECKSUMS}
    manifest = read_manifest(folder)
    assert manifest["method"] == "hybrid"
    assert manifest["counts"]["by_kind"]["lora"] > 0 < manifest["counts"]["by_kind"]["new_layer"]
    assert manifest["base"]["class"] == "T5ForConditionalGeneration"
    assert len(manifest["base"]["live_sha256"]) == 64
    info = made.get_hybrid_info("python")
    assert info["scores"] == {"loss": 1.5}
    assert {"torch", "peft", "transformers"} <= info["versions"].keys()
    assert info["created"].startswith("20")
    everything = made.get_hybrid_info()
    assert everything["available_hybrid_models"] == made.list_hybrid_models() == ["python"]
    assert everything["current_hybrid_model"] == "python"
    assert everything["tasks"]["python"] == info
    json.dumps(everything)


def test_kinds_and_tasks_lie_side_by_side(tmp_path):
    base = tiny_models.build("gpt2")
    for kind in ("new_layer", "lora"):
        made = extension(kind, base, tmp_path)
        for task in ("sql", "e2e-nlg.v2"):
            save(kind, made, create(kind, made, task), task)
    (tmp_path / "notes").mkdir()
    (tmp_path / "sql" / "lora-9").mkdir()  # what a crash may leave
    assert extension("lora", base, tmp_path).list_adapters() == ["e2e-nlg.v2", "sql"]
    assert extension("hybrid", base, tmp_path).list_hybrid_models() == []
    assert extension("lora", base, tmp_path / "nowhere").list_adapters() == []
    with pytest.raises(
        UnknownNameError, match=r"unknown saved lora model below .* 'slq' \(did you mean 'sql'\?\)"
    ):
        load("lora", made, "slq")
    with pytest.raises(InputError, match="nothing was saved there yet"):
        load("hybrid", extension("hybrid", base, tmp_path), "sql")


def test_names_never_leave_the_folder(tmp_path):
    made = extension("lora", tiny_models.build("gpt2"), tmp_path / "adapters")
    model = made.create_adapter("python")
    for name in ODD_NAMES:
        for call in (
            lambda name: made.create_adapter(name),
            lambda name: made.save_adapter(model, name),
            lambda name: made.load_adapter(name),
            lambda name: made.get_adapter_info(name),
        ):
            with pytest.raises(InputError, match="the name "):
                call(name)
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_place_of_a_tasks_folder_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / "adapters"
    place.mkdir()
    (place / "python").symlink_to(tmp_path / "elsewhere")
    (place / "sql").write_text("a file")
    made = extension("lora", tiny_models.build("gpt2"), place)
    model = made.create_adapter("python")
    for task, said in (("python", "is a link"), ("sql", "is a file")):
        with pytest.raises(OutputError, match=said):
            made.save_adapter(model, task)
    assert made.list_adapters() == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_taken_name_is_refused_versioned_or_replaced(tmp_path):
    made = extension("lora", tiny_models.build("gpt2"), tmp_path)
    models = [awaken(made.create_adapter("python"), seed) for seed in range(4)]
    answers = [logits(model, "gpt2") for model in models]
    first = made.save_adapter(models[0], "python")
    with pytest.raises(OutputError, match="is there already"):
        made.save_adapter(models[1], "python")
    with pytest.raises(InputError, match="on_conflict is 'replace'"):
        made.save_adapter(models[1], "python", on_conflict="replace")
    second = made.save_adapter(models[1], "python", on_conflict="version")
    assert [first.name, second.name] == ["lora", "lora-2"]
    assert torch.equal(logits(made.load_adapter("python"), "gpt2"), answers[1])
    assert torch.equal(logits(made.load_adapter("python", version=1), "gpt2"), answers[0])
    assert made.save_adapter(models[2], "python", on_conflict="overwrite") == second
    assert torch.equal(logits(made.load_adapter("python"), "gpt2"), answers[2])
    assert torch.equal(logits(made.load_adapter("python", version=1), "gpt2"), answers[0])
    assert made.get_adapter_info("python")["saved_versions"] == [1, 2]
    with pytest.raises(InputError, match="no version 3"):
        made.load_adapter("python", version=3)
    fresh = made.save_adapter(models[3], "sql", on_conflict="overwrite")
    assert fresh == tmp_path / "sql" / "lora"


def test_a_path_names_one_folder(tmp_path):
    made = extension("lora", tiny_models.build("gpt2"), tmp_path / "adapters")
    model = awaken(made.create_adapter("python"))
    folder = made.save_adapter(model, "python", tmp_path / "mine")
    assert folder == tmp_path / "mine"
    assert torch.equal(logits(made.load_adapter("python", tmp_path / "mine"), "gpt2"), logits(model, "gpt2"))
    with pytest.raises(OutputError, match="is there already"):
        made.save_adapter(model, "python", folder)
    made.save_adapter(model, "python", folder, on_conflict="overwrite")
    with pytest.raises(InputError, match="version has no effect with path"):
        made.load_adapter("python", folder, version=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(InputError, match="not a peftlab bundle"):
        made.save_adapter(model, "python", tmp_path / "thesis", on_conflict="overwrite")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


def test_only_its_own_models_are_saved(tmp_path):
    base = tiny_models.build("gpt2")
    made = extension("lora", base, tmp_path)
    with pytest.raises(InputError, match="no extension made it"):
        made.save_adapter(base, "python")
    with pytest.raises(InputError, match="it is a new_layer model"):
        made.save_adapter(extension("new_layer", base).add_layer("python"), "python")


def test_another_base_is_refused(saved, tmp_path):
    other = tiny_models.build("t5")
    with torch.no_grad():
        other.get_parameter("encoder.final_layer_norm.weight")[0] += 1e-6
    before = state_of(other)
    for base in (other, tiny_models.build("t5", seed=1), tiny_models.build("bart")):
        with pytest.raises(CheckpointError, match=r"was made on another base: T5ForConditionalGeneration"):
            extension("hybrid", base, tmp_path).load_hybrid_model("python")
    assert unchanged(before, other)


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *((file, "changed") for file in ("adapter_model.safetensors", "new_layer.safetensors", MANIFEST)),
        *((file, "gone") for file in ("adapter_config.json", "new_layer.safetensors")),
        ("adapter_model.safetensors", "cut"),
    ],
)
def test_a_damaged_file_is_named(saved, file, how):
    made, folder = saved
    content = (folder / file).read_bytes()
    if how == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(
            content[:-1] + bytes([content[-1] ^ 1]) if how == "changed" else content[:-9]
        )
    with pytest.raises(CheckpointError, match=f"damaged: {file}"):
        made.load_hybrid_model("python")
    assert file in made.get_hybrid_info()["tasks"]["python"]["problem"]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "new_layer.safetensors"])
def test_tensors_that_do_not_fit_are_listed_and_nothing_is_loaded(saved, file):
    made, folder = saved
    name = next(iter(load_file(folder / file)))
    before = state_of(made.base_model)

    def misshape(tensors):
        tensors[name] = tensors[name][..., :1].contiguous()

    for said, change in (
        ("unexpected", lambda tensors: tensors.update({"more": torch.ones(1)})),
        ("missing", lambda tensors: tensors.pop("more") and tensors.pop(name)),
        ("of another shape", lambda tensors: tensors.update({name: torch.ones(1)})),
    ):
        tamper(folder, file, change)
        with pytest.raises(
            CheckpointError, match=rf"{said} \['{'more' if said == 'unexpected' else name}'\]"
        ):
            made.load_hybrid_model("python")
    assert unchanged(before, made.base_model)


def test_a_trained_base_that_does_not_fit_is_listed(tmp_path):
    made = extension("lora", tiny_models.build("gpt2"), tmp_path, freeze_base=False)
    folder = made.save_adapter(made.create_adapter("python"), "python")
    tamper(folder, bundles.BASE_FILE, lambda tensors: tensors.pop("transformer.wte.weight"))
    with pytest.raises(CheckpointError, match=r"missing \['transformer.wte.weight'\]"):
        made.load_adapter("python")


def test_a_file_that_is_none_of_safetensors_is_refused(saved):
    made, folder = saved
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    write_json(folder / CHECKSUMS, checksums(folder))
    with pytest.raises(CheckpointError, match="cannot be loaded, and nothing was"):
        made.load_hybrid_model("python")


def test_settings_that_cannot_be_followed_are_refused(saved):
    made, folder = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    for settings in ({"rank": 0}, {"stack": "third"}):
        write_json(folder / MANIFEST, manifest | {"settings": manifest["settings"] | settings})
        write_json(folder / CHECKSUMS, checksums(folder))
        with pytest.raises(CheckpointError, match="its settings cannot be followed"):
            made.load_hybrid_model("python")


def test_an_adapter_is_loaded_as_it_was_saved_whatever_the_config_says(tmp_path):
    base = tiny_models.build("gpt2")
    made = extension("lora", base, tmp_path, lora_r=3)
    model = awaken(made.create_adapter("python"))
    made.save_adapter(model, "python")
    base.train()
    other = extension("lora", base, tmp_path, lora_r=5).load_adapter("python")
    assert not other.training
    assert base.training
    assert torch.equal(logits(other, "gpt2"), logits(model, "gpt2"))


def test_plain_peft_loads_a_saved_adapter(tmp_path):
    import peft

    made = extension("lora", tiny_models.build("gpt2"), tmp_path)
    model = awaken(made.create_adapter("python"))
    folder = made.save_adapter(model, "python")
    by_hand = peft.PeftModel.from_pretrained(tiny_models.build("gpt2"), str(folder)).eval()
    assert torch.equal(logits(by_hand, "gpt2"), logits(model, "gpt2"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "adapters").write_text("a file")
    made = extension("lora", tiny_models.build("gpt2"), tmp_path / "adapters")
    with pytest.raises(OutputError, match="adapters"):
        made.save_adapter(made.create_adapter("python"), "python")
