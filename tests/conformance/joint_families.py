"""Whether runs of LoRA share a base of each family that generates: tried on a tiny twin, in float64 where its kernels are.

PYTHONPATH=tests python tests/conformance/joint_families.py            all of them; joint_floor.json is written anew
PYTHONPATH=tests python tests/conformance/joint_families.py llama t5   these; the others stay as they are
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import tiny_runs
from peftlab.batches import Collator
from peftlab.coverage import default_config
from peftlab.errors import PeftlabError
from peftlab.joint.adapters import AdapterOfRun, JoinedAdapters
from peftlab.joint.meeting import Meeting
from peftlab.joint.shares import join_batches
from peftlab.mapping import map_model
from peftlab.mapping.twin import build_twin, twin_config
from peftlab.methods.lora import Settings
from peftlab.objective import labelled_loss

FLOOR = Path(__file__).with_name("joint_floor.json")
EXACT, ROUNDED = 1e-7, 1e-5
"""How far losses and gradients may be apart as shares of the largest: in float64, and where a part computes in float32."""
HEADS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM"}


def generating_types() -> dict[str, tuple[str, Any]]:
    """Model type to what it ends in and its class; sequence-to-sequence where there is one."""
    import transformers
    from transformers.models.auto import modeling_auto

    found = {}
    for head, table in HEADS.items():
        for name, classes in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
            chosen = classes if isinstance(classes, str) else classes[0]
            found[name] = (head, getattr(transformers, chosen))
    return dict(sorted(found.items()))


def try_family(model_type: str) -> str:
    """What comes of two runs over one twin.

    Args:
        model_type: transformers' model type.

    Returns:
        "equal", also "equal in float32": the gradients of a joint pass are those of each run alone; else why there is no
        joint pass, or "wrong: ...".
    """
    head, kind = generating_types()[model_type]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = twin_config(copy.deepcopy(default_config(model_type, kind)), num_layers=2)
            model: Any = build_twin(kind, config, told_apart=False)
            try:
                return _compare(model, head, torch.float64)
            except RuntimeError as error:
                if "got Double" not in str(error):
                    raise
            return _compare(build_twin(kind, config, told_apart=False), head, torch.float32)
    except PeftlabError as error:
        return f"refused: {str(error).splitlines()[0]}"
    except Exception as error:  # noqa: BLE001 - a class may fail in any way that is none of ours; the floor says how
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def _compare(model: Any, head: str, dtype: torch.dtype) -> str:
    """The joint pass of two runs against each alone."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if head == "seq2seq" and getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = 2
    family = map_model(model)
    runs = {
        "run1": AdapterOfRun(Settings(rank=2, alpha=4, targets="attention", dropout=0.0), 1),
        "run2": AdapterOfRun(Settings(rank=3, alpha=3, targets="attention", dropout=0.0), 2),
    }
    joined = JoinedAdapters(model, family, runs, head=head)
    joined.model.to(dtype).eval()
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for made in joined.attachments.values():
            for parameter in made.parameters().values():
                noise = torch.randn(parameter.shape, generator=source, dtype=dtype)
                parameter.copy_(0.05 * noise)
    batches = {
        name: Collator(0, head)(tiny_runs.make_rows(head, 2, seed=number)) for number, name in enumerate(runs)
    }
    meeting = Meeting(joined, pad_id=0, isolation=None)
    batch, shares = join_batches(batches, pad_id=0)
    totals = dict(zip(runs, meeting.totals(batch, shares), strict=True))
    own = {name: list(made.parameters().values()) for name, made in joined.attachments.items()}
    torch.autograd.backward(list(totals.values()))
    found = {name: [p.grad for p in parameters] for name, parameters in own.items()}
    apart = 0.0
    objective: Any = labelled_loss(joined.model, head=head)
    for name, parameters in own.items():
        with joined.alone(name):
            loss = objective.total(joined.model, batches[name])
        if abs(float(loss) - float(totals[name])) > ROUNDED * abs(float(loss)):
            return f"refused: the losses differ ({float(totals[name]):.6g} and {float(loss):.6g})"
        for together, single in zip(
            found[name], torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            if (together is None) != (single is None):
                return "wrong: a gradient is missing"
            if single is not None and together is not None:
                apart = max(
                    apart, float((together - single).abs().max() / single.abs().max().clamp_min(1e-6))
                )
    if apart < EXACT:
        return "equal"
    if apart < ROUNDED:
        return "equal in float32: a part of it computes in float32 whatever its weights are"
    return f"wrong: gradients differ by {apart:.1e} of the largest"


if __name__ == "__main__":
    results = {}
    if sys.argv[1:] and FLOOR.exists():
        results = json.loads(FLOOR.read_text(encoding="utf-8"))
    for model_type in sys.argv[1:] or generating_types():
        results[model_type] = try_family(model_type)
        print(model_type, results[model_type], flush=True)
        FLOOR.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
