"""Semantic IDs: the quantizer, the unique IDs made of its codes, and the tokenizer over them.

The import of this package registers the tokenizer with `AutoTokenizer`.
"""

from transformers import AutoTokenizer, PreTrainedConfig

from .item_catalog import ItemCatalog
from .residual_kmeans import ResidualKMeans
from .semantic_ids import CodebookStatistics, assign_collision_tokens, codebook_statistics
from .tokenization_unigrf import SemanticIdTokenizer


class SemanticIdConfig(PreTrainedConfig):
    """A key: `AutoTokenizer` registers a class by a config, and then finds it by its name in any folder."""

    model_type = "semantic_ids"


AutoTokenizer.register(SemanticIdConfig, SemanticIdTokenizer)

__all__ = [
    "CodebookStatistics",
    "ItemCatalog",
    "ResidualKMeans",
    "SemanticIdTokenizer",
    "assign_collision_tokens",
    "codebook_statistics",
]
