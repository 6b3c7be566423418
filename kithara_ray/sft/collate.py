"""Tokenised rows to the arrays of one batch.

B  rows    T  positions of the sequence    K  predictions of a row
"""

from collections.abc import Sequence

import numpy as np

from kithara_ray.sft.tokenize import TokenizedRow


def collate(rows: Sequence[TokenizedRow | None], seq_len: int, predictions: int, pad_id: int) -> dict[str, np.ndarray]:
    """
    token_ids          int32   (B, T)  padded on the right with `pad_id`
    segment_ids        int32   (B, T)  1 for real tokens, 0 for padding
    target_positions   int32   (B, K)  where a trained token is predicted from: the position before it
    target_ids         int32   (B, K)  the trained token
    target_weights     float32 (B, K)  1, and 0 where a row has fewer than K trained tokens

    Only trained tokens are predicted: a head of 256,000 rows is not multiplied with the positions of a prompt.

    `None` is a padding row, which fills up the tail of an epoch. It weighs 0 and holds one token, of segment 1: every
    row then has an attended position, so no softmax or mean runs over nothing; a NaN there times weight 0 would be NaN.
    """
    batch = {
        "token_ids": np.full((len(rows), seq_len), pad_id, np.int32),
        "segment_ids": np.zeros((len(rows), seq_len), np.int32),
        "target_positions": np.zeros((len(rows), predictions), np.int32),
        "target_ids": np.zeros((len(rows), predictions), np.int32),
        "target_weights": np.zeros((len(rows), predictions), np.float32),
    }
    for b, row in enumerate(rows):
        if row is None:
            batch["segment_ids"][b, 0] = 1
            continue
        length, trained = len(row.token_ids), np.flatnonzero(row.loss_mask)
        assert length <= seq_len, f"row of {length} tokens in a batch of seq_len {seq_len}: rows are cut when tokenised"
        assert len(trained) <= predictions, (
            f"row of {len(trained)} trained tokens in a batch of {predictions} predictions"
        )
        batch["token_ids"][b, :length] = row.token_ids
        batch["segment_ids"][b, :length] = 1
        batch["target_positions"][b, : len(trained)] = trained - 1
        batch["target_ids"][b, : len(trained)] = row.token_ids[trained]
        batch["target_weights"][b, : len(trained)] = 1
    return batch
