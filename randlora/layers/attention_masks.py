"""The masks of an attention as one that is added to its scores."""

from __future__ import annotations

import torch
from torch import Tensor


def merged_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores ``[batch, heads, query length, key length]``."""
    (batch, heads, length, _), keys = q.shape, k.shape[2]
    merged = None
    if attn_mask is not None:
        shapes = {2: (length, keys), 3: (batch * heads, length, keys)}
        if attn_mask.shape != shapes.get(attn_mask.dim()):
            raise ValueError(f"attn_mask must have shape {shapes[2]} or {shapes[3]}, got {tuple(attn_mask.shape)}")
        merged = _additive("attn_mask", attn_mask, q.dtype)
        merged = merged[None, None] if merged.dim() == 2 else merged.unflatten(0, (batch, heads))
    if key_padding_mask is not None:
        if key_padding_mask.shape != (batch, keys):
            raise ValueError(
                f"key_padding_mask must have shape {(batch, keys)} (unbatched: {(keys,)}), got "
                f"{tuple(key_padding_mask.shape)}"
            )
        padding = _additive("key_padding_mask", key_padding_mask, q.dtype)[:, None, None]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"{name} must have dtype bool or a floating dtype, got {mask.dtype}")
    return mask.to(dtype)
