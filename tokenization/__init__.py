"""Semantic IDs: the quantizer, the unique IDs made of its codes, and the tokenizer over them."""

from .item_catalog import ItemCatalog
from .residual_kmeans import ResidualKMeans
from .semantic_ids import CodebookStatistics, assign_collision_tokens, codebook_statistics
from .tokenization_unigrf import SemanticIdTokenizer

__all__ = [
    "CodebookStatistics",
    "ItemCatalog",
    "ResidualKMeans",
    "SemanticIdTokenizer",
    "assign_collision_tokens",
    "codebook_statistics",
]
