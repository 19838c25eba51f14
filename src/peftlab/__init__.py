"""peftlab: a laboratory for parameter-efficient fine-tuning.

Public names import from here and load on first use: `import peftlab` itself loads neither torch nor pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftlab.public_names import HOMES as _HOMES

if TYPE_CHECKING:
    from peftlab.analyzer import ModelComparison, MultiModelAnalyzer
    from peftlab.callbacks import (
        DynamicLoRACallback,
        GradientMeasuringTrainer,
        GradientNormCallback,
        create_layerwise_lora_config,
        create_phased_lora_config,
        measure_gradient_norms,
        print_trainable_parameters,
        setup_model_with_lora,
    )
    from peftlab.config import RunConfig
    from peftlab.continual.learners import (
        FullLayerContinualLearner,
        HybridLoRAFullLayerLearner,
        LoRAContinualLearner,
    )
    from peftlab.efficiency import (
        Efficiency,
        Measured,
        compare_efficiency,
        measure_efficiency,
        score_efficiency,
    )
    from peftlab.efficient.embeddings import PrefixTuning, PTuningEmbedding
    from peftlab.efficient.layers import AdaLoRALayer, LoRALayer, LoRALinear
    from peftlab.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        EvaluationError,
        InputError,
        Interrupted,
        MethodError,
        MissingPeftError,
        ModelError,
        NonFiniteError,
        NotComputedError,
        NotTrainingError,
        OutputError,
        PeftlabError,
        RunError,
        ScheduleError,
        TargetError,
        UnknownNameError,
    )
    from peftlab.experiment_config import (
        ATTENTION_ONLY,
        BOTH,
        MLP_ONLY,
        DataConfig,
        DatasetType,
        DynamicLoRAConfig,
        EvaluationConfig,
        ExperimentConfig,
        GradientAnalysisConfig,
        LoRAConfig,
        ModelConfig,
        TargetModuleGroup,
        TrainingConfig,
        config_from_dict,
        config_to_dict,
    )
    from peftlab.experiment_presets import PRESETS
    from peftlab.exporting import export_adapter
    from peftlab.extensions.config import ExtensionConfig
    from peftlab.extensions.device_manager import DeviceManager
    from peftlab.extensions.hybrid import HybridExtension, create_hybrid_model
    from peftlab.extensions.lora import LoRAExtension, create_lora_adapter
    from peftlab.extensions.new_layer import TransformerLayerExtension, create_extended_model
    from peftlab.figures import (
        generate_summary_report,
        plot_gradient_evolution,
        plot_gradient_norms,
        plot_layer_comparison,
        plot_layer_heatmap,
        plot_rank_allocation,
        plot_rank_heatmap,
        plot_training_loss,
    )
    from peftlab.finetuning import finetune
    from peftlab.gradient_log import GradientNormLog, load_gradient_log
    from peftlab.importing.adapter import import_adapter
    from peftlab.inspection.activations import extract_activations
    from peftlab.inspection.attention import get_attention_patterns
    from peftlab.inspection.attention_statistics import get_attention_statistics
    from peftlab.inspection.shards import open_activations
    from peftlab.inspection.words import measure_alignment
    from peftlab.manager import (
        EfficientFineTuningManager,
        apply_adalora_to_model,
        apply_lora_to_model,
        apply_prefix_tuning_to_model,
        apply_ptuning_to_model,
        create_efficient_finetuning_manager,
    )
    from peftlab.mapping import map_model
    from peftlab.metric import Score
    from peftlab.model_adapters import (
        BARTModelAdapter,
        BERTModelAdapter,
        DomainSpecificAdapter,
        GPTModelAdapter,
        LLaMAModelAdapter,
        T5ModelAdapter,
        VisionModelAdapter,
    )
    from peftlab.model_config import LayerMapping
    from peftlab.model_facts import ModelFamily
    from peftlab.model_registry import UniversalModelRegistry
    from peftlab.rank_log import RankLog, load_rank_log
    from peftlab.recommending import recommend
    from peftlab.run import RunFolder
    from peftlab.seed_data import get_data_collator, load_and_preprocess_dataset
    from peftlab.seed_evaluation import (
        EvaluationResult,
        ModelEvaluator,
        evaluate_e2e,
        evaluate_multi_nli,
        evaluate_samsum,
        evaluate_wikisql,
    )
    from peftlab.store import load
    from peftlab.task import Example, Splits
    from peftlab.together import run_together
    from peftlab.universal_adapter import UniversalModelAdapter
    from peftlab.vision_text import (
        VisionTextLoRA,
        freeze_pretrained,
        inject_lora_to_text_encoder,
        inject_lora_to_vision_encoder,
    )

__version__ = "0.1.0"

__all__ = [
    "ATTENTION_ONLY",
    "BOTH",
    "MLP_ONLY",
    "PRESETS",
    "AdaLoRALayer",
    "BARTModelAdapter",
    "BERTModelAdapter",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DatasetType",
    "DeviceManager",
    "DomainSpecificAdapter",
    "DynamicLoRACallback",
    "DynamicLoRAConfig",
    "Efficiency",
    "EfficientFineTuningManager",
    "EvaluationConfig",
    "EvaluationError",
    "EvaluationResult",
    "Example",
    "ExperimentConfig",
    "ExtensionConfig",
    "FullLayerContinualLearner",
    "GPTModelAdapter",
    "GradientAnalysisConfig",
    "GradientMeasuringTrainer",
    "GradientNormCallback",
    "GradientNormLog",
    "HybridExtension",
    "HybridLoRAFullLayerLearner",
    "InputError",
    "Interrupted",
    "LLaMAModelAdapter",
    "LayerMapping",
    "LoRAConfig",
    "LoRAContinualLearner",
    "LoRAExtension",
    "LoRALayer",
    "LoRALinear",
    "Measured",
    "MethodError",
    "MissingPeftError",
    "ModelComparison",
    "ModelConfig",
    "ModelError",
    "ModelEvaluator",
    "ModelFamily",
    "MultiModelAnalyzer",
    "NonFiniteError",
    "NotComputedError",
    "NotTrainingError",
    "OutputError",
    "PTuningEmbedding",
    "PeftlabError",
    "PrefixTuning",
    "RankLog",
    "RunConfig",
    "RunError",
    "RunFolder",
    "ScheduleError",
    "Score",
    "Splits",
    "T5ModelAdapter",
    "TargetError",
    "TargetModuleGroup",
    "TrainingConfig",
    "TransformerLayerExtension",
    "UniversalModelAdapter",
    "UniversalModelRegistry",
    "UnknownNameError",
    "VisionModelAdapter",
    "VisionTextLoRA",
    "__version__",
    "apply_adalora_to_model",
    "apply_lora_to_model",
    "apply_prefix_tuning_to_model",
    "apply_ptuning_to_model",
    "compare_efficiency",
    "config_from_dict",
    "config_to_dict",
    "create_efficient_finetuning_manager",
    "create_extended_model",
    "create_hybrid_model",
    "create_layerwise_lora_config",
    "create_lora_adapter",
    "create_phased_lora_config",
    "evaluate_e2e",
    "evaluate_multi_nli",
    "evaluate_samsum",
    "evaluate_wikisql",
    "export_adapter",
    "extract_activations",
    "finetune",
    "freeze_pretrained",
    "generate_summary_report",
    "get_attention_patterns",
    "get_attention_statistics",
    "get_data_collator",
    "import_adapter",
    "inject_lora_to_text_encoder",
    "inject_lora_to_vision_encoder",
    "load",
    "load_and_preprocess_dataset",
    "load_gradient_log",
    "load_rank_log",
    "map_model",
    "measure_alignment",
    "measure_efficiency",
    "measure_gradient_norms",
    "open_activations",
    "plot_gradient_evolution",
    "plot_gradient_norms",
    "plot_layer_comparison",
    "plot_layer_heatmap",
    "plot_rank_allocation",
    "plot_rank_heatmap",
    "plot_training_loss",
    "print_trainable_parameters",
    "recommend",
    "run_together",
    "score_efficiency",
    "setup_model_with_lora",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562).

    Args:
        name: The name.

    Returns:
        What it stands for.

    Raises:
        AttributeError: No such public name.
    """
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'peftlab' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"peftlab.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted([*globals(), *_HOMES])
