"""How many parameters each method trains by its paper's formula, from the shapes of a bare model and nothing of peftlab's.

Sources: LoRA r (in + out), Hu et al. 2021, section 4.1; AdaLoRA r (in + out + 1), Zhang et al. 2023, section 3.1; IA3 d_k,
d_v and d_ff, Liu et al. 2022, section 3.3; BitFit, Ben Zaken et al. 2022, section 3; prompt tuning n d, Lester et al. 2021,
section 2; P-tuning's MLP n d + 3 (d d + d), peft `tuners/p_tuning/`; prefix tuning n 2 L d_kv, Li and Liang 2021, section 4;
a new block is as large as its neighbour, Wu et al. 2024, section 3.2.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peftlab.capabilities.bases import Base
from peftlab.catalog import METHODS

_SCALED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": (("k_proj", "v_proj"), ("down_proj",)),
    "gpt2": (("attn.c_attn",), ("mlp.c_proj",)),
    "opt": (("k_proj", "v_proj"), ("fc2",)),
    "mixtral": (("k_proj", "v_proj"), ()),
    "t5": (("Attention.k", "Attention.v"), ("DenseReluDense.wo",)),
    "bart": (("k_proj", "v_proj"), ("fc2",)),
    "bert": (("self.key", "self.value"), (".output.dense",)),
    "roberta": (("self.key", "self.value"), (".output.dense",)),
    "vit": (("k_proj", "v_proj"), ("mlp.fc2",)),
}
"""Ends of the names of what IA3 scales: at the output, and at the input. Of experts, nothing."""
_GATED = ("bert", "roberta", "bart", "mixtral")
"""Whose new block has a gate: norms behind the sums, and experts that are no projection."""
_VIRTUAL = ("prompt_tuning", "p_tuning", "prefix_tuning")


def count_by_formula(method: str, model: Any, base: Base) -> int:
    """The number of parameters that a method with its default settings trains.

    Args:
        method: A leaf of `methods/`.
        model: A bare model.
        base: What it is.

    Returns:
        The number, a new classification head among it.
    """
    everything: int = sum(p.numel() for p in model.parameters())
    head = _new_head(model) if base.head == "classification" else 0
    if method == "full":
        return everything
    settings = METHODS.load(method).Settings()
    if method == "bitfit":
        outside = [
            n for n, _ in model.named_parameters() if base.head != "classification" or _in_trunk(model, n)
        ]
        biases = {n: p for n, p in model.named_parameters() if n in outside and n.endswith("bias")}
        return sum(int(p.numel()) for p in biases.values()) + head
    if method in _VIRTUAL:
        return _virtual(method, model, settings) + head
    if method == "ia3":
        outputs, inputs = _SCALED[base.model_type]
        shapes = {n: s for n, s in _linear(model).items() if not n.endswith("attention.output.dense")}
        keys = sum(out for name, (_, out) in shapes.items() if name.endswith(outputs))
        inner = sum(width for name, (width, _) in shapes.items() if name.endswith(inputs)) if inputs else 0
        return keys + inner + head
    block = _last_block(model)
    new = sum(p.numel() for p in block.parameters()) + (base.model_type in _GATED)
    if method == "new_layer":
        return new + head
    rank = _rank(method, settings)
    low = sum(rank * (width + out + (method == "adalora")) for width, out in _linear(model).values())
    if method == "hybrid":
        low += sum(rank * sum(shape) for shape in _shapes(block).values()) + new
    else:
        low += sum(rank * number * (width + out) for number, width, out in _experts(model))
    return low + head


def _rank(method: str, settings: Any) -> int:
    """The rank that a method starts with."""
    if method == "peft":
        import peft

        return int(peft.HiraConfig().r)
    return int(settings.initial_rank if method == "adalora" else settings.rank)


def _virtual(method: str, model: Any, settings: Any) -> int:
    """Parameters of virtual tokens or prefixes."""
    tokens, width = settings.num_virtual_tokens, model.get_input_embeddings().weight.shape[1]
    if method == "prompt_tuning":
        return int(tokens * width)
    if method == "p_tuning":
        return int(tokens * width + 3 * (width * width + width))
    block = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.ModuleList) and _is_stack(m))
    names = ("k_proj", "attn.c_attn", "SelfAttention.k", "self.key")
    keys = next(out for name, (_, out) in _shapes(block[0]).items() if name.endswith(names))
    fused = any(name.endswith("c_attn") for name in _shapes(block[0]))
    return int(tokens * 2 * len(block) * (keys // 3 if fused else keys))


def _new_head(model: Any) -> int:
    """Parameters of what stands beside the pretrained trunk."""
    return sum(int(p.numel()) for name, p in model.named_parameters() if not _in_trunk(model, name))


def _in_trunk(model: Any, name: str) -> bool:
    return name.startswith(f"{model.base_model_prefix}.")


def _linear(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear layers of all blocks: name to (in, out)."""
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and _is_stack(m)]
    return {f"{path}.{name}": shape for path, stack in stacks for name, shape in _shapes(stack).items()}


def _shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear layers in a module: name to (in, out); GPT-2's Conv1D holds its weight as (in, out)."""
    found = {}
    for name, inner in module.named_modules():
        if isinstance(inner, nn.Linear):
            found[name] = (inner.in_features, inner.out_features)
        elif type(inner).__name__ == "Conv1D":
            weight: Any = inner.weight
            found[name] = (int(weight.shape[0]), int(weight.shape[1]))
    return found


def _experts(model: nn.Module) -> list[tuple[int, int, int]]:
    """Experts held as 3-D parameters: (number, in, out) each."""
    return [
        (p.shape[0], p.shape[2], p.shape[1]) for p in model.parameters() if p.dim() == 3 and p.shape[0] > 1
    ]


def _last_block(model: Any) -> nn.Module:
    """The block that a new one is a copy of: the last of the encoder, or of the only stack."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and _is_stack(m)]
    return stacks[0][-1]


def _is_stack(modules: nn.ModuleList) -> bool:
    """Whether a list is a stack of blocks, not T5's list of the layers in one block."""
    return len(modules) > 1 and len({type(m) for m in modules}) == 1 and len(list(modules[0].modules())) > 5
