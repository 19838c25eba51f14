"""What a model is asked for, and how an answer is decoded: greedy, by beams or sampling, where it stops, how long it is."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from peftlab.catalog import METRICS
from peftlab.errors import ConfigError
from peftlab.settings import Settings

NUM_BEAMS = 4
"""Beams where none are asked for."""
MAX_NEW_TOKENS = 96
"""Longest answer of a task that says nothing of its own."""
ONE_KIND_ALONE = {
    "num_beams": "beam",
    "length_penalty": "beam",
    "temperature": "sample",
    "top_k": "sample",
    "top_p": "sample",
    "sampling_seed": "sample",
}
"""Setting to the kind of decoding that reads it."""
WRITTEN_ALONE = (*ONE_KIND_ALONE, "stop", "max_new_tokens")
"""Settings that only answers read that the model writes."""


class DecodingSettings(Settings):
    """What a model is asked for and how answers are decoded; a setting that the chosen kind does not read is an error."""

    answers: Literal["generate", "likelihood"] = "generate"
    """Have the model write its answer, or take the label that it finds the most likely (tasks with labels alone)."""
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
    perplexity: bool = False
    """Whether the model's perplexity over the references' tokens is scored too; models that write have one."""
    metrics: tuple[str, ...] = ()
    """What the answers are scored by, the headline first; () is the task's own, or a classifier's accuracy."""

    @model_validator(mode="after")
    def _decoding_reads_it(self) -> DecodingSettings:
        if self.answers == "likelihood":
            idle = [name for name in WRITTEN_ALONE if getattr(self, name)]
            idle += ["decoding"] if self.decoding != "greedy" else []
            if idle:
                raise ValueError(
                    f"{', '.join(idle)} has no effect where labels are compared by likelihood; set answers to generate,"
                    " or leave it out"
                )
        for name, kind in ONE_KIND_ALONE.items():
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
        if self.answers == "likelihood":
            return {"kind": "the most likely label"}
        told: dict[str, Any] = {"kind": self.decoding}
        if self.decoding == "beam":
            penalty = 1.0 if self.length_penalty is None else self.length_penalty
            told |= {"num_beams": self.num_beams or NUM_BEAMS, "length_penalty": penalty}
        if self.decoding == "sample":
            told |= {"temperature": self.temperature or 1.0, "top_k": self.top_k, "top_p": self.top_p}
            told |= {"seed": seed if self.sampling_seed is None else self.sampling_seed}
        return told | ({"stop": list(self.stop)} if self.stop else {})


def check_asked(task: Any, head: str, decoding: DecodingSettings) -> None:
    """Refuse what a task or a model has no place for.

    Args:
        task: The task's module.
        head: What the model ends in.
        decoding: What is asked of the model.

    Raises:
        ConfigError: Labels shall be compared where there are none or where the model is a classifier, or a classifier's
            perplexity is asked for.
        UnknownNameError: There is no such metric.
    """
    for name in decoding.metrics:
        METRICS.check(name)
    if decoding.answers == "likelihood" and (head == "classification" or not hasattr(task, "LABELS")):
        why = (
            "it is a classifier, and its class logits are compared already"
            if head == "classification"
            else "its data set has no labels to compare"
        )
        raise ConfigError(
            f"evaluation.answers=likelihood (by_likelihood) has no effect on this model: {why}; leave it out"
        )
    if decoding.perplexity and head == "classification":
        raise ConfigError(
            "evaluation.perplexity: an encoder with a classification head gives one class and no tokens, so its answers"
            " have no perplexity; leave it out, or take a model that writes"
        )
