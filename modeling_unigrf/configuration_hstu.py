# Copyright 2026 The UniGRF authors. Licensed under the Apache License, Version 2.0.
"""The configuration of the HSTU backbone: its sizes."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


@strict
class HSTUConfig(PreTrainedConfig):
    r"""
    Configuration of the HSTU backbone (Zhai et al. 2024, arXiv 2402.17152), as its public code has it.

    Args:
        vocab_size (`int`, defaults to 1024):
            Number of tokens.
        hidden_size (`int`, defaults to 50):
            Width of the residual stream.
        num_hidden_layers (`int`, defaults to 2):
            Number of blocks.
        num_attention_heads (`int`, defaults to 1):
            Number of heads.
        head_dim (`int`, *optional*):
            Width of each head; `hidden_size // num_attention_heads` by default.
        max_position_embeddings (`int`, defaults to 512):
            Most positions of a sequence. This constant divides the attention in place of a softmax's norm, so results
            do not depend on padding or packing.
        num_time_buckets (`int`, defaults to 0):
            Logarithmic buckets of the seconds between two events, each with a learned bias a layer. The public code
            has 128. 0: the backbone reads no times.
        dropout (`float`, defaults to 0.2):
            Dropout on the embeddings and on the output of attention.
        layer_norm_eps (`float`, defaults to 1e-6):
            Constant that is added to the variance in the layer norms, which have no parameters.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights.
    """

    model_type = "hstu"
    keys_to_ignore_at_inference = ["cache"]

    vocab_size: int = 1024
    hidden_size: int = 50
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    head_dim: int | None = None
    max_position_embeddings: int = 512
    num_time_buckets: int = 0
    dropout: float | int = 0.2
    layer_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


# Register here: a `text_config` of this type must load wherever UniGRFConfig does.
AutoConfig.register(HSTUConfig.model_type, HSTUConfig, exist_ok=True)

__all__ = ["HSTUConfig"]
