"""S1's `EvaluationResult`: scores of one model on one data set, with its answers, as one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftlab.errors import EvaluationError, InputError, OutputError
from peftlab.files import write_json


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Scores of one model on one data set; `result["exact_match"]` gives a value, as S1's dictionaries did.

    Attributes:
        task: The data set.
        model_path: The model as it was named.
        base_model_id: Its base.
        split: The split that was scored.
        num_samples: How many examples.
        metrics: By name, what a score holds: value, unit, direction, count, interval, signature.
        decoding: How answers were decoded.
        seconds: Time the answers took.
        predictions: For each example its id, the prediction and the references.
        not_computed: Metrics that this machine cannot compute, with what to install.
        examples: Ids and scores of the examples that the headline scores best, worst, and of some drawn at random.
    """

    task: str
    model_path: str
    base_model_id: str
    split: str
    num_samples: int
    metrics: dict[str, dict[str, Any]]
    decoding: dict[str, Any]
    seconds: float
    predictions: list[dict[str, Any]] = field(default_factory=list)
    not_computed: dict[str, str] = field(default_factory=dict)
    examples: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The value of a metric, or "num_samples".

        Args:
            name: A metric's name; "accuracy" is also that of labels which a model writes.

        Returns:
            The value, in its unit.

        Raises:
            EvaluationError: There is no such score, or it could not be computed.
        """
        if name == "num_samples":
            return self.num_samples
        if name == "accuracy" and name not in self.metrics and "label_accuracy" in self.metrics:
            name = "label_accuracy"  # S1's name, whatever way the model gives its label
        if name in self.not_computed:
            raise EvaluationError(f"{name} was not computed: {self.not_computed[name]}")
        if name not in self.metrics:
            raise EvaluationError(f"no score '{name}'; there is: {', '.join([*self.metrics, 'num_samples'])}")
        return float(self.metrics[name]["value"])

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON.

        Args:
            path: Where; its folder is made if needed.

        Returns:
            The path.

        Raises:
            OutputError: It cannot be written.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the folder of {path} cannot be made: {error.strerror or error}; give another output_path"
            ) from None
        return write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResult:
        """Read a result that `save` wrote.

        Args:
            path: The file.

        Returns:
            The result, equal to the one that was saved.

        Raises:
            InputError: There is no such file, or it holds something else.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} holds no evaluation result: {error}") from None
