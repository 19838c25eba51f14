"""Several models behind one interface: load, look into, compare, measure, unload.

`MultiModelAnalyzer` finds a model's adapter, keeps loaded models, and asks the adapter for everything else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftlab.devices import choose_device, choose_dtype, peak_memory, report_memory
from peftlab.errors import DataError
from peftlab.inspection.attention import AttentionPatterns
from peftlab.inspection.reading_limits import repeatable
from peftlab.inspection.shards import Activations
from peftlab.memory.checkpointing import MemoryOptimization
from peftlab.memory.placement import find_room
from peftlab.model_cache import ModelCache, UnloadReport
from peftlab.model_config import GIGABYTE
from peftlab.model_names import resolve_name
from peftlab.model_registry import UniversalModelRegistry
from peftlab.universal_adapter import UniversalModelAdapter


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """Facts, seconds and memory of several models on the same texts.

    Attributes:
        rows: One for each model, in the order asked for: name, family, architecture, num_layers, hidden_size,
            num_attention_heads, max_position_embeddings, norm, num_parameters, weights_gb, looked_at (layers),
            activation_values, load_seconds (None where it was loaded already), activation_seconds, attention_seconds.
    """

    rows: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        """The rows as a table."""
        names = list(self.rows[0])
        lines = [names, *([_cell(row[name]) for name in names] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


class MultiModelAnalyzer:
    """Works with several models by their names.

    Loaded models are kept up to a limit; then the least recently used leave, and are loaded again when they are needed.

    Args:
        registry: Where names are looked up; None makes a new one.
        limit_gb: Most GB (2**30 bytes) of weights; None takes four fifths of what is free now on the CUDA devices and the
            host together, since a model may be spread over them.
        limit_models: Most models; None sets no limit.

    Attributes:
        registry: Where names are looked up.
        cache: The loaded models.
    """

    def __init__(
        self,
        registry: UniversalModelRegistry | None = None,
        *,
        limit_gb: float | None = None,
        limit_models: int | None = None,
    ) -> None:
        self.registry = registry or UniversalModelRegistry()
        limit = 0.8 * sum(find_room("host").values()) if limit_gb is None else limit_gb * GIGABYTE
        self.cache = ModelCache(limit_bytes=int(limit), limit_models=limit_models)
        self._adapters: dict[str, UniversalModelAdapter] = {}
        self._names: dict[str, str] = {}
        self._asked: dict[str, tuple[str, str]] = {}

    def list_supported_models(self) -> list[str]:
        """The short names; any other model of transformers works by its hub name or its folder.

        Returns:
            The names, sorted.
        """
        return self.registry.list_supported_models()

    def load_model(self, name: str, device: str = "auto", *, dtype: str = "auto") -> UniversalModelAdapter:
        """Load a model, or take it where it is loaded already.

        Args:
            name: A short name, a hub name or a folder.
            device: auto (as it was asked for before, else CUDA, then MPS, then CPU), cpu, cuda or mps.
            dtype: auto (as it was asked for before, else the one that the device is fast at), float32, bfloat16, float16 or
                float64.

        Returns:
            Its adapter.

        Raises:
            ModelError: There is no such model, or its weights are not whole.
            ConfigError: The device is not there, or there is no such dtype.
        """
        name = self._known_as(name)
        before = self._asked.get(name, ("auto", "auto"))  # it may have left the cache since
        device, dtype = (
            old if new == "auto" else new for new, old in zip((device, dtype), before, strict=True)
        )
        place = choose_device(device)
        kind = choose_dtype(dtype, place)
        adapter = self._adapters.get(name) or self.registry.create_adapter(name)
        moved = device != "auto" and name in self.cache and adapter.model.device.type != place.type
        changed = dtype != "auto" and name in self.cache and adapter.model.dtype != kind
        if moved or changed:
            self.unload_model(name)
        expected = adapter.weights_bytes(kind)
        self.cache.get(name, lambda: adapter.load_model(device=device, dtype=dtype), expected_bytes=expected)
        adapter.hand_over()  # so that it can leave the cache
        self._adapters[name], self._asked[name] = adapter, (device, dtype)
        return adapter

    def _known_as(self, name: str) -> str:
        """The name that the same model was first given, where it has several: a folder, a short name, an id."""
        found = resolve_name(name)
        place = str(Path(found.location).resolve()) if found.is_folder else found.location
        return self._names.setdefault(place, name)

    def unload_model(self, name: str) -> UnloadReport:
        """Let go of a model, and prove that it died.

        Args:
            name: A loaded model.

        Returns:
            What was given back, and who holds the model where it did not die.

        Raises:
            UnknownNameError: It is not loaded.
        """
        return self.cache.unload(self._known_as(name))

    def extract_activations(
        self, name: str, texts: Iterable[str], layers: Iterable[int], **options: Any
    ) -> Activations[Any]:
        """What chosen blocks of a model put out for texts; the model is loaded if it is not.

        Args:
            name: The model.
            texts: What it reads; images for a model that sees.
            layers: Layers, from 0; `layer i` is the output of block i.
            options: As in the adapter's method: stack, pooling, decoder_texts, max_length, unproven ...

        Returns:
            `layer_i` to values (rows, hidden): a row for every token, pads left out.
        """
        return self.load_model(name).extract_activations(texts, layers, **options)

    def get_attention_patterns(
        self, name: str, texts: Iterable[str], layers: Iterable[int] | None = None, **options: Any
    ) -> AttentionPatterns:
        """Who looks at whom in chosen layers of a model; the model is loaded if it is not.

        Args:
            name: The model.
            texts: What it reads; images for a model that sees.
            layers: Layers, from 0; None takes all that have attention.
            options: As in the adapter's method: stack, heads, kind, decoder_texts, max_length ...

        Returns:
            The patterns; `weights` is `layer_i` to probabilities (batch, heads, query, key).
        """
        return self.load_model(name).get_attention_patterns(texts, layers, **options)

    def get_model_info(self, name: str) -> dict[str, Any]:
        """What a model is and has, as plain values; its weights are not read.

        Args:
            name: The model.

        Returns:
            The fields of `ModelConfig`, and "loaded"; for a loaded model also "device", "dtype" and "word_alignment" (share
            of words whose tokens are exactly right).
        """
        known = self._known_as(name)
        adapter = self._adapters[known] if known in self.cache else None
        config = adapter.config if adapter else self.registry.get_model_config(name)
        told = asdict(config) | {
            "family": config.family.value,
            "families": [family.value for family in config.families],
            "is_encoder_decoder": config.is_encoder_decoder,
            "uses_rms_norm": config.uses_rms_norm,
            "has_relative_attention": config.has_relative_attention,
            "loaded": adapter is not None,
        }
        if adapter is not None:
            first = next(adapter.model.parameters())
            rate = adapter.alignment.rate if adapter.alignment else None
            told |= {"device": str(first.device), "dtype": str(first.dtype), "word_alignment": rate}
        return told

    def get_memory_usage(self) -> dict[str, float]:
        """Memory in use now, in GB of 2**30 bytes and in percent.

        Returns:
            The machine: "system_memory_gb", "system_memory_percent", "system_memory_total_gb". This process:
            "process_memory_gb" (resident). The current CUDA device, all processes: "gpu_memory_gb", "gpu_memory_percent",
            "gpu_memory_total_gb"; this process's tensors there: "gpu_allocated_gb", "gpu_peak_allocated_gb",
            "gpu_reserved_gb". All of the GPU's are 0 where there is none. "models_gb": weights of the loaded models.
        """
        report = report_memory()
        system, total = report.host_total_bytes - report.host_available_bytes, report.host_total_bytes
        gpu_total = report.device_total_bytes or 0
        gpu = gpu_total - (report.device_free_bytes or 0)
        held = {
            "system_memory": system,
            "system_memory_total": total,
            "process_memory": report.process_bytes,
            "models": sum(self.cache.sizes().values()),
            "gpu_memory": gpu,
            "gpu_memory_total": gpu_total,
            "gpu_allocated": report.device_allocated_bytes or 0,
            "gpu_reserved": report.device_reserved_bytes or 0,
            "gpu_peak_allocated": peak_memory()["device"] or 0,
        }
        return {f"{name}_gb": value / GIGABYTE for name, value in held.items()} | {
            "system_memory_percent": 100 * system / total,
            "gpu_memory_percent": 100 * gpu / gpu_total if gpu_total else 0.0,
        }

    def optimize_memory(
        self, name: str, texts: Iterable[str] | None = None, *, max_length: int | None = None
    ) -> MemoryOptimization:
        """Switch gradient checkpointing on, and tell what that saves.

        Args:
            name: The model; it is loaded if it is not.
            texts: One batch to measure on; None measures nothing and says so.
            max_length: Cut texts to so many tokens; None refuses those that are too long.

        Returns:
            What it saves in inference and in a training step.
        """
        return self.load_model(name).optimize_memory(texts, max_length=max_length)

    def compare_models(
        self,
        names: Sequence[str],
        texts: Iterable[str],
        layers: Sequence[int] | None = None,
        *,
        max_length: int | None = None,
        unproven: bool = False,
    ) -> ModelComparison:
        """Load models and look at the same texts with each.

        Args:
            names: The models.
            texts: What they read.
            layers: Layers to look at; None takes the first, the middle and the last of each.
            max_length: Cut texts to so many tokens; None refuses those that are too long for one of the models.
            unproven: Go on with a model whose blocks are not proved to put out its hidden states.

        Returns:
            The table; seconds are of one pass each, the first one after loading.

        Raises:
            DataError: No models are named.
        """
        if not names:
            raise DataError("no models to compare: give their names")
        texts = repeatable(texts)
        options = ({"max_length": max_length} if max_length is not None else {}, {"unproven": unproven})
        return ModelComparison(tuple(self._row(name, texts, layers, *options) for name in names))

    def _row(
        self,
        name: str,
        texts: Any,
        layers: Sequence[int] | None,
        cut: Mapping[str, Any],
        allowed: Mapping[str, Any],
    ) -> dict[str, Any]:
        """One line of a comparison."""
        known = self._known_as(name)
        loaded = known in self.cache
        adapter, load_seconds = _timed(lambda: self.load_model(name))
        config, last = adapter.config, adapter.config.num_layers - 1
        looked_at = sorted({0, last // 2, last}) if layers is None else list(layers)
        found, activation_seconds = _timed(
            lambda: adapter.extract_activations(texts, looked_at, **cut, **allowed)
        )
        _, attention_seconds = _timed(lambda: adapter.get_attention_patterns(texts, looked_at, **cut))
        return {
            "name": name,
            "family": config.family.value,
            "architecture": config.architecture,
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "max_position_embeddings": config.max_position_embeddings,
            "norm": config.facts.norm,
            "num_parameters": config.num_parameters,
            "weights_gb": self.cache.sizes()[known] / GIGABYTE,
            "looked_at": looked_at,
            "activation_values": sum(values.numel() for values in found.values()),
            "load_seconds": None if loaded else load_seconds,
            "activation_seconds": activation_seconds,
            "attention_seconds": attention_seconds,
        }


def _timed(action: Any) -> tuple[Any, float]:
    """What an action gives, and its seconds."""
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


def _cell(value: Any) -> str:
    """A value of a table."""
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)
