"""Keep users' histories, and the keys and values of their tokens, between requests, in bounded memory."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache

# Python's own objects of a user: names, lists, headers of tensors.
BYTES_OF_OBJECTS = 2048
BYTES_OF_TENSOR = 512


@dataclass
class KeyValues:
    """
    The keys and values of one history.

    Args:
        columns (`torch.LongTensor` of shape `(T, 4)`): All that they depend on, for each token: `token_columns`.
        layers: Keys and values of each layer, `[heads, T, D]`.
    """

    columns: torch.LongTensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""
        tensors = [self.columns, *(tensor for layer in self.layers for tensor in layer)]
        return sum(tensor.nbytes + BYTES_OF_TENSOR for tensor in tensors)

    def num_shared(self, columns: torch.LongTensor) -> int:
        """Return how many first tokens of another history, `columns [T', 4]`, have these keys and values."""
        length = min(len(columns), len(self.columns))
        is_same = (columns[:length] == self.columns[:length]).all(dim=1)
        return int(is_same.long().cumprod(dim=0).sum())


@dataclass
class User:
    """
    What the server keeps of a user.

    Args:
        history (`bytes`): `items`, `behaviors` and `timestamps` of all events, as JSON.
        key_values (`KeyValues`, *optional*): Keys and values of the last history that the model read. None: none.
    """

    history: bytes
    key_values: KeyValues | None = None

    @classmethod
    def of(cls, history: dict, key_values: KeyValues | None) -> "User":
        """Make a user from a history with lists of JSON's types."""
        return cls(json.dumps(history).encode(), key_values)

    def read(self) -> dict:
        """Return the history."""
        return json.loads(self.history)

    @property
    def num_bytes(self) -> int:
        """Memory in bytes, with the objects around it."""
        return len(self.history) + BYTES_OF_OBJECTS + (self.key_values.num_bytes if self.key_values else 0)


class Users:
    """
    The users of the last requests: the least recently used make room for others.

    Args:
        max_bytes: Most bytes of all users together. 0: keep nobody.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_evicted = 0
        self.users: OrderedDict[str, User] = OrderedDict()

    def get(self, user_id: str) -> User | None:
        """Return a user, who is the last to make room then; None if the server does not know the user."""
        if user_id in self.users:
            self.users.move_to_end(user_id)
        return self.users.get(user_id)

    def put(self, user_id: str, user: User) -> bool:
        """Keep a user in place of what was kept before; return False for a user who is too large to be kept."""
        if user_id in self.users:
            self.num_bytes -= self.users.pop(user_id).num_bytes
        if user.num_bytes > self.max_bytes:
            return False
        self.users[user_id] = user
        self.num_bytes += user.num_bytes
        while self.num_bytes > self.max_bytes:
            _, evicted = self.users.popitem(last=False)
            self.num_bytes -= evicted.num_bytes
            self.num_evicted += 1
        return True

    def forget_key_values(self) -> None:
        """Keep the histories alone: another model has other keys and values."""
        for user in self.users.values():
            user.key_values = None
        self.num_bytes = sum(user.num_bytes for user in self.users.values())


def joined(
    kept: Sequence[KeyValues | None], columns: torch.LongTensor, lengths: Sequence[int]
) -> tuple[DynamicCache, int]:
    """
    Join the caches of several users into one, padded on the left as their histories are.

    The model reads the same number of last tokens of every row: as many as the row that misses most.

    Args:
        kept: What is known of each of B rows; None: nothing.
        columns (`torch.LongTensor` of shape `(B, T, 4)`): `token_columns` of the histories, padded on the left.
        lengths: Tokens of each history.

    Returns:
        The cache of the first tokens `[B, C]`, and the number of tokens that it spares.
    """
    shared = [
        known.num_shared(row[-length:]) if known else 0
        for known, row, length in zip(kept, columns, lengths, strict=True)
    ]
    # The last token runs in any case: its output begins the search.
    num_new = max(1, *(length - count for length, count in zip(lengths, shared, strict=True)))
    width = columns.shape[1] - num_new
    spared = [max(0, length - num_new) for length in lengths]
    cache = DynamicCache()
    first = next((known for known in kept if known), None)
    if width <= 0 or first is None or not any(spared):
        return cache, 0
    for index, layer in enumerate(first.layers):
        states = []
        for place, like in enumerate(layer):
            rows = like.new_zeros(len(kept), like.shape[0], width, like.shape[2])
            for row, (known, count) in enumerate(zip(kept, spared, strict=True)):
                if known and count:
                    rows[row, :, width - count :] = known.layers[index][place][:, :count]
            states.append(rows)
        cache.update(*states, index)
    cache.token_columns = columns[:, :width]
    return cache, sum(spared)


def split(cache: DynamicCache, row: int, columns: torch.LongTensor) -> KeyValues:
    """Copy the keys and values of a row's tokens, `columns [T, 4]`, out of a cache of several users."""
    last = slice(-len(columns), None)
    layers = [(layer.keys[row, :, last].clone(), layer.values[row, :, last].clone()) for layer in cache.layers]
    return KeyValues(columns.clone(), layers)
