"""The text side of the tokenizer: a WordLevel model that reads and writes tokens like `<a_12>`."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from .vocabulary_layout import SPECIAL_TOKENS


def build_backend(vocabulary: dict[str, int]) -> Tokenizer:
    """A tokenizer of the `tokenizers` library over whole tokens, token -> id."""
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    # Tokens may be apart ("<a_1> <b_2>") or, as `decode` writes them, joined ("<a_1><b_2>").
    joined = pre_tokenizers.Split(Regex("<[^<>]+>"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), joined])
    backend.decoder = decoders.Fuse()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS.values()]
    backend.add_special_tokens(special)
    return backend


def load_backend(tokenizer_file: str | None, vocabulary: dict[str, int]) -> Tokenizer:
    """Reads tokenizer.json, with what was added to it by hand. `ValueError` unless it is over the same vocabulary."""
    if tokenizer_file is None:
        raise ValueError("expected the file tokenizer.json beside items.json, found none: copy the whole folder")
    backend = Tokenizer.from_file(str(tokenizer_file))
    found = backend.get_vocab(with_added_tokens=False)
    if found != vocabulary:
        raise ValueError(
            f"expected tokenizer.json to hold the {len(vocabulary)} tokens of the behaviors and codebooks, found "
            f"{len(found)} tokens or another order: copy all files from the same folder"
        )
    return backend
