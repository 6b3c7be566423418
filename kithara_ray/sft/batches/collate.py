"""Convert tokenised rows to the arrays of one batch.

B  rows    T  positions of the sequence    K  predictions of a row
"""

from collections.abc import Sequence

import numpy as np

from kithara_ray.sft.batches.blocks import TokenizedRow


def collate(
    packs: Sequence[Sequence[TokenizedRow]], seq_len: int, predictions: int, pad_id: int
) -> dict[str, np.ndarray]:
    """
    token_ids          int32   (B, T)  the samples of a pack end to end, padded on the right with `pad_id`
    segment_ids        int32   (B, T)  1 for the tokens of a pack's first sample, 2 for the second's, 0 for padding
    target_positions   int32   (B, K)  the position before a trained token, which predicts it
    target_ids         int32   (B, K)  the trained token
    target_weights     float32 (B, K)  1, or 0 beyond the trained tokens of a pack that has fewer than K

    The model predicts only trained tokens, so a head of 256,000 rows is not multiplied with the positions of a prompt.
    A sample's first token is never trained, so no prediction crosses samples.

    Empty packs fill the last batch of an epoch. Each weighs 0 and holds one token, of segment 1. Every row then has an
    attended position, so no softmax or mean is empty. It would give NaN, and NaN times weight 0 is NaN.
    """
    batch = {
        "token_ids": np.full((len(packs), seq_len), pad_id, np.int32),
        "segment_ids": np.zeros((len(packs), seq_len), np.int32),
        "target_positions": np.zeros((len(packs), predictions), np.int32),
        "target_ids": np.zeros((len(packs), predictions), np.int32),
        "target_weights": np.zeros((len(packs), predictions), np.float32),
    }
    for b, pack in enumerate(packs):
        if not len(pack):
            batch["segment_ids"][b, 0] = 1
            continue
        ids = np.concatenate([row.token_ids for row in pack])
        trained = np.flatnonzero(np.concatenate([row.loss_mask for row in pack]))
        length = len(ids)
        assert length <= seq_len, f"pack of {length} tokens in a batch of seq_len {seq_len}"
        assert len(trained) <= predictions, f"pack of {len(trained)} trained tokens in a batch of {predictions}"
        batch["token_ids"][b, :length] = ids
        batch["segment_ids"][b, :length] = np.repeat(np.arange(len(pack)) + 1, [len(row.token_ids) for row in pack])
        batch["target_positions"][b, : len(trained)] = trained - 1
        batch["target_ids"][b, : len(trained)] = ids[trained]
        batch["target_weights"][b, : len(trained)] = 1
    return batch
