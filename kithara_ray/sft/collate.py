"""Tokenised rows to the arrays of one batch. B rows, T = seq_len positions."""

from collections.abc import Sequence

import numpy as np

from kithara_ray.sft.tokenize import TokenizedRow


def collate(rows: Sequence[TokenizedRow | None], seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """
    token_ids     int32   (B, T)  padded on the right with `pad_id`
    segment_ids   int32   (B, T)  1 for real tokens, 0 for padding
    loss_weights  float32 (B, T)  weight at position t of predicting token t+1: a row's loss mask shifted left by one,
                                  so the last column is 0

    `None` is a padding row, which fills up the tail of an epoch. It weighs 0 and holds one token, of segment 1: every
    row then has an attended position, so no softmax or mean runs over nothing; NaN times weight 0 would still be NaN.
    """
    shape = (len(rows), seq_len)
    token_ids = np.full(shape, pad_id, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    loss_weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        if row is None:
            segment_ids[b, 0] = 1
            continue
        length = len(row.token_ids)
        assert length <= seq_len, f"row of {length} tokens in a batch of seq_len {seq_len}: rows are cut when tokenised"
        token_ids[b, :length] = row.token_ids
        segment_ids[b, :length] = 1
        loss_weights[b, : length - 1] = row.loss_mask[1:]
    return {"token_ids": token_ids, "segment_ids": segment_ids, "loss_weights": loss_weights}
