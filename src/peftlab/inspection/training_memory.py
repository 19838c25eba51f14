"""What a training step of a model would take, for its page: the prediction of `peftlab plan` for one usual batch."""

from __future__ import annotations

from typing import Any

from peftlab.config import build_config
from peftlab.errors import InputError, TargetError
from peftlab.family import FamilyMap
from peftlab.inspection.subject import Subject

_ROWS, _LENGTH = 8, 128


def training_memory(subject: Subject, family: FamilyMap) -> dict[str, Any]:
    """Predict the peak memory of a training step of the model's own adapter, or of LoRA.

    Args:
        subject: The model.
        family: Its map.

    Returns:
        The prediction as plain values, with "method" and "targets"; or "note", which says why there is none.
    """
    from peftlab.memory.prediction import predict_memory  # imports the trainer

    adapter = subject.adapter
    method = {"name": "lora", "targets": _targets(family)}
    if adapter is not None:
        method = {"name": adapter["method"], **adapter["settings"]}
    positions = getattr(subject.config.get_text_config(), "max_position_embeddings", None) or _LENGTH
    config = build_config(
        {
            "model": subject.settings.model_dump(),
            "method": method,
            "training": {"batch_size": _ROWS},
            "task": {"max_length": min(_LENGTH, positions)},
        }
    )
    try:
        found = predict_memory(config, source=subject.trained_source)
    except InputError as error:
        return {"note": str(error)}
    except Exception as error:  # noqa: BLE001 - any model code can fail on tensors without data; the reason is told
        said = (str(error).strip() or "no message").splitlines()[0][:200]
        return {"note": f"the model does not run without data ({type(error).__name__}: {said})"}
    return found.as_dict() | {"method": method["name"], "targets": method.get("targets")}


def _targets(family: FamilyMap) -> str:
    """The largest target group that a model has."""
    try:
        family.select("both")
    except TargetError:
        return "attention"  # its MLP is of experts, or not proved
    return "both"
