"""The family map: every module of every architecture in its place, found by structure."""

import peft
import pytest
import torch
from torch import nn

import tiny_models
from peftlab.errors import ModelError, TargetError
from peftlab.mapping import certifying, map_model, parts, unwrap
from peftlab.mapping.positions import Reach
from peftlab.methods import lora

QKVO = {"attention.query", "attention.key", "attention.value", "attention.output"}
CROSS = {role.replace("attention", "cross_attention") for role in QKVO}
FUSED = {"attention.qkv", "attention.output"}
TWO, THREE = {"mlp.up", "mlp.down"}, {"mlp.gate", "mlp.up", "mlp.down"}

# architecture: linear roles, tied, stacks, sites of each target group with two layers per stack
PLACES = {
    "llama": (QKVO | THREE, False, ("layers",), {"attention_qv": 4, "attention": 8, "mlp": 6}),
    "llama_tied": (QKVO | THREE, True, ("layers",), {"attention_qv": 4, "attention": 8, "mlp": 6}),
    "gpt2": (FUSED | TWO, True, ("layers",), {"attention_qv": 2, "attention": 4, "mlp": 4}),
    "bert": (QKVO | TWO, False, ("layers",), {"attention_qv": 4, "attention": 8, "mlp": 4}),
    "t5": (QKVO | CROSS | TWO, True, ("encoder", "decoder"), {"attention_qv": 12, "attention": 24, "mlp": 8}),
    "opt": (QKVO | TWO, True, ("layers",), {"attention_qv": 4, "attention": 8, "mlp": 4}),
    "gptj": (QKVO | TWO, False, ("layers",), {"attention_qv": 4, "attention": 8, "mlp": 4}),
    "bloom": (FUSED | TWO, True, ("layers",), {"attention_qv": 2, "attention": 4, "mlp": 4}),
    "phi3": (
        FUSED | {"mlp.gate_up", "mlp.down"},
        False,
        ("layers",),
        {"attention_qv": 2, "attention": 4, "mlp": 4},
    ),
    "bart": (
        QKVO | CROSS | TWO,
        True,
        ("encoder", "decoder"),
        {"attention_qv": 12, "attention": 24, "mlp": 8},
    ),
    "distilbert": (QKVO | TWO, False, ("layers",), {"attention_qv": 4, "attention": 8, "mlp": 4}),
}
MODULES = {  # one module of every architecture that a substring would misplace
    "bert": {
        "bert.encoder.layer.0.attention.output.dense": "attention.output",
        "bert.encoder.layer.0.output.dense": "mlp.down",
        "bert.encoder.layer.0.attention.output.LayerNorm": "norm",
        "bert.pooler.dense": "other",
        "classifier": "head",
    },
    "gpt2": {
        "transformer.h.0.attn.c_proj": "attention.output",
        "transformer.h.0.mlp.c_proj": "mlp.down",
        "transformer.wpe": "embedding.other",
    },
    "t5": {
        "decoder.block.1.layer.1.EncDecAttention.v": "cross_attention.value",
        "decoder.block.1.layer.0.SelfAttention.v": "attention.value",
        "shared": "embedding",
        "lm_head": "head",
    },
    "opt": {"model.decoder.embed_tokens": "embedding", "model.decoder.layers.1.fc2": "mlp.down"},
    "phi3": {
        "model.layers.0.mlp.gate_up_proj": "mlp.gate_up",
        "model.layers.0.self_attn.qkv_proj": "attention.qkv",
    },
    "mixtral": {
        "model.layers.0.mlp.experts": "mlp.experts",
        "model.layers.0.self_attn.o_proj": "attention.output",
    },
}


@pytest.fixture(scope="module")
def models():
    return {name: tiny_models.build(name) for name in tiny_models.BUILDERS}


@pytest.mark.parametrize("name", PLACES)
def test_roles_stacks_and_tie(name, models):
    roles, tied, stacks, _ = PLACES[name]
    family = map_model(models[name])
    assert {site.role for site in family.sites if site.linear and site.layer is not None} == roles
    assert family.tied is tied
    assert dict(family.stacks) == dict.fromkeys(stacks, 2)
    for stack in stacks:
        assert {site.layer for site in family.sites if site.stack == stack} == {0, 1}


@pytest.mark.parametrize("name", PLACES)
def test_target_groups(name, models):
    _, tied, _, counts = PLACES[name]
    family = map_model(models[name])
    for group, count in counts.items():
        selection = family.select(group)
        assert len(selection.adapted) == count
        assert selection.saved == ()
    both = family.select("both").adapted
    assert len(both) == counts["attention"] + counts["mlp"]
    everything = family.select("all")
    assert everything.adapted == both
    assert [site.role for site in everything.saved] == (["embedding"] if tied else ["embedding", "head"])
    fused = any(site.role == "attention.qkv" for site in both)
    assert bool(family.select("attention_qv").notes) is fused
    assert family.select("attention_only") == family.select("attention_qv")
    assert family.select("mlp_only") == family.select("mlp")


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_names_would_misplace(name, models):
    by_path = {site.path: site.role for site in map_model(models[name]).sites}
    for path, role in MODULES[name].items():
        assert by_path[path] == role, path


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_every_parameter_is_located(name, models):
    model = models[name]
    family = map_model(model)
    embedding, head = model.get_input_embeddings(), unwrap(model.get_output_embeddings() or nn.Identity())
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        site = family.locate(parameter_name)
        assert site.path != parameter_name, f"{parameter_name} has no place"
        if parameter_name.rpartition(".")[0] in ("lm_head", "classifier"):
            assert site.group == "lm_head"
        elif parameter is embedding.weight:
            assert site.group == "embed"
        else:
            assert site.group != "lm_head" or site.path.endswith("lm_head")
        inside = any(f".{part}." in parameter_name for part in ("layers", "h", "layer", "block"))
        assert (site.layer is not None) == inside, parameter_name
    assert head is not embedding


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_widths_are_those_of_the_modules(name, models):
    model = models[name]
    x = {}
    hooks = [
        model.get_submodule(site.path).register_forward_hook(
            lambda module, given, out, path=site.path: x.update({path: (given[0].shape[-1], out.shape[-1])})
        )
        for site in map_model(model).sites
        if site.linear
    ]
    model(**tiny_models.inputs(name))
    for hook in hooks:
        hook.remove()
    wrong = {
        site.path: (site.in_features, site.out_features)
        for site in map_model(model).sites
        if site.linear and x[site.path] != (site.in_features, site.out_features)
    }
    assert wrong == {}


@pytest.mark.parametrize("name", PLACES)
def test_a_model_that_peft_wrapped_maps_to_the_same_places(name):
    model = tiny_models.build(name)
    bare = {site.path: (site.role, site.group, site.stack, site.layer) for site in map_model(model).sites}
    selection = map_model(model).select("both")
    config = peft.LoraConfig(r=2, target_modules=[site.path for site in selection.adapted])
    if name == "gpt2":
        config.fan_in_fan_out = True
    wrapped = peft.get_peft_model(model, config)
    family = map_model(wrapped)
    prefix = "base_model.model."
    assert {
        site.path.removeprefix(prefix): (site.role, site.group, site.stack, site.layer)
        for site in family.sites
    } == bare
    for parameter_name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            path = parameter_name.removeprefix(prefix).partition(".lora_")[0]
            assert family.locate(parameter_name).role == bare[path][0]
    with pytest.raises(TargetError):
        family.select("lora_A")


def test_layer_1_is_not_layer_11():
    family = map_model(tiny_models.build("llama", num_layers=12))
    assert family.stacks == {"layers": 12}
    assert [site.layer for site in family.select("layers.1.self_attn.q_proj").adapted] == [1]
    assert [site.layer for site in family.select("1.mlp.up_proj").adapted] == [1]
    assert family.locate("model.layers.11.self_attn.q_proj.weight").layer == 11
    assert family.locate("model.layers.1.self_attn.q_proj.weight").layer == 1
    columns = {family.column(site) for site in family.sites} - {None}
    assert columns == {f"layer_{i}_{group}" for i in range(12) for group in ("attention", "mlp")}


def test_columns_name_the_stack_where_there_are_two(models):
    family = map_model(models["t5"])
    columns = {family.column(site) for site in family.sites} - {None}
    assert columns == {
        f"{stack}_layer_{i}_{group}"
        for stack in ("encoder", "decoder")
        for i in (0, 1)
        for group in ("attention", "mlp")
    }


def test_a_role_a_name_and_a_path_select(models):
    family = map_model(models["llama"])
    assert len(family.select("attention.query").adapted) == 2
    assert family.select(["q_proj", "attention.query"]).adapted == family.select("attention.query").adapted
    assert [s.path for s in family.select("model.layers.1.mlp.down_proj").adapted] == [
        "model.layers.1.mlp.down_proj"
    ]
    mixed = family.select(("mlp", "attention_qv")).adapted
    assert [s.path for s in mixed] == [s.path for s in family.sites if s in mixed], "in the model's order"


@pytest.mark.parametrize(
    ("target", "suggestion"), [("atention", "attention"), ("q_prj", "q_proj"), ("attention.qury", "query")]
)
def test_an_unknown_target_says_what_there_is(target, suggestion, models):
    with pytest.raises(TargetError) as caught:
        map_model(models["llama"]).select(target)
    message = str(caught.value)
    assert f"'{target}' matches nothing in this llama model (did you mean '" in message
    assert suggestion in message.partition("did you mean")[2].partition("?")[0]
    assert "groups: attention_qv, attention, mlp, both, all; roles: attention.key" in message
    assert "module names: down_proj" in message


def test_one_unknown_target_among_known_ones_is_refused(models):
    with pytest.raises(TargetError, match="'nothing_here'"):
        map_model(models["llama"]).select(["mlp", "nothing_here"])


def test_both_is_refused_where_half_of_it_is_missing(models):
    family = map_model(models["mixtral"])
    for target in ("both", "all"):
        with pytest.raises(TargetError) as caught:
            family.select(target)
        message = str(caught.value)
        assert f"target '{target}' needs 'mlp'" in message
        assert "groups: attention_qv, attention;" in message, "it must not offer what it refuses"
    assert len(family.select("attention").adapted) == 8


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ModelError, match="no transformer blocks found in this Sequential model"):
        map_model(nn.Sequential(nn.Linear(2, 2)))


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(3))


def test_what_cannot_be_proved_is_never_used_silently():
    family = map_model(_Plain())
    assert family.stacks == {"layers": 3}
    assert {site.role for site in family.sites if site.linear} == {"unproven"}
    with pytest.raises(
        TargetError, match=r"not proved, because it is not a transformers model .* such as down, up"
    ):
        family.select("mlp")
    assert [s.path for s in family.select("up").adapted] == [f"blocks.{i}.up" for i in range(3)], (
        "by name it works"
    )


def test_models_inside_another_module_are_mapped_together(models):
    both = nn.ModuleDict({"text": models["llama"], "other": models["bert"]})
    family = map_model(both)
    assert dict(family.stacks) == {"text": 2, "other": 2}
    assert len(family.select("attention").adapted) == 16
    assert family.unproven == {}


def test_the_tie_is_seen_on_the_meta_device():
    for name, tied in (("llama", False), ("llama_tied", True), ("gpt2", True)):
        with torch.device("meta"):
            assert map_model(tiny_models.BUILDERS[name](2)).tied is tied


def test_the_places_depend_on_the_experiment(monkeypatch, models, tmp_path):
    """The companion: where a change at one position seems to stay there, nothing mixes and the tests above fail."""
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(certifying, "_known", {})
    monkeypatch.setattr(parts, "reach", lambda *_: Reach(here=True, earlier=False, later=False))
    roles = {site.role for site in map_model(models["llama"]).sites}
    assert not roles & QKVO


def test_experts_count_to_the_mlp_where_a_method_can_adapt_them():
    family = map_model(tiny_models.build("mixtral"))
    with pytest.raises(TargetError, match="needs 'mlp'"):
        family.select("both")
    selection = family.select("both", experts=True)
    assert [site.path for site in selection.experts] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert any("adapted without dropout" in note for note in selection.notes)
    assert len(family.select("mlp", experts=True).experts) == 2
    assert not family.select("attention", experts=True).experts


def test_adapters_on_experts_do_not_hide_the_block():
    """peft stands on 3-D parameters with one wrapper around another; the parts of the block stay what they are."""
    base = tiny_models.build("mixtral")
    before = {site.path: site.role for site in map_model(base).sites}
    attached = lora.attach(base, map_model(base), lora.Settings(), head="causal", seed=0)
    prefix = "base_model.model."
    assert {site.path.removeprefix(prefix): site.role for site in attached.family.sites} == before
    assert attached.family.unproven == {}
    assert {attached.family.locate(name).group for name in attached.parameters()} == {"attention", "mlp"}
