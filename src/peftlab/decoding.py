"""How an answer is decoded: greedy, beam search or sampling, where it stops and how long it may grow."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from peftlab.settings import Settings

NUM_BEAMS = 4
"""Beams where none are asked for."""
MAX_NEW_TOKENS = 96
"""Longest answer of a task that says nothing of its own."""
_ONLY_FOR = {
    "num_beams": "beam",
    "length_penalty": "beam",
    "temperature": "sample",
    "top_k": "sample",
    "top_p": "sample",
    "sampling_seed": "sample",
}
"""Setting to the kind of decoding that reads it."""


class DecodingSettings(Settings):
    """How answers are decoded; a setting that the chosen kind does not read is an error."""

    decoding: Literal["greedy", "beam", "sample"] = "greedy"
    """Take the likeliest token, search with beams, or draw."""
    num_beams: int | None = Field(default=None, ge=2)
    """Beams of a beam search; None is 4."""
    length_penalty: float | None = Field(default=None, allow_inf_nan=False)
    """Power of the length that a beam's log-likelihood is divided by; None is 1."""
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Logits are divided by it before a token is drawn; None is 1."""
    top_k: int | None = Field(default=None, ge=1)
    """Draw from so many likeliest tokens; None draws from all."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw from the fewest likeliest tokens of so much probability together; None draws from all."""
    sampling_seed: int | None = Field(default=None, ge=0)
    """Seed of the draws; None is the run's seed."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends; they are no part of it."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer in tokens; None is the task's own, or 96."""

    @model_validator(mode="after")
    def _decoding_reads_it(self) -> DecodingSettings:
        for name, kind in _ONLY_FOR.items():
            if getattr(self, name) is not None and self.decoding != kind:
                raise ValueError(
                    f"{name} has no effect on {self.decoding} decoding; set decoding to {kind}, or leave it out"
                )
        if not all(self.stop):
            raise ValueError(
                "stop holds an empty text, at which every answer would end at once; leave it out"
            )
        return self

    def answer_tokens(self, task: Any) -> int:
        """The longest answer on a task.

        Args:
            task: The task's module; its own `MAX_NEW_TOKENS` holds where the settings say nothing.

        Returns:
            Tokens.
        """
        own: int = getattr(task, "MAX_NEW_TOKENS", MAX_NEW_TOKENS)
        return self.max_new_tokens or own

    def describe(self, *, seed: int) -> dict[str, Any]:
        """What was chosen, for a file of scores.

        Args:
            seed: The run's seed, for draws that have none of their own.

        Returns:
            JSON-ready: the kind, and the settings it reads.
        """
        told: dict[str, Any] = {"kind": self.decoding}
        if self.decoding == "beam":
            penalty = 1.0 if self.length_penalty is None else self.length_penalty
            told |= {"num_beams": self.num_beams or NUM_BEAMS, "length_penalty": penalty}
        if self.decoding == "sample":
            told |= {"temperature": self.temperature or 1.0, "top_k": self.top_k, "top_p": self.top_p}
            told |= {"seed": seed if self.sampling_seed is None else self.sampling_seed}
        return told | ({"stop": list(self.stop)} if self.stop else {})
