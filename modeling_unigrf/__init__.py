# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""UniGRF: unified generative retrieval and ranking.

The import of this package registers its classes with transformers' Auto classes and pipelines.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_hstu import HSTUConfig
from .configuration_unigrf import UniGRFConfig, UniGRFTrainingConfig
from .metrics_unigrf import TrainerMetrics
from .modeling_hstu import HSTUModel
from .modeling_unigrf import UniGRFCausalLMOutput, UniGRFForCausalLM, UniGRFModel
from .pipeline_unigrf import RecommendationPipeline
from .recommendation_unigrf import ServingOptions, UniGRFRecommendation
from .trie_unigrf import CatalogTrie, ItemFilter

AutoConfig.register(UniGRFConfig.model_type, UniGRFConfig)
AutoModel.register(HSTUConfig, HSTUModel)
AutoModel.register(UniGRFConfig, UniGRFModel)
AutoModelForCausalLM.register(UniGRFConfig, UniGRFForCausalLM)
UniGRFConfig.register_for_auto_class()
UniGRFModel.register_for_auto_class("AutoModel")
UniGRFForCausalLM.register_for_auto_class("AutoModelForCausalLM")
PIPELINE_REGISTRY.register_pipeline("recommendation", RecommendationPipeline, pt_model=AutoModelForCausalLM)

__all__ = [
    "CatalogTrie",
    "HSTUConfig",
    "HSTUModel",
    "ItemFilter",
    "RecommendationPipeline",
    "ServingOptions",
    "TrainerMetrics",
    "UniGRFCausalLMOutput",
    "UniGRFConfig",
    "UniGRFForCausalLM",
    "UniGRFModel",
    "UniGRFRecommendation",
    "UniGRFTrainingConfig",
]
