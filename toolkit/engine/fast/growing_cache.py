"""Keys and values of rows that grow in place: transformers' own cache copies all of them for each new token."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

# Tokens that a full layer gets room for at once. It is copied once for so many, and the room is memory: a token of 200
# rows takes 5 MB in bfloat16 at 135 M parameters.
MORE_ROOM = 16


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """``keys`` and ``values`` [R, H, T, D] are the filled part of tensors with room for more tokens."""

    key_room: torch.Tensor | None = None
    value_room: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = self.get_seq_length()
        total = n + key_states.shape[-2]
        self.key_room = _with_room(self.key_room, self.keys if n else None, key_states, total)
        self.value_room = _with_room(self.value_room, self.values if n else None, value_states, total)
        self.key_room[:, :, n:total], self.value_room[:, :, n:total] = key_states, value_states
        self.keys, self.values, self.is_initialized = self.key_room[:, :, :total], self.value_room[:, :, :total], True
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.key_room = self.value_room = None  # else the rows that were would stay until the next token
        super().batch_select_indices(indices)


def _with_room(room: torch.Tensor | None, filled: torch.Tensor | None, new: torch.Tensor, total: int) -> torch.Tensor:
    """``room`` where it holds what is ``filled`` and ``total`` tokens fit in it, else a longer tensor with that.

    What selects, repeats or drops rows makes other keys and values than those in the room.
    Under autocast the first keys of a cache may be float32 and its values bfloat16, or turn so on the way: they have
    the precision that joining them would give.
    """
    dtype = new.dtype if filled is None else torch.promote_types(filled.dtype, new.dtype)
    if (
        room is not None
        and filled is not None
        and room.data_ptr() == filled.data_ptr()
        and room.shape[2] >= total
        and room.dtype == dtype
    ):
        return room
    longer = new.new_empty(new.shape[0], new.shape[1], total + MORE_ROOM, new.shape[3], dtype=dtype)
    if filled is not None:
        longer[:, :, : filled.shape[2]] = filled
    return longer
