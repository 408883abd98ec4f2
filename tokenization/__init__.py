"""Semantic ids: the quantizer, the ids that it gives, and the tokenizer over them."""

from .item_catalog import ItemCatalog
from .residual_kmeans import ResidualKMeans
from .semantic_ids import CodebookHealth, assign_suffixes, codebook_health
from .tokenization_unigrf import SemanticIdTokenizer

__all__ = [
    "CodebookHealth",
    "ItemCatalog",
    "ResidualKMeans",
    "SemanticIdTokenizer",
    "assign_suffixes",
    "codebook_health",
]
