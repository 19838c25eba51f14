"""Every type of peft on a tiny Llama: it works, which is shown by doing all of it, or is refused with the reason.

`python tests/conformance/test_peft_types.py` writes the pinned table, `src/peftlab/assets/peft_types.json`, anew; then
`peftlab list peft_types --markdown > docs/peft-types.md` makes its page.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tiny_models
from peftlab.attaching import peft_types
from peftlab.attaching.peft_types import peft_type_names
from peftlab.batches import IGNORED
from peftlab.catalog import METHODS
from peftlab.commands.peft_types import PINNED as TABLE
from peftlab.errors import (
    ConfigError,
    InputError,
    MethodError,
    NotTrainingError,
    TargetError,
    UnknownNameError,
)
from peftlab.gradients import read_gradients
from peftlab.mapping import map_model
from peftlab.objective import ModelLoss
from peftlab.proof import TrainingProof, fingerprint
from peftlab.settings import validate
from tiny_runs import ONE_PHASE, run, same

PINNED: dict[str, dict[str, Any]] = json.loads(TABLE.read_text()) if TABLE.exists() else {}

CONFIGS: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "c3a": {"block_size": 8},
    "cartridge": {"num_virtual_tokens": 5},
    "fourierft": {"n_frequency": 10},
    "gralora": {"r": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4},
    "psoft": {"r": 4},
    "road": {"group_size": 8},
    "trainable_tokens": {"token_indices": [33, 43]},
    "vblora": {"vector_length": 8, "num_vectors": 10},
    "waveft": {"n_frequency": 10},
}
"""What peft's own defaults, meant for large models, must be exchanged for on a model of width 16."""
REFUSED_CONFIGS: dict[str, dict[str, Any]] = {
    "adamss": {"r": 8, "num_subspaces": 2},
    "cpt": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 4]},
    "multitask_prompt_tuning": {"num_virtual_tokens": 5},
    "shira": {"r": 2},
}
"""The same for types that are refused, were they tried all the same."""
OWN: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 4, "target_rank": 2},
    "prompt_tuning": {"num_virtual_tokens": 5},
    "p_tuning": {"num_virtual_tokens": 5},
    "prefix_tuning": {"num_virtual_tokens": 5},
}
"""Settings of types that are methods of their own."""


def attach(name: str, *, model: Any = None, base: str = "llama", seed: int = 3, **settings: Any) -> Any:
    """A type on a tiny model, by its own method where it is one."""
    method = name if name in METHODS.names() else "peft"
    leaf = METHODS.load(method)
    if method == "peft":
        settings = {"type": name, "config": CONFIGS.get(name, {})} | settings
    else:
        settings = OWN.get(name, {}) | settings
    model = tiny_models.build(base) if model is None else model
    return leaf.attach(
        model, map_model(model), leaf.Settings(**settings), head=tiny_models.HEADS[base], seed=seed
    )


@torch.no_grad()
def logits(model: Any, name: str = "llama", *, rows: slice = slice(None)) -> torch.Tensor:
    """Logits of the text, without those of virtual tokens."""
    batch = {key: value[rows] for key, value in tiny_models.inputs(name).items()}
    found: torch.Tensor = model(**batch).logits[:, -8:]
    return found


def try_type(name: str, folder: Path) -> dict[str, Any]:
    """Do with a type all that a run does.

    Args:
        name: A type of peft.
        folder: An empty folder.

    Returns:
        The type's row of the table.

    Raises:
        AssertionError: It attaches, and breaks a law.
    """
    reference = tiny_models.build("llama")
    base = tiny_models.build("llama")
    try:
        structure = attach(name, model=tiny_models.build("llama").to("meta"))
        attached = attach(name, model=base)
    except MethodError as error:
        _check_untouched(base, reference)
        return {"works": False, "reason": str(error)}
    attached.model.eval()
    parameters = attached.parameters()
    assert list(structure.parameters()) == list(parameters), "as in a pre-flight"
    assert {n for n, p in attached.model.named_parameters() if p.requires_grad} == set(parameters)
    row = {
        "works": True,
        "method": name if name in METHODS.names() else "peft",
        "identity": bool((logits(attached.model) - logits(reference)).abs().max() < 1e-5),
        "tensors": len(parameters),
        "parameters": sum(p.numel() for p in parameters.values()),
        "steps": _train(attached),
    }
    trained = logits(attached.model)
    assert (trained - logits(reference)).abs().max() > 1e-4, "it has learnt something"
    _check_rows_are_apart(attached, trained)
    with attached.disabled():
        torch.testing.assert_close(logits(attached.model), logits(reference), rtol=0, atol=1e-6)
    assert torch.equal(logits(attached.model), trained)
    _check_round(name, attached, trained, folder)
    assert attached.remove() is base
    _check_untouched(base, reference)
    return row


def _train(attached: Any) -> int:
    """Train until all is shown to, within the steps that the attachment allows; law 1's proof looks on."""
    parameters = attached.parameters()
    allowed = max(attached.steps_to_train(name) for name in parameters)
    proof = TrainingProof(parameters, attached.steps_to_train)
    proof.enter("all")
    moving = torch.optim.AdamW(parameters.values(), lr=1e-2)
    attached.model.train()
    for step in range(allowed):
        torch.manual_seed(step)
        moving.zero_grad(set_to_none=True)
        attached.model(**tiny_models.training_inputs("llama", seed=step)).loss.backward()
        proof.observe(read_gradients(parameters), step=step)
        moving.step()
        shown = proof.after_step(learning_rate=1e-2, step=step)
        if shown is not None:
            attached.model.eval()
            assert shown.unreached == ()
            return shown.steps_needed
    raise AssertionError(f"not shown to train in {allowed} steps")


@torch.no_grad()
def _check_rows_are_apart(attached: Any, trained: torch.Tensor) -> None:
    """A row's answers do not depend on its neighbours, and the loss of a batch is the sum of its rows' terms."""
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(logits(attached.model, rows=slice(1)), trained[:1], **close)
    batch = tiny_models.training_inputs("llama")
    batch["labels"][0, :5] = IGNORED
    objective, model = ModelLoss("causal"), attached.answering
    alone = [objective.total(model, {key: value[i : i + 1] for key, value in batch.items()}) for i in (0, 1)]
    torch.testing.assert_close(objective.total(model, batch), alone[0] + alone[1], **close)


def _check_round(name: str, attached: Any, trained: torch.Tensor, folder: Path) -> None:
    """Tensors and files, each put on another adapter and, by plain peft, on a bare base, give the same answers."""
    tensors = attached.tensors()
    attached.save(folder)
    assert same(attached.tensors(), tensors), "saving changes nothing"
    other = attach(name, seed=99)
    other.load(tensors)
    assert torch.equal(logits(other.model.eval()), trained)
    assert same(other.tensors(), tensors)
    again = attach(name, seed=98)
    again.load_saved(folder)
    assert torch.equal(logits(again.model.eval()), trained)
    with warnings.catch_warnings():
        for message in peft_types._EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        plain = peft.PeftModel.from_pretrained(tiny_models.build("llama"), str(folder)).eval()
    assert torch.equal(logits(plain), trained)


def _check_untouched(base: Any, reference: Any) -> None:
    """The base is as a fresh one: modules, keys, bits, what trains, answers."""
    before, after = reference.state_dict(), base.state_dict()
    assert list(after) == list(before)
    assert [n for n in before if fingerprint(before[n]) != fingerprint(after[n])] == []
    assert [type(m) for m in base.modules()] == [type(m) for m in reference.modules()]
    assert [p.requires_grad for p in base.parameters()] == [p.requires_grad for p in reference.parameters()]
    assert torch.equal(logits(base), logits(reference))


@pytest.mark.parametrize("name", peft_type_names())
def test_a_type_does_what_the_table_says(name: str, tmp_path: Path) -> None:
    assert try_type(name, tmp_path) == PINNED[name]


def test_enough_types_work() -> None:
    assert sorted(PINNED) == peft_type_names()
    refused = sorted(name for name, row in PINNED.items() if not row["works"])
    assert refused == sorted(peft_types.REFUSED)
    assert len(PINNED) == 45
    assert len(PINNED) - len(refused) >= 30


@pytest.mark.parametrize("name", sorted(peft_types.REFUSED))
@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_would_break_something(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peft that has learnt to do it shall be noticed."""
    monkeypatch.setattr(peft_types, "REFUSED", {})
    monkeypatch.setitem(CONFIGS, name, REFUSED_CONFIGS.get(name, {}))
    try:
        row = try_type(name, tmp_path)
    except (AssertionError, NotTrainingError, ValueError, RuntimeError, AttributeError):
        return
    assert not row["works"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pvera", {}),  # draws in its forward pass
        ("loha", {"config": {"r": 2, "module_dropout": 0.3, "rank_dropout": 0.1}}),
        ("vblora", {}),
        ("cartridge", {}),
        ("oft", {"config": {"oft_block_size": 4, "module_dropout": 0.3}}),
        ("adaption_prompt", {}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"type": name, "config": CONFIGS.get(name, {})} | changes
    setup: dict[str, Any] = {
        "method": "peft", "settings": settings, "phases": ONE_PHASE, "max_steps": 6, "validation_steps": 3,
        "probe": True,
    }  # fmt: skip
    whole = run(tmp_path / "whole", **setup, save_steps=1, keep=9)
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-4", **setup, save_steps=6)
    assert same(resumed.tensors, whole.tensors)
    start = attach(name, seed=1, **changes).tensors()
    assert not same(whole.tensors, start)


@pytest.mark.parametrize(
    ("name", "base"), [("vera", "gpt2"), ("ln_tuning", "bert"), ("loha", "t5"), ("oft", "bart")]
)
def test_other_models(name: str, base: str) -> None:
    """Conv1D, a new classification head, three stacks of one shared embedding."""
    reference, model = tiny_models.build(base), tiny_models.build(base)
    attached = attach(name, model=model, base=base)
    names = [n for n in attached.parameters() if ".modules_to_save." in n]
    assert bool(names) == (base == "bert")
    attached.model.train()
    attached.model(**tiny_models.training_inputs(base)).loss.backward()
    assert all(p.grad is not None for p in attached.parameters().values())
    attached.remove()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_what_is_held_fast_does_not_train_and_is_kept(tmp_path: Path) -> None:
    attached = attach("cartridge")
    assert [n.rpartition(".")[2] for n in attached.parameters()] == ["trainable_embedding"]
    assert {n.rpartition(".")[2] for n in attached.tensors()} == {"trainable_embedding", "frozen_embedding"}
    made = run(
        tmp_path,
        method="peft",
        settings={"type": "cartridge", "config": CONFIGS["cartridge"]},
        phases=ONE_PHASE,
    )
    fresh = attach("cartridge", seed=1).tensors()
    moved = {n.rpartition(".")[2] for n, t in made.tensors.items() if not torch.equal(t, fresh[n])}
    assert moved == {"trainable_embedding"}


@pytest.mark.parametrize("name", ["hira", "loha", "vera", "unilora", "glora"])
def test_k_is_no_more_than_the_adapter_needs(name: str) -> None:
    """Where nothing is zero, one step; what is zero, one; what stands behind, two."""
    attached = attach(name)
    zeros = {n for n, p in attached.parameters().items() if not p.detach().any()}
    allowed = {n: attached.steps_to_train(n) for n in attached.parameters()}
    assert {allowed[n] for n in zeros} <= {1}
    assert {allowed[n] for n in allowed.keys() - zeros} == {2 if zeros else 1}


def test_k_grows_with_what_chance_skips() -> None:
    attached = attach("loha", config={"r": 2, "module_dropout": 0.5})
    assert {attached.steps_to_train(n) for n in attached.parameters()} == {31, 32}
    tokens = attach("trainable_tokens")
    assert [tokens.steps_to_train(n) for n in tokens.parameters()] == [51]


@pytest.mark.parametrize("name", sorted(n for n, row in PINNED.items() if row.get("method") == "peft"))
def test_half_precision_trains_wide_or_is_refused(name: str) -> None:
    model = tiny_models.build("llama").bfloat16()
    if name in ("adaption_prompt", "ln_tuning"):
        with pytest.raises(MethodError, match=r"in the base's bfloat16, .* set model\.dtype=float32"):
            attach(name, model=model)
        _check_untouched(model, tiny_models.build("llama").bfloat16())
        return
    attached = attach(name, model=model)
    assert {p.dtype for p in attached.parameters().values()} == {torch.float32}
    assert list(attached.parameters()) == list(attach(name).parameters()), "nothing else has become trainable"
    assert {n for n, p in attached.model.named_parameters() if p.requires_grad} == set(attached.parameters())


def test_a_base_that_peft_left_half_attached_is_put_back() -> None:
    """Queries of width 16 are adapted when keys of width 8 fail."""
    model = tiny_models.build("llama")
    kept = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(MethodError, match=r"road.* on this LlamaForCausalLM: .*divisible by group_size"):
        attach("road", model=model, config={"group_size": 16})
    _check_untouched(model, tiny_models.build("llama"))
    assert {path: set(vars(module)) for path, module in model.named_modules()} == kept
    assert set(attach("loha", model=model).parameters()) == set(attach("loha").parameters())


def test_companion_a_half_attached_base_is_noticed() -> None:
    model = tiny_models.build("llama")
    config = peft.RoadConfig(group_size=16, target_modules=["q_proj", "k_proj"])
    with pytest.raises(ValueError, match="divisible"):
        peft.get_peft_model(model, config)
    with pytest.raises(AssertionError):
        _check_untouched(model, tiny_models.build("llama"))


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("lohha", {}, UnknownNameError, "unknown peft type 'lohha' .did you mean 'loha'"),
        ("lora", {}, MethodError, "'lora' is a method of its own here: set method.name=lora"),
        ("loha", {"config": {"alhpa": 3}}, ConfigError, "config.alhpa' of peft's type 'loha' .did you mean 'alpha'"),
        ("loha", {"config": {"target_modules": ["q_proj"]}}, ConfigError, "is set by method.targets"),
        ("oft", {"config": {"bias": "all"}}, ConfigError, "method bitfit does"),
        ("vblora", {"config": {"save_only_topk_weights": True}}, ConfigError, "nothing to go on training with"),
        ("ln_tuning", {"targets": "mlp"}, MethodError, "targets has no effect on peft's type 'ln_tuning'"),
        ("cartridge", {"targets": "both"}, MethodError, "targets has no effect on peft's type 'cartridge'"),
        ("loha", {"targets": "mlpp"}, TargetError, "target 'mlpp' matches nothing"),
        ("psoft", {"config": {}}, MethodError, r"psoft.* on this LlamaForCausalLM: `r` .32. must be less"),
        ("c3a", {"config": {"block_size": "wide"}}, MethodError, "c3a.* on this LlamaForCausalLM"),
        ("oft", {"config": {"oft_block_size": 7}}, ConfigError, r"config.oft_block_size .*7.*! Adjusted .* to .8."),
        ("boft", {"config": {"boft_block_size": 4, "boft_n_butterfly_factor": 2}}, ConfigError, "factor to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(name: str, changes: dict[str, Any], error: Any, message: str) -> None:
    leaf, model = METHODS.load("peft"), tiny_models.build("llama")
    settings = validate(leaf.Settings, {"type": name} | changes)
    with pytest.raises(error, match=message) as raised:
        leaf.attach(model, map_model(model), settings, head="causal", seed=1)
    assert isinstance(raised.value, InputError)
    _check_untouched(model, tiny_models.build("llama"))


def test_refusals_on_other_models() -> None:
    for name, base, message in (
        ("trainable_tokens", "bert", "trains nothing whole beside it, which classifier would need"),
        ("osf", "gpt2", "has put nothing beside them"),
        ("loha", "gpt2", "loha.* on this GPT2LMHeadModel: Target module of type"),
    ):
        model, reference = tiny_models.build(base), tiny_models.build(base)
        with pytest.raises(MethodError, match=message):
            attach(name, model=model, base=base)
        assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
        assert [p.requires_grad for p in model.parameters()] == [True] * len(list(model.parameters()))


def test_spelling_and_positions() -> None:
    leaf = METHODS.load("peft")
    assert set(attach("LN-Tuning").parameters()) == set(attach("ln_tuning").parameters())
    assert leaf.Settings(type="cartridge", config={"num_virtual_tokens": 7}).num_virtual_tokens == 7
    with pytest.raises(ConfigError, match="at least one target is needed"):
        validate(leaf.Settings, {"targets": ()})


def write_table() -> None:
    """Try every type and write what came of it."""
    warnings.filterwarnings("ignore")
    rows: dict[str, dict[str, Any]] = {}
    for name in peft_type_names():
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = try_type(name, Path(folder))
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{sum(row['works'] for row in rows.values())} of {len(rows)} types work")


if __name__ == "__main__":
    write_table()
