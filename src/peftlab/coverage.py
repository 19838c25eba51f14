"""How many of transformers' architectures the map is proved for, measured by trying each.

`peftlab list families --prove` runs this: for every model type it builds a tiny twin from the library's default config
and carries out all experiments, so that a new release of transformers is judged by running it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import torch
from torch import nn

from peftlab.certificate import Certificate
from peftlab.errors import ModelError, RunError, TargetError
from peftlab.family import FamilyMap
from peftlab.inspection.attention_verdict import measure_attention
from peftlab.mapping.assembly import assemble
from peftlab.mapping.certifying import complete_inputs, family_exceptions, prove_config
from peftlab.mapping.twin import twin_inputs

_TEXT = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "TOKEN_CLASSIFICATION",
    "TEXT_ENCODING",
)
_VISION = ("ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "MASKED_IMAGE_MODELING", "IMAGE")
VISION_TYPES = ("vit", "clip", "deit", "beit", "dinov2", "siglip", "swin")
"""The model types that see which the map must reach."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What was proved for one model type.

    Attributes:
        model_type: transformers' model type.
        model_class: The class that was tried.
        runs: Whether a tiny twin of it could be built and run.
        outputs: Whether every block list that runs gives the model's hidden states.
        mixers: Whether a token mixer was found in every block.
        interface: Whether attention goes through transformers' interface.
        attributed: Whether query, key, value and output layers were told apart.
        attention: Linear layers that the target group `attention` stands for in the twin.
        mlp: Linear layers that `mlp` stands for.
        experts: Groups of experts held as 3-D parameters.
        head: What the logits are.
        maps: How attention maps are given: "probe" (recomputed beside the fused kernel, equal to the model's own),
            "output_attentions" (by the model itself), or "refused: why".
        whole: What of the library's default config, in full depth, the twin's certificate leaves unproven.
        note: Why something is missing.
        seconds: What the experiments took.
    """

    model_type: str
    model_class: str
    runs: bool = False
    outputs: bool = False
    mixers: bool = False
    interface: bool = False
    attributed: bool = False
    attention: int = 0
    mlp: int = 0
    experts: int = 0
    head: str = "none"
    maps: str = ""
    whole: str = ""
    note: str = ""
    seconds: float = 0.0

    @property
    def targets(self) -> bool:
        """Whether target groups are resolved and proved: attention layers, and an MLP of layers or experts."""
        return self.mixers and self.attention > 0 and self.mlp + self.experts > 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def text_types() -> dict[str, type[nn.Module]]:
    """Every text model type of the installed transformers with the class that is tried.

    Returns:
        Model type to class: sequence-to-sequence where there is one, else masked, causal, classification ...
    """
    return _types(_TEXT)


def vision_types() -> dict[str, type[nn.Module]]:
    """The model types of `VISION_TYPES` with the class that is tried."""
    return {name: found for name, found in _types(_VISION).items() if name in VISION_TYPES}


def _types(tables: Iterable[str]) -> dict[str, type[nn.Module]]:
    import transformers
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for table in tables:
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
            found.setdefault(model_type, names if isinstance(names, str) else names[0])
    return {model_type: getattr(transformers, name) for model_type, name in sorted(found.items())}


def default_config(model_type: str, model_class: Any) -> Any:
    """The library's default config of a type, that of the text part where the class takes only this.

    Args:
        model_type: transformers' model type.
        model_class: The class that will be built.

    Returns:
        The config.
    """
    from transformers import CONFIG_MAPPING

    family = family_exceptions(model_type)
    config = CONFIG_MAPPING[model_type](**getattr(family, "CONFIG", {}))
    wanted = getattr(model_class, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        inner = [getattr(config, name) for name in config.sub_configs]
        config = next((c for c in inner if isinstance(c, wanted)), config)
    return config


def measure(
    types: dict[str, type[nn.Module]], tell: Callable[[Coverage], object] | None = None
) -> list[Coverage]:
    """Try every type.

    Args:
        types: Model type to class.
        tell: Is given each result as it comes.

    Returns:
        One result per type, sorted by type.
    """
    results = []
    for model_type, model_class in types.items():
        results.append(try_type(model_type, model_class))
        if tell is not None:
            tell(results[-1])
    return results


def try_type(model_type: str, model_class: type[nn.Module]) -> Coverage:
    """Prove one type on a twin of its default config.

    Args:
        model_type: transformers' model type.
        model_class: The class that is tried.

    Returns:
        What was proved.
    """
    began = time.perf_counter()
    name = model_class.__name__
    try:
        config = default_config(model_type, model_class)
        twin, certificate, whole = prove_config(model_class, config)
    except Exception as error:  # noqa: BLE001 - a config or class may fail in any way; the table says how
        return Coverage(model_type, name, note=f"{type(error).__name__}: {_said(error)}")
    if twin is None or not certificate.stacks:
        return Coverage(model_type, name, note=certificate.problem or "no list of blocks was found")
    row = _judge(model_type, name, twin, certificate, time.perf_counter() - began)
    return replace(row, whole=_unproven_of(whole, certificate), seconds=round(time.perf_counter() - began, 3))


def _said(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or "no message").splitlines()[0][:160]


def _judge(model_type: str, name: str, twin: Any, certificate: Certificate, seconds: float) -> Coverage:
    """What a certificate says, as one row."""
    stacks = [s for s in certificate.stacks if s.kinds]
    kinds = [k for s in stacks for k in s.kinds]
    mixing = [k for k in kinds if {"mixer", "cross_mixer"} & set(k.parts.values())]
    family = assemble(twin, {"": twin}, {"": certificate})
    counts = {group: _count(family, group) for group in ("attention", "mlp")}
    wrong = [s.outputs for s in stacks if not s.outputs.startswith("equal")]
    return Coverage(
        model_type,
        name,
        runs=True,
        outputs=bool(stacks) and not wrong,
        mixers=bool(kinds) and len(mixing) == len(kinds),
        interface=any("interface" in k.evidence for k in kinds),
        attributed=_is_attributed(certificate),
        attention=counts["attention"],
        mlp=counts["mlp"],
        experts=sum(site.role == "mlp.experts" for site in family.sites),
        head=certificate.head,
        maps=_maps(twin, family),
        note="; ".join(dict.fromkeys(wrong)),
        seconds=round(seconds, 3),
    )


def _unproven_of(whole: Any, certificate: Certificate) -> str:
    """What of a whole model its twin's certificate leaves unproven: "" for nothing, else a count with a reason."""
    try:
        family = assemble(whole, {"": whole}, {"": certificate})
        family.select("attention")
    except (ModelError, TargetError) as error:
        return f"refused: {_said(error)}"
    if not family.unproven:
        return ""
    path, reason = next(iter(family.unproven.items()))
    linear = sum(site.linear and site.layer is not None for site in family.sites)
    return f"{len(family.unproven)} of {linear} linear layers, such as {path}: {reason}"


def _maps(twin: Any, family: FamilyMap) -> str:
    """How attention maps of a twin are given, tried with two rows of which one is padded."""
    inputs = complete_inputs(twin, twin_inputs(twin))
    if "input_ids" in inputs:
        mask = torch.ones_like(inputs["input_ids"])
        mask[1, -3:] = 0
        inputs = {**inputs, "attention_mask": mask}
    try:
        return str(measure_attention(twin, inputs, family=family))
    except Exception as error:  # noqa: BLE001 - any model code can fail in any way; the table says how
        return f"refused: {type(error).__name__}: {_said(error)}"


def _count(family: FamilyMap, group: str) -> int:
    """How many linear layers a target group stands for; none where it is refused."""
    try:
        return len(family.select(group).adapted)
    except TargetError:
        return 0


def _is_attributed(certificate: Certificate) -> bool:
    """Whether every part that attends has layers for query, key, value and output.

    A mixer over its own sequence without any of them is a recurrence or convolution (Mamba in Jamba) and is not counted,
    as long as the model has one that attends; a cross mixer always attends.
    """
    verdicts = []
    for kind in (kind for stack in certificate.stacks for kind in stack.kinds):
        for path, part in kind.parts.items():
            if part not in ("mixer", "cross_mixer"):
                continue
            inside = [role for p, role in kind.roles.items() if p == path or p.startswith(f"{path}.")]
            ends = {role.rpartition(".")[2] for role in inside}
            made = {makes for end in ends for makes in _MAKES.get(end, ())}
            if made or part == "cross_mixer":
                verdicts.append({"query", "key", "value"} <= made and "output" in ends)
    return bool(verdicts) and all(verdicts)


_MAKES = {
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "qkv": ("query", "key", "value"),
    "key_value": ("key", "value"),
    "query_key": ("query", "key"),
}


def totals(rows: Iterable[Coverage]) -> Iterator[tuple[str, int]]:
    """The counts that the claims are about.

    Args:
        rows: Results.

    Yields:
        What is counted and how many.
    """
    rows = list(rows)
    running = [row for row in rows if row.runs]
    yield "model types", len(rows)
    yield "a tiny twin runs", len(running)
    yield "block outputs are hidden states", sum(row.outputs for row in running)
    yield "token mixer proved in every block", sum(row.mixers for row in running)
    yield "reach the attention interface", sum(row.interface for row in running)
    yield "of these, q k v o attributed", sum(row.attributed for row in running if row.interface)
    yield "q k v o attributed in all", sum(row.attributed for row in running)
    yield "target groups resolved and proved", sum(row.targets for row in running)
    yield (
        "and in the default config of full depth",
        sum(row.targets and not row.whole.startswith("refused") for row in running),
    )
    yield "attention maps by the probe, equal to the model's own", sum(row.maps == "probe" for row in running)
    yield "attention maps at all", sum(row.maps in ("probe", "output_attentions") for row in running)
    yield (
        "head equal to the logits, or the difference named",
        sum(row.head not in ("none", "other") for row in running),
    )


def prove_families() -> dict[str, Any]:
    """Measure every text model type of the installed transformers, and the seven that see.

    Returns:
        Plain values: versions, totals, and a row for each type, under "text" and "vision".

    Raises:
        RunError: No model type could be proved.
    """
    kinds = {"text": text_types(), "vision": vision_types()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # everything is tiny: more threads only wait for each other
    try:
        rows = _measure_kinds(kinds)
    finally:
        torch.set_num_threads(threads)
    if not any(row.runs for row in rows["text"]):
        raise RunError(f"no model type could be proved; the first said: {rows['text'][0].note}")
    return {
        "versions": {name: metadata.version(name) for name in ("transformers", "torch")},
        "totals": {name: dict(totals(found)) for name, found in rows.items()},
        **{name: [row.to_json() for row in found] for name, found in rows.items()},
    }


def _measure_kinds(kinds: dict[str, dict[str, type[nn.Module]]]) -> dict[str, list[Coverage]]:
    """Measure text and vision types under one progress bar, without the library's remarks on default configs."""
    from tqdm import tqdm
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with tqdm(total=sum(map(len, kinds.values())), desc="proving", unit="type", leave=False) as bar:
            return {name: measure(types, lambda _: bar.update()) for name, types in kinds.items()}
    finally:
        logging.set_verbosity(verbosity)
