"""Starts of LoRA that are refused: before anything is made, or from rows that do not let them be computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_models
from peftlab.attaching import lora_limits
from peftlab.batches import Collator
from peftlab.catalog import METHODS
from peftlab.errors import CheckpointError, ConfigError, MethodError
from peftlab.mapping import map_model
from peftlab.settings import validate
from tiny_runs import make_rows

LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": "both"}


def attach(init: str, name: str = "llama", **settings: Any) -> tuple[Any, Any]:
    leaf = METHODS.load("lora")
    base = tiny_models.build(name)
    chosen = leaf.Settings(**LORA | {"init": init} | settings)
    return base, leaf.attach(base, map_model(base), chosen, head=tiny_models.HEADS[name], seed=3)


def test_what_was_to_start_from_rows_and_never_did_is_not_saved(tmp_path: Path) -> None:
    _, made = attach("eva")
    with pytest.raises(MethodError, match=r"never seen the rows.*prepare\(batches\)"):
        made.save(tmp_path)


def test_rows_that_are_too_short_for_the_rank() -> None:
    _, made = attach("eva", rank=12)
    with pytest.raises(MethodError, match=r"init eva: after .* batches the directions have not settled"):
        made.prepare([tiny_models.training_inputs("llama", batch=1, length=8)] * 2)
    with pytest.raises(MethodError, match=r"init eva looks at rows of the run, and there are none"):
        made.prepare([])


def test_only_as_many_batches_are_taken_as_asked_for() -> None:
    taken: list[int] = []

    def endless() -> Any:
        for number, batch in enumerate([Collator(0, "causal")(make_rows("causal", 4))] * 400):
            taken.append(number)
            yield batch

    _, made = attach("lora_ga", init_batches=3)
    made.prepare(endless())
    assert taken == [0, 1, 2]
    _, plain = attach("pissa")
    plain.prepare(endless())
    assert taken == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "loftq"}, r"LoftQ is not offered.*bitsandbytes"),
        ({"init": "pisa"}, r"must be one of default, gaussian"),
        ({"init": "pissa_niter_N"}, r"must be one of default"),
        ({"init": "orthogonal", "rank": 3}, r"even ranks, not 3"),
        ({"init": "pissa", "init_batches": 4}, r"init_batches has an effect only where init is one of eva"),
        ({"corda_method": "kpm"}, r"corda_method has an effect only where init is corda"),
        ({"init": "eva", "lora_ga_scale": "unit"}, r"lora_ga_scale has an effect only where init is lora_ga"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(METHODS.load("lora").Settings, settings)


@pytest.mark.parametrize(
    ("init", "name", "settings", "message"),
    [
        ("pissa", "llama", {"rank": 9}, r"rank 9 is above 8.*k_proj"),
        ("lora_ga", "llama", {"rank": 5, "targets": "attention.key"}, r"rank 5 is above 4"),
        ("olora", "gpt2", {}, r"a Conv1D, for a Linear"),
        ("pissa", "mixtral", {}, r"experts held as 3-D parameters"),
    ],
)  # fmt: skip
def test_what_peft_would_compute_wrongly_is_refused(
    init: str, name: str, settings: dict[str, Any], message: str
) -> None:
    base = tiny_models.build(name)
    leaf = METHODS.load("lora")
    with pytest.raises(MethodError, match=message):
        leaf.attach(
            base,
            map_model(base),
            leaf.Settings(**LORA | {"init": init} | settings),
            head=tiny_models.HEADS[name],
            seed=1,
        )


def test_corda_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_limits.importlib.util, "find_spec", lambda _: None)
    base = tiny_models.build("llama")
    leaf = METHODS.load("lora")
    with pytest.raises(MethodError, match=r"pip install attrs"):
        leaf.attach(base, map_model(base), leaf.Settings(init="corda", rank=2), head="causal", seed=1)


def test_a_checkpoint_of_another_start_does_not_fit() -> None:
    _, made = attach("pissa")
    _, plain = attach("default")
    with pytest.raises(CheckpointError, match=r"missing \['first\."):
        made.load(plain.tensors())
