"""The scales and offsets of 4-bit tensors in GGUF files (llama.cpp, ggml-common.h)."""

import gguf
import numpy as np

_BLOCK_SIZES = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144}  # bytes


def grid_of(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray | None:
    """Return the scale and the offset of each group of 32 values in rows of blocks.

    Args:
      rows: the bytes of each row, `[rows, bytes]`.
      kind: the type of the blocks.

    Returns:
      float32 `[rows, groups, 2]`, so that a value is `code * scale + offset` with codes from 0 to
      15, or None if the blocks have another form.
    """
    if kind.name not in _BLOCK_SIZES:
        return None
    blocks = rows.reshape(-1, _BLOCK_SIZES[kind.name])
    first, second = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
    if kind.name == "Q4_0":
        scale, offset = first, -8 * first
    elif kind.name == "Q4_1":
        scale, offset = first, second
    else:  # blocks of 8 groups, whose scales and offsets are quantized to 6 bits
        scales, offsets = gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16])
        scale, offset = first[:, None] * scales, -second[:, None] * offsets
    return np.stack([scale.ravel(), offset.ravel()], axis=-1).reshape(len(rows), -1, 2)
