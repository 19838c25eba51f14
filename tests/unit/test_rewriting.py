"""Full fine-tuning and BitFit: a base's own tensors train in place, and come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import tiny_models
from peftlab.attaching import rewriting
from peftlab.attaching.rewriting import RewrittenAttachment
from peftlab.catalog import METHODS
from peftlab.errors import CheckpointError, ConfigError, MethodError, NotTrainingError, TargetError
from peftlab.mapping import map_model
from peftlab.proof import fingerprint
from peftlab.settings import validate
from tiny_runs import ONE_PHASE, make_rows, prepare, run, same

CASES = [
    ("full", {}, "llama"), ("full", {}, "llama_tied"), ("full", {"num_layers": 1, "head": True}, "llama"),
    ("full", {"targets": "attention"}, "gpt2"), ("full", {}, "bert"), ("full", {}, "t5"), ("full", {}, "bart"),
    ("bitfit", {}, "llama"), ("bitfit", {"norm_gains": True}, "gpt2"), ("bitfit", {}, "bert"),
]  # fmt: skip


def attach(method: str, name: str = "llama", *, model: Any = None, **settings: Any) -> Any:
    leaf = METHODS.load(method)
    model = tiny_models.build(name) if model is None else model
    return leaf.attach(
        model, map_model(model), leaf.Settings(**settings), head=tiny_models.HEADS[name], seed=1
    )


@torch.no_grad()
def logits(model: Any, name: str = "llama") -> torch.Tensor:
    found: torch.Tensor = model(**tiny_models.inputs(name)).logits
    return found


def move(attached: Any) -> None:
    """Change every tensor that trains."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in attached.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))


def marks(model: nn.Module) -> dict[str, int]:
    return {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("method", "settings", "name"), CASES)
def test_what_trains_changes_and_comes_back(method: str, settings: dict[str, Any], name: str) -> None:
    base = tiny_models.build(name)
    given = next(base.parameters()).requires_grad_(False)
    objects = [id(p) for p in base.parameters()]
    before, start = marks(base), logits(base, name)
    attached = attach(method, name, model=base, **settings)
    assert attached.model is base
    assert attached.rewritten == tuple(attached.parameters())
    assert {n for n, p in base.named_parameters() if p.requires_grad} == set(attached.rewritten)
    base(**tiny_models.training_inputs(name)).loss.backward()
    move(attached)
    changed = {n for n, p in base.named_parameters() if fingerprint(p) != before[n]}
    assert changed == set(attached.rewritten)
    trained = logits(base, name)
    assert not torch.equal(trained, start)
    with attached.disabled():
        assert torch.equal(logits(base, name), start)
        assert marks(base) == before
    assert torch.equal(logits(base, name), trained)
    assert attached.remove() is base
    assert marks(base) == before
    assert [id(p) for p in base.parameters()] == objects
    assert torch.equal(logits(base, name), start)
    assert [p for p in base.parameters() if not p.requires_grad] == [given]
    assert all(p.grad is None for p in base.parameters())
    assert attached.rewritten == ()


def test_switching_off_leaves_all_else_alone() -> None:
    """Which tensors train, what autograd has kept of them, and what was raised inside."""
    attached = attach("full")
    expected = logits(tiny_models.build("llama"))
    move(attached)
    frozen = attached.parameters()["lm_head.weight"].requires_grad_(False)
    batch = tiny_models.training_inputs("llama")
    attached.model(**batch).loss.backward()
    alone = {n: p.grad.clone() for n, p in attached.parameters().items() if p.grad is not None}
    attached.model.zero_grad(set_to_none=True)
    trained = attached.tensors()
    loss = attached.model(**batch).loss
    places = [p.data_ptr() for p in attached.parameters().values()]
    with attached.disabled():
        assert torch.equal(logits(attached.model), expected)
    with pytest.raises(KeyError), attached.disabled():
        attached.parameters()["nobody"]
    assert [p.data_ptr() for p in attached.parameters().values()] == places
    loss.backward()  # a reference model between forward and backward pass, as in preference training
    assert same(attached.tensors(), trained)
    assert same({n: p.grad for n, p in attached.parameters().items() if p.grad is not None}, alone)
    assert not frozen.requires_grad
    with torch.inference_mode(), attached.disabled():
        assert torch.equal(logits(attached.model), expected)
    assert same(attached.tensors(), trained)


def test_originals_are_kept_once_on_the_host() -> None:
    attached = attach("full", "llama_tied")
    assert attached.originals_bytes == sum(p.nbytes for p in attached.model.parameters())
    assert "lm_head.weight" not in attached.rewritten, "a tied weight is one tensor"
    with torch.device("meta"):
        structure = tiny_models.BUILDERS["llama_tied"](2)
    assert attach("full", model=structure).originals_bytes == attached.originals_bytes


def names(attached: Any) -> set[str]:
    return {name.removeprefix("model.") for name in attached.rewritten}


def test_what_full_trains() -> None:
    everything = names(attach("full"))
    last = {n for n in everything if n.startswith("layers.1.")}
    assert names(attach("full", num_layers=1)) == last
    assert names(attach("full", num_layers=2, head=True)) == {
        n for n in everything if n.startswith("layers.")
    } | {"lm_head.weight"}
    assert names(attach("full", embeddings=False)) == everything - {"embed_tokens.weight"}
    assert names(attach("full", embeddings=False, head=False)) == everything - {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    mlp = {f"layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert names(attach("full", targets="mlp", num_layers=1)) == mlp
    both = names(attach("full", targets="both"))
    assert names(attach("full", targets="all")) == both | {"embed_tokens.weight", "lm_head.weight"}
    assert not any("norm" in name for name in both)
    selection = attach("full", targets="all").selection
    assert [site.role for site in selection.saved] == ["embedding", "head"]
    assert len(selection.adapted) == 14


def test_both_stacks_and_a_new_head() -> None:
    last = attach("full", "t5", num_layers=1).rewritten
    assert {n.split(".")[0] for n in last} == {"encoder", "decoder"}
    assert all(".block.1." in n for n in last)
    assert {n for n in attach("full", "bert", targets="attention_qv").rewritten if "classifier" in n} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        (
            "llama",
            {"num_layers": 3},
            MethodError,
            "num_layers is 3, and this model's deepest stack has 2 layers",
        ),
        (
            "llama_tied",
            {"embeddings": False, "head": True},
            MethodError,
            r"embed_tokens\.weight' shall train and shall not",
        ),
        ("bert", {"head": False}, MethodError, "a new classification head always trains"),
        ("llama", {"targets": "mlpp"}, TargetError, "did you mean 'mlp'"),
        ("llama", {"targets": "mlp", "num_layers": 9}, MethodError, "num_layers is 9"),
    ],
)
def test_full_refuses_what_contradicts_itself(
    name: str, settings: dict[str, Any], error: Any, message: str
) -> None:
    base = tiny_models.build(name)
    with pytest.raises(error, match=message):
        attach("full", name, model=base, **settings)
    assert all(p.requires_grad for p in base.parameters())


def test_settings_are_checked() -> None:
    settings = METHODS.load("full").Settings
    for values in ({"targets": ()}, {"num_layers": 0}, {"layers": 1}):
        with pytest.raises(ConfigError):
            validate(settings, values)


@pytest.mark.parametrize(("hidden", "layers"), [(16, 2), (768, 12)])
def test_bitfit_counts_by_formula(hidden: int, layers: int) -> None:
    """GPT-2: biases of 3h, h, 4h and h in a layer's four linear layers and of h in its two norms, and h behind the last."""
    with torch.device("meta"):
        model = T.GPT2LMHeadModel(T.GPT2Config(n_embd=hidden, n_layer=layers, n_head=4, vocab_size=64))
    plain = attach("bitfit", "gpt2", model=model)
    assert sum(p.numel() for p in plain.parameters().values()) == 11 * hidden * layers + hidden
    assert {n.rpartition(".")[2] for n in plain.rewritten} == {"bias"}
    model = plain.remove()
    wide = attach("bitfit", "gpt2", model=model, norm_gains=True)
    assert sum(p.numel() for p in wide.parameters().values()) == 13 * hidden * layers + 2 * hidden


@pytest.mark.parametrize("name", ["t5", "mixtral"])
def test_bitfit_is_refused_without_biases(name: str) -> None:
    for settings in ({}, {"norm_gains": True}):
        with pytest.raises(MethodError, match=f"bitfit trains biases, and this {name} model has none"):
            attach("bitfit", name, **settings)
    bare = tiny_models.randomise(T.LlamaForCausalLM(tiny_models.build("llama").config.__class__(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
    )))  # fmt: skip
    with pytest.raises(MethodError, match="this llama model has none; method peft with type ln_tuning"):
        attach("bitfit", model=bare)


def test_a_new_head_makes_not_up_for_biases() -> None:
    config = T.T5Config(
        vocab_size=64, d_model=16, num_layers=1, d_kv=4, d_ff=24, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2, num_labels=3,
    )  # fmt: skip
    model = T.T5ForSequenceClassification(config)
    assert any(name.endswith("bias") for name, _ in model.classification_head.named_parameters())
    leaf = METHODS.load("bitfit")
    with pytest.raises(MethodError, match="this t5 model has none"):
        leaf.attach(model, map_model(model), leaf.Settings(), head="classification", seed=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_half_precision_is_refused(method: str, dtype: torch.dtype) -> None:
    base = tiny_models.build("llama").to(dtype)
    with pytest.raises(MethodError, match=f"of them are {str(dtype)[6:]} .*set model.dtype=float32"):
        attach(method, model=base)
    assert all(p.requires_grad for p in base.parameters())


SETUP: dict[str, Any] = {
    "phases": ONE_PHASE, "max_steps": 6, "validation_steps": 3, "probe": True, "learning_rate": 1e-3,
}  # fmt: skip


def test_full_is_a_plain_loop_of_torch(tmp_path: Path) -> None:
    """Three steps of AdamW in float64: the same rows, the same rate, no decay of vectors."""
    made = prepare(
        tmp_path, method="full", settings={}, dtype=torch.float64, **SETUP
        | {"max_steps": 3, "accumulation_steps": 1, "clip_norm": 0, "warmup_steps": 0, "save_steps": 3},
    )  # fmt: skip
    order = [made.trainer.order.rows_of_step(step) for step in range(3)]
    made.trainer.train()
    model = tiny_models.build("llama").double().train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    )
    rows = make_rows("causal")
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = made.watcher.learning_rates[step]
        model(**made.trainer.parts.collator([rows[i] for i in order[step]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    by_hand = dict(model.named_parameters())
    assert list(by_hand) == list(made.tensors)
    worst = max(float((t - by_hand[n].detach()).abs().max()) for n, t in made.tensors.items())
    assert worst < 1e-12
    start = tiny_models.build("llama").double().state_dict()
    assert min(float((t - start[n]).abs().max()) for n, t in made.tensors.items()) > 1e-3


@pytest.mark.parametrize(
    ("method", "settings", "name"), [("full", {}, "llama"), ("full", {}, "t5"), ("bitfit", {}, "bert")]
)
def test_a_run_is_proved_and_resumed(
    method: str, settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    setup = SETUP | {"method": method, "settings": settings}
    whole = run(tmp_path / "whole", name, **setup, save_steps=1, keep=9)
    (proved,) = whole.told("phase_proved")
    assert proved["tensors"] == len(whole.attachment.parameters())
    assert proved["unreached"] == []
    resumed = run(
        tmp_path / "resumed", name, resume=tmp_path / "whole" / "checkpoint-4", **setup, save_steps=6
    )
    assert same(resumed.tensors, whole.tensors)
    for done in (whole, resumed):
        done.attachment.remove()
        assert marks(done.attachment.model) == marks(tiny_models.build(name))


def test_a_tensor_that_stands_still_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NotTrainingError, match="did not change"):
        run(tmp_path, method="full", settings={}, **SETUP | {"learning_rate": 1e-12, "warmup_steps": 0})


def test_phases_switch_the_groups_of_the_base(tmp_path: Path) -> None:
    done = run(tmp_path, method="full", settings={"targets": "both"}, learning_rate=1e-3)
    assert [told["phase"] for told in done.told("phase_proved")] == [
        t["phase"] for t in done.told("phase_started")
    ]
    assert len(done.told("phase_proved")) == 3


@pytest.mark.parametrize(("settings", "name"), [({}, "llama_tied"), ({"num_layers": 1}, "t5"), ({}, "bert")])
def test_plain_transformers_loads_what_full_saves(
    settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    attached = attach("full", name, **settings)
    move(attached)
    config = dict(vars(attached.model.config))
    attached.save(tmp_path)
    assert vars(attached.model.config) == config, "saving leaves the live model alone"
    kind = {"llama_tied": T.AutoModelForCausalLM, "t5": T.AutoModelForSeq2SeqLM}
    plain = kind.get(name, T.AutoModelForSequenceClassification).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain, name), logits(attached.model, name))
    record = json.loads((tmp_path / "rewritten.json").read_text())
    assert record["method"] == "full"
    assert tuple(record["tensors"]) == attached.rewritten


@pytest.mark.parametrize(("method", "settings", "name"), CASES)
def test_what_is_saved_is_loaded(method: str, settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    attached = attach(method, name, **settings)
    move(attached)
    attached.save(tmp_path)
    assert (tmp_path / "rewritten.safetensors").exists() == (method == "bitfit")
    other = attach(method, name, **settings)
    before = marks(other.model)
    other.load_saved(tmp_path)
    assert same(other.tensors(), attached.tensors())
    other.remove()
    assert marks(other.model) == before, "the originals are those of the base, not of the folder"


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_loading_is_strict(method: str, tmp_path: Path) -> None:
    part = {"num_layers": 1} if method == "full" else {"norm_gains": True}
    attach(method).save(tmp_path)
    other = attach(method, **part)
    move(other)
    before = other.tensors()
    with pytest.raises(CheckpointError, match="does not fit: missing"):
        other.load_saved(tmp_path)
    weights = tmp_path / ("model.safetensors" if method == "full" else "rewritten.safetensors")
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        other.load_saved(tmp_path)
    record = json.loads((tmp_path / "rewritten.json").read_text())
    (tmp_path / "rewritten.json").write_text(json.dumps(record | {"version": 2}))
    with pytest.raises(CheckpointError, match="version 2, this peftlab reads 1"):
        other.load_saved(tmp_path)
    (tmp_path / "rewritten.json").unlink()
    with pytest.raises(CheckpointError, match=f"it is not what {method} saves"):
        other.load_saved(tmp_path)
    assert same(other.tensors(), before), "untouched by a refusal"


# -- companions: the checks above notice a broken product --------------------------------------------------------


def test_companion_originals_that_are_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "kept", lambda parameter: parameter.detach())
    base = tiny_models.build("llama")
    before = marks(base)
    attached = attach("full", model=base)
    move(attached)
    assert marks(attached.remove()) != before


def test_companion_a_forgotten_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = RewrittenAttachment.tensors
    monkeypatch.setattr(
        RewrittenAttachment, "tensors", lambda self: {n: t for n, t in kept(self).items() if "norm" not in n}
    )
    attached = attach("full")
    with pytest.raises(CheckpointError, match="missing"):
        attached.load(attached.tensors())
