"""What of a plain peft folder is refused when it is imported: with its name, and nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_models
from foreign_adapters import (
    CONFIG,
    QUERY_VALUE,
    SEQ2SEQ,
    TENSORS,
    Made,
    configure,
    copied,
    other_save,
)
from peftlab.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    MethodError,
    ModelError,
    OutputError,
    PeftlabError,
    TargetError,
    UnknownNameError,
)
from peftlab.importing import adapter as importing
from peftlab.importing.adapter import import_adapter
from peftlab.store import load, read_manifest
from tiny_bundles import answers, differences, state_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def refuse(
    folder: Path, base: Path, error: type[PeftlabError], match: str, tmp_path: Path, **asked: Any
) -> None:
    with pytest.raises(error, match=match):
        import_adapter(folder, base=str(base), output=tmp_path / "refused", **asked)
    assert not (tmp_path / "refused").exists() or list((tmp_path / "refused").iterdir()) == []


# -- what is refused: with its name, and nothing is written ----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"lora_bias": True}, ConfigError, r"cannot express: lora_bias=True"),
        ({"layer_replication": [[0, 1], [0, 2]]}, ConfigError, r"layer_replication"),
        ({"trainable_token_indices": [3, 4]}, ConfigError, r"trainable_token_indices"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, ConfigError, r"megatron_config"),
        ({"use_qalora": True}, ConfigError, r"use_qalora"),
        ({"init_lora_weights": "pissa"}, ConfigError, r"path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": 3}, ConfigError, r"'init_lora_weights' is 3, and must be bool or str"),
        ({"r": "8"}, ConfigError, r"'r' is '8', and must be int"),
        ({"r": True}, ConfigError, r"'r' is True, and must be int"),
        ({"r": None}, ConfigError, r"'r' is missing"),
        ({"r": 0}, ConfigError, r"r is 0"),
        ({"rank_pattern": {"q_proj": -1}}, ConfigError, r"rank_pattern gives -1"),
        ({"target_modules": 5}, ConfigError, r"'target_modules' is 5"),
        ({"target_modules": "(q_proj"}, ConfigError, r"its targets cannot be read"),
        ({"target_modules": ["nobodys"]}, TargetError, r"match nothing in this LlamaForCausalLM"),
        ({"target_modules": ["norm"]}, TargetError, r"no linear layers"),
        ({"peft_type": "DAWN"}, UnknownNameError, r"unknown peft type 'dawn'"),
        ({"peft_type": None}, ConfigError, r"names no peft_type"),
        ({"task_type": "TOKEN_CLS"}, ConfigError, r"task_type TOKEN_CLS"),
        ({"task_type": SEQ2SEQ}, InputError, r"adapter of a seq2seq model.*is a causal model"),
        ({"r": 5}, CheckpointError, r"of another shape .*lora_A"),
        ({"use_dora": True}, CheckpointError, r"missing .*lora_magnitude_vector"),
        ({"target_modules": ["q_proj"]}, CheckpointError, r"unexpected .*v_proj\.lora_A"),
        ({"target_modules": [*QUERY_VALUE, "k_proj"]}, CheckpointError, r"missing .*k_proj\.lora_A"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_config_that_cannot_be_followed(
    changes: dict[str, Any], error: type[PeftlabError], match: str, made: Made, tmp_path: Path
) -> None:
    folder, base, _ = copied(made, "names", tmp_path)
    configure(folder, **changes)
    if "task_type" in changes:  # what the base ends in is found where it is loaded
        refuse(folder, base, error, match, tmp_path)
        return
    live = tiny_models.build("llama")
    before = state_of(live)
    with pytest.raises(error, match=match):
        importing.put_on(importing.read_foreign(folder), live, SimpleNamespace(head="causal"))
    assert differences(before, state_of(live)) == []


@pytest.mark.parametrize(
    ("name", "changes", "error", "match"),
    [
        ("prompt", {"num_transformer_submodules": 2}, ConfigError, r"num_transformer_submodules=2"),
        ("prompt", {"num_virtual_tokens": 4}, CheckpointError, r"of another shape"),
        ("prompt", {"modules_to_save": ["ln_f"]}, ConfigError, r"modules_to_save trains transformer\.ln_f whole"),
        ("adalora", {"target_r": 9}, ConfigError, r"target_rank 9 is above initial_rank 4"),
        ("adalora", {"rank_pattern": {"nobodys.lora_E": [True]}}, CheckpointError, r"rank_pattern speaks of 'nobodys"),
        ("ia3_inner", {"feedforward_modules": ["k", "wo"]}, ConfigError, r"scales the input of"),
        ("loha", {"bias": "all"}, ConfigError, r"method\.config\.bias"),
        ("loha", {"dawn": 2}, ConfigError, r"unknown key 'method\.config\.dawn'"),
    ],
)  # fmt: skip
def test_other_methods_refuse_too(
    name: str, changes: dict[str, Any], error: type[PeftlabError], match: str, made: Made, tmp_path: Path
) -> None:
    folder, base, _ = copied(made, name, tmp_path)
    configure(folder, **changes)
    refuse(folder, base, error, match, tmp_path)


def test_a_seq2seq_prefix(made: Made, tmp_path: Path) -> None:
    base = made.base("t5")
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=SEQ2SEQ)
    folder = other_save(peft.get_peft_model(tiny_models.build("t5"), config), tmp_path / "theirs")
    refuse(folder, base, MethodError, r"deals its keys and values wrongly", tmp_path)


def test_tensors_that_are_damaged(made: Made, tmp_path: Path) -> None:
    folder, base, _ = copied(made, "names", tmp_path)
    good = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(good[: len(good) // 2])
    refuse(folder, base, CheckpointError, r"cannot be read", tmp_path)
    (folder / TENSORS).write_bytes(good)
    tensors = load_file(folder / TENSORS)
    name = min(tensors)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / TENSORS)
    refuse(folder, base, CheckpointError, r"not finite: .*lora_A", tmp_path)
    (folder / TENSORS).unlink()
    refuse(folder, base, InputError, r"there is no file .*adapter_model\.safetensors", tmp_path)


@pytest.mark.parametrize("changed", [False, True])
def test_a_copy_of_the_bases_own_tensor(changed: bool, made: Made, tmp_path: Path) -> None:
    """peft saves embeddings beside an adapter where it thinks that they have changed."""
    folder, base, expected = copied(made, "names", tmp_path)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone()
    embedding[1, 1] += 0.5 * changed
    tensors = load_file(folder / TENSORS)
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": embedding}, folder / TENSORS)
    if changed:
        refuse(
            folder, base, CheckpointError, r"unexpected \['base_model\.model\.model\.embed_tokens", tmp_path
        )
        return
    done = import_adapter(folder, base=str(base), output=tmp_path / "out")
    assert any("left out" in note and "embed_tokens" in note for note in done.notes)
    assert torch.equal(answers(load(done.path, device="cpu")[0], "llama"), expected)


class Evil:
    """Runs a command where a file is read without care."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PEFTLAB_TEST_MARK"],)


def test_torchs_own_format_is_read_where_it_is_asked_for(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base, expected = copied(made, "names", tmp_path)
    tensors = load_file(folder / TENSORS)
    (folder / TENSORS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    refuse(folder, base, InputError, r"torch's own format.*--torch_file", tmp_path)
    done = import_adapter(folder, base=str(base), output=tmp_path / "out", torch_file=True)
    assert torch.equal(answers(load(done.path, device="cpu")[0], "llama"), expected)
    monkeypatch.setenv("PEFTLAB_TEST_MARK", str(tmp_path / "it_ran"))
    torch.save({**tensors, "evil": Evil()}, folder / "adapter_model.bin")
    refuse(folder, base, CheckpointError, r"cannot be read as named tensors", tmp_path, torch_file=True)
    assert not (tmp_path / "it_ran").exists()


def deeper(folder: Path) -> Path:
    """An adapter like "names", of a Llama of four blocks."""
    config = peft.LoraConfig(r=2, target_modules=QUERY_VALUE, task_type="CAUSAL_LM")
    live = peft.get_peft_model(tiny_models.build("llama", num_layers=4), config)
    live.peft_config["default"].base_model_name_or_path = "somebody/four"
    return other_save(live, folder)


def test_another_base(made: Made, tmp_path: Path) -> None:
    folder, _, _ = made.get("names")
    refuse(
        folder,
        made.base("gpt2"),
        TargetError,
        r"belongs to another base \(the base is '.*gpt2' \(GPT2LM",
        tmp_path,
    )
    refuse(
        deeper(tmp_path / "four"),
        made.base("llama"),
        CheckpointError,
        r"four does not fit the base '.*llama' \(LlamaForCausalLM\): 8 of its 16 tensors have no place there, such as"
        r" 'model\.layers\.2\.self_attn\.q_proj\.lora_A\.weight': 'model\.layers' has 2 parts, 0 to 1, and no '2';"
        r" import it onto the base that it was trained on; the file names 'somebody/four'",
        tmp_path,
    )
    refuse(folder, tmp_path / "nobody", ModelError, r"nobody", tmp_path)
    wide = tmp_path / "wide"
    tiny_models.tokenizer().save_pretrained(wide)
    config = made.base("llama").joinpath("config.json").read_text(encoding="utf-8")
    values = json.loads(config) | {"num_key_value_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).save_pretrained(wide)
    refuse(folder, wide, CheckpointError, r"of another shape .*v_proj\.lora_B", tmp_path)


def test_a_classifier(made: Made, tmp_path: Path) -> None:
    folder, base, expected = copied(made, "dora", tmp_path)
    refuse(
        folder,
        base,
        InputError,
        r"2 labels are given, and the adapter has 3 classes",
        tmp_path,
        labels=["a", "b"],
    )
    done = import_adapter(folder, base=str(base), output=tmp_path / "out", labels=["a", "b", "c"])
    assert read_manifest(done.path)["labels"] == ["a", "b", "c"]
    assert torch.equal(answers(load(done.path, device="cpu")[0], "bert"), expected)
    tensors = load_file(folder / TENSORS)
    save_file({n: t for n, t in tensors.items() if "classifier" not in n}, folder / TENSORS)
    refuse(folder, base, CheckpointError, r"holds no head", tmp_path)


def test_sources_that_are_something_else(made: Made, tmp_path: Path) -> None:
    folder, base, _ = made.get("names")
    done = import_adapter(folder, base=str(base), output=tmp_path, name="mine")
    refuse(done.path, base, InputError, r"is a bundle of peftlab already", tmp_path)
    refuse(tmp_path / "nobody", base, InputError, r"there is no file", tmp_path)
    refuse(
        made.folder,
        base,
        InputError,
        r"holds no adapter_config\.json.*there is one in .*import that",
        tmp_path,
    )
    lone = tmp_path / "lone.safetensors"
    save_file({"weight": torch.zeros(2)}, lone)
    refuse(lone, base, InputError, r"neither loralib's", tmp_path)
    save_file({"weight": torch.zeros(2)}, lone, metadata={"peftlab": "{}"})
    refuse(lone, base, InputError, r"written by EfficientFineTuningManager", tmp_path)
    refuse(folder, base, InputError, r"alpha and merged are for files of loralib", tmp_path, alpha=3)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / CONFIG).write_text("{", encoding="utf-8")
    refuse(tmp_path / "broken", base, ConfigError, r"is no JSON", tmp_path)


def test_a_name_that_is_there(made: Made, tmp_path: Path) -> None:
    folder, base, _ = made.get("names")
    asked: dict[str, Any] = {"base": str(base), "output": tmp_path, "name": "mine"}
    first = import_adapter(folder, **asked)
    kept = (first.path / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match=r"is there already"):
        import_adapter(folder, **asked)
    assert (first.path / "manifest.json").read_bytes() == kept
    assert import_adapter(folder, **asked, on_conflict="version").path == tmp_path / "mine-2"
    other, _, _ = made.get("no_task")
    assert import_adapter(other, **asked, on_conflict="overwrite").path == first.path
    assert read_manifest(first.path)["origin"].startswith("a peft folder (no_task")
    with pytest.raises(InputError, match=r"the name '\.\./out'"):
        import_adapter(folder, base=str(base), output=tmp_path, name="../out")


def test_the_notes_name_another_base(made: Made, tmp_path: Path) -> None:
    folder, base, _ = copied(made, "names", tmp_path)
    configure(folder, base_model_name_or_path="somebody/else")
    done = import_adapter(folder, base=str(base), output=tmp_path, name="mine")
    assert "the file names the base 'somebody/else'" in done.notes[0]
    assert "for the base 'somebody/else'" in read_manifest(done.path)["origin"]
    assert json.loads((done.path / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"] == str(
        base
    )


def test_companion_another_scale_is_noticed(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that scaled an update otherwise than the file says would not be taken."""
    from dataclasses import replace

    folder, base, _ = made.get("names")
    read = importing.read_peft_folder

    def wrong(*given: Any, **named: Any) -> Any:
        foreign = read(*given, **named)

        def translate(*live: Any) -> Any:
            found = foreign.translate(*live)
            return replace(found, settings={**found.settings, "alpha": 6.06})

        return replace(foreign, translate=translate)

    monkeypatch.setattr(importing, "read_peft_folder", wrong)
    refuse(folder, base, CheckpointError, r"is scaled by 1\.5 in the file and would be by 1\.515", tmp_path)
