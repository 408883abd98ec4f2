"""The text side of the tokenizer: a WordLevel model that reads and writes tokens such as `<a_12>`."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from .vocabulary_layout import SPECIAL_TOKENS


def build_backend(vocabulary: dict[str, int]) -> Tokenizer:
    """Build a tokenizer of the `tokenizers` library that splits text into the tokens of `vocabulary` (token -> ID)."""
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    # Split "<a_1> <b_2>" and "<a_1><b_2>" alike; `decode` writes the second.
    joined = pre_tokenizers.Split(Regex("<[^<>]+>"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), joined])
    backend.decoder = decoders.Fuse()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS.values()]
    backend.add_special_tokens(special)
    return backend


def grow_backend(backend: Tokenizer, vocabulary: dict[str, int]) -> Tokenizer:
    """Build a tokenizer over a larger vocabulary, with the post-processor of `backend`.

    Raises:
        ValueError: Users added tokens to `backend`, so its vocabulary cannot grow at its end.
    """
    num_added = backend.get_vocab_size(with_added_tokens=True) - backend.get_vocab_size(with_added_tokens=False)
    if num_added:
        raise ValueError(
            f"The vocabulary must end with the last level, got {num_added} tokens added after it. Add items first and "
            "tokens afterwards."
        )
    larger = build_backend(vocabulary)
    larger.post_processor = backend.post_processor
    return larger


def load_backend(tokenizer_file: str | None, vocabulary: dict[str, int]) -> Tokenizer:
    """Read tokenizer.json, including the tokens that users added.

    Raises:
        ValueError: The file is missing, or its vocabulary differs from `vocabulary`.
    """
    if tokenizer_file is None:
        raise ValueError("tokenizer.json must stand beside items.json, got no file. Copy the whole folder.")
    backend = Tokenizer.from_file(str(tokenizer_file))
    saved_vocabulary = backend.get_vocab(with_added_tokens=False)
    if saved_vocabulary != vocabulary:
        raise ValueError(
            f"{tokenizer_file} must hold the {len(vocabulary)} tokens of the behaviors and codebooks in order, got "
            f"{len(saved_vocabulary)} tokens or another order. Copy all files from the same folder."
        )
    return backend
