"""The efficient fine-tuning document's method guide: which method to begin with for which kind of task."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftlab.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A method and where to begin with it.

    Attributes:
        method: The document's spelling: "lora", "ptuning", "adalora" or "prefix", as in the manager's `apply_...`.
        settings: Arguments of the manager's `apply_...` of that method.
        reason: The document's reason.
        command: The same as a run. AdaLoRA's rank is there what a module keeps on average, not what it begins with.
        evidence: What finished runs say, where some were given; see `recommending.recommend`.
        name: The method as `--method` and `peftlab.finetune` take it: "lora", "p_tuning", "adalora" or "prefix_tuning".
    """

    method: str
    settings: dict[str, int | float | bool] = field(hash=False)
    reason: str
    command: str
    evidence: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The method as `--method` and `peftlab.finetune` take it."""
        return {"ptuning": "p_tuning", "prefix": "prefix_tuning"}.get(self.method, self.method)


_GUIDE = {
    "general": Recommendation(
        "lora",
        {"rank": 8, "alpha": 16.0},
        "good for most tasks, balanced performance and efficiency",
        "peftlab run --method lora --r 8 --lora_alpha 16",
    ),
    "language": Recommendation(
        "ptuning",
        {"num_virtual_tokens": 20},
        "good for language tasks, minimal parameters",
        "peftlab run --method p_tuning --set method.num_virtual_tokens=20",
    ),
    "complex": Recommendation(
        "adalora",
        {"rank": 8, "adaptive_rank": True},
        "good for complex tasks, adaptive efficiency",
        "peftlab run --method adalora --set method.target_rank=8",
    ),
    "generation": Recommendation(
        "prefix",
        {"prefix_length": 20},
        "good for generation tasks, very efficient",
        "peftlab run --method prefix_tuning --set method.num_virtual_tokens=20",
    ),
}
TASK_TYPES = tuple(_GUIDE)
"""The kinds of task that the guide knows."""


def recommend(task_type: str) -> Recommendation:
    """The document's rule of thumb; what a comparison on one's own data says is worth more.

    Args:
        task_type: "general", "language", "complex" or "generation".

    Returns:
        The method and its settings.

    Raises:
        UnknownNameError: It is none of these.

    Example:
        >>> recommend("language").method, recommend("language").name
        ('ptuning', 'p_tuning')
    """
    if task_type not in _GUIDE:
        raise UnknownNameError("task type", task_type, _GUIDE)
    return _GUIDE[task_type]
