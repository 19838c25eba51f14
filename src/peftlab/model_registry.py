"""Any model by its name: what it is, and the adapter that works with it.

Everything is read from the model's own config, tokenizer and structure (a model without weights on the meta device), so
asking costs no download of weights. Nothing is taken from a name.
"""

from __future__ import annotations

from dataclasses import replace

from peftlab.config import ModelSettings
from peftlab.errors import ModelError
from peftlab.loading import read_config
from peftlab.mapping import map_model
from peftlab.model_adapters import adapter_class
from peftlab.model_config import LayerMapping, ModelConfig, describe_model
from peftlab.model_facts import ModelFacts, ModelFamily, decide_family, empty_model, read_facts
from peftlab.model_names import SHORT_NAMES, ModelName, resolve_name
from peftlab.universal_adapter import UniversalModelAdapter

__all__ = ["LayerMapping", "ModelConfig", "ModelFacts", "ModelFamily", "UniversalModelRegistry"]


class UniversalModelRegistry:
    """Finds models by name and tells what they are."""

    def __init__(self) -> None:
        self._names = dict(SHORT_NAMES)
        self._domains: dict[str, str] = {}

    def list_supported_models(self) -> list[str]:
        """The short names. Any other model of transformers works as well, by its hub name or its folder.

        Returns:
            The names, sorted.
        """
        return sorted(self._names, key=str.lower)

    def register(self, name: str, target: str, *, domain: str | None = None) -> None:
        """Give a model a short name.

        Args:
            name: The new short name.
            target: A folder or a hub name.
            domain: The field that the model was pretrained for, if it was for one.

        Raises:
            ModelError: The name is taken by another model, or is no short name.
        """
        if not name or "/" in name or name.startswith((".", "~")):
            raise ModelError(f"'{name}' cannot be a short name: give one without '/', '.' or '~' in front")
        taken = {known.lower(): t for known, t in self._names.items()}.get(name.lower(), target)
        if taken != target:
            raise ModelError(f"the short name '{name}' stands for {taken}; choose another")
        self._names[name] = target
        if domain:
            self._domains[name.lower()] = domain

    def detect_model_family(self, name: str) -> ModelFamily:
        """The family of a model.

        Args:
            name: A short name, a hub name or a folder.

        Returns:
            The family, decided by facts.

        Raises:
            ModelError: There is no such model; the message says where it was looked for.

        Example:
            >>> UniversalModelRegistry().detect_model_family("gpt2")
            <ModelFamily.GPT: 'gpt'>
        """
        found = self._find(name)
        _, config = read_config(ModelSettings(name=name), name=found)
        model = empty_model(config)
        return decide_family(read_facts(model, map_model(model)))

    def get_model_config(self, name: str) -> ModelConfig:
        """What a model is and has.

        Args:
            name: A short name, a hub name or a folder.

        Returns:
            Its facts and sizes.

        Raises:
            ModelError: There is no such model; the message says where it was looked for.
        """
        return describe_model(self._find(name))

    def create_adapter(self, name: str) -> UniversalModelAdapter:
        """The adapter that works with a model; its weights are not read yet.

        Args:
            name: A short name, a hub name or a folder.

        Returns:
            The adapter of its domain or family.

        Raises:
            ModelError: There is no such model.
        """
        config = self.get_model_config(name)
        return adapter_class(config)(config)

    def _find(self, name: str) -> ModelName:
        """Resolve a name, with what was registered about it."""
        found = resolve_name(name, short_names=self._names)
        return replace(found, domain=self._domains.get(name.lower(), found.domain))
