"""The dropout mask, written out."""

import numpy as np
import torch

from helpers.golden_bases import philox


def reference_mask(elements, seed, p, first=0):
    """Which elements stay, by the definition in csrc/dropout.h, through the independent Philox of the tests.

    `first`, a multiple of 4, is the position of the first one.
    """
    quads = np.arange(first // 4, first // 4 - (-elements // 4), dtype=np.uint64)
    zeros = np.zeros_like(quads)
    words = philox((quads, zeros, zeros, zeros + np.uint64(2)), (seed & 0xFFFFFFFF, seed >> 32))
    return torch.from_numpy((np.stack(words, axis=-1).reshape(-1)[:elements] >= int(p * 2**32)).copy())
