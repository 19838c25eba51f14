"""Every method through a whole run: trained and proved, resumed, saved, loaded, asked; batched answers equal single ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import tiny_models
import whole_runs
from peftlab.catalog import METHODS
from peftlab.config import build_config
from peftlab.errors import ConfigError, MethodError, ScheduleError
from peftlab.execute import execute, plan
from peftlab.files import read_yaml
from peftlab.generation import generate
from peftlab.mapping import map_model
from peftlab.store import load, open_run
from tiny_runs import ONE_PHASE, run, same

SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 4, "target_rank": 2},
    "ia3": {},
    "prompt_tuning": {"num_virtual_tokens": 5},
    "p_tuning": {"num_virtual_tokens": 5, "encoder": "lstm", "encoder_dropout": 0.1},
    "prefix_tuning": {"num_virtual_tokens": 5, "projection": True},
}
MODELS = ("llama", "gpt2", "bert", "t5", "bart")


def make_config(folder: Path, method: str, **sections: Any):
    values = whole_runs.make_values(folder, **sections)
    values["method"] = {"name": method, **SETTINGS[method]}
    del values["schedule"]
    return build_config(values)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_whole_run(method: str, tmp_path: Path) -> None:
    done = execute(make_config(tmp_path, method), show=lambda line: None)
    assert done.is_finished
    (phase,) = done.summary()["phases"]
    assert phase["proved"] is True
    opened = open_run(str(done.path), directory=tmp_path)
    model, tokenizer = load(done.path)
    batch = tokenizer("name[Aromi], food[Thai]", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, opened.model(**batch).logits)
        with opened.adapter(on=False):
            bare = opened.model(**batch).logits
    assert bare.shape[-1] == len(tokenizer)
    again = execute(build_config(read_yaml(done.path / "config.yaml")), show=lambda line: None)
    assert again.summary()["scores"] == done.summary()["scores"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", SETTINGS)
def test_a_resumed_run_equals_an_uninterrupted_one(method: str, name: str, tmp_path: Path) -> None:
    setup: dict[str, Any] = {
        "method": method, "settings": SETTINGS[method], "phases": ONE_PHASE, "max_steps": 6, "validation_steps": 3,
        "probe": method in ("adalora", "ia3"),
    }  # fmt: skip
    whole = run(tmp_path / "whole", name, **setup, save_steps=1, keep=9)
    resumed = run(
        tmp_path / "resumed", name, resume=tmp_path / "whole" / "checkpoint-4", **setup, save_steps=6
    )
    assert same(resumed.tensors, whole.tensors)
    first = whole.told("step")[-1]["loss"]
    assert resumed.told("step")[-1]["loss"] == first


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("method", SETTINGS)
def test_answers_do_not_depend_on_the_batch(method: str, name: str) -> None:
    leaf = METHODS.load(method)
    base = tiny_models.build(name)
    head: Any = tiny_models.HEADS[name]
    attached = leaf.attach(base, map_model(base), leaf.Settings(**SETTINGS[method]), head=head, seed=1)
    with torch.no_grad():
        for parameter in attached.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.5)
    prompts = [[5, 9, 11], [7, 8, 30, 31, 32, 33], [12, 40, 41], [50, 51, 52, 53]]
    tokenizer = tiny_models.tokenizer()
    asked: dict[str, Any] = {"head": head, "max_new_tokens": 6}
    together = generate(attached.model, tokenizer, prompts, batch_size=4, **asked)
    alone = [generate(attached.model, tokenizer, [prompt], batch_size=1, **asked)[0] for prompt in prompts]
    assert together == alone
    with attached.disabled():
        assert generate(attached.model, tokenizer, prompts, batch_size=4, **asked) == generate(
            tiny_models.build(name), tokenizer, prompts, batch_size=4, **asked
        )


@pytest.mark.parametrize("name", MODELS)
def test_every_layers_prefix_trains(name: str) -> None:
    leaf = METHODS.load("prefix_tuning")
    base = tiny_models.build(name, 4)
    head: Any = tiny_models.HEADS[name]
    attached = leaf.attach(base, map_model(base), leaf.Settings(num_virtual_tokens=3), head=head, seed=1)
    attached.model(**tiny_models.training_inputs(name)).loss.backward()
    (prefix,) = (p for n, p in attached.parameters().items() if "prompt_encoder" in n)
    of_layers = prefix.grad.reshape(3, 4, 2, -1).norm(dim=(0, 3))  # keys and values of four layers
    assert (of_layers > 0).all()


def test_what_cannot_be_is_refused_before_anything_heavy(tmp_path: Path) -> None:
    with pytest.raises(
        MethodError, match=r"prefix_tuning does not work on LlamaForCausalLM: .*checkpointing"
    ):
        plan(make_config(tmp_path, "prefix_tuning", model={"gradient_checkpointing": True}))
    config = make_config(tmp_path, "prompt_tuning")
    longer = config.model_copy(
        update={
            "adapters": (config.adapters[0].model_copy(update={"settings": {"num_virtual_tokens": 500}}),)
        }
    )
    with pytest.raises(ConfigError, match="behind 500 virtual ones"):
        plan(longer)
    values = whole_runs.make_values(tmp_path) | {"method": {"name": "prompt_tuning"}}
    with pytest.raises(ScheduleError, match="trains nothing"):
        plan(build_config(values))
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 8,
    }
    vit = T.ViTForImageClassification(T.ViTConfig(num_hidden_layers=2, **sizes))
    leaf = METHODS.load("prompt_tuning")
    with pytest.raises(
        MethodError, match="puts virtual tokens beside a text, and ViTForImageClassification reads none"
    ):
        leaf.attach(vit, map_model(vit), leaf.Settings(), head="classification", seed=1)
