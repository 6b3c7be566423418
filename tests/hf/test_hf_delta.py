"""The arithmetic alone, against torch, bit by bit."""

import functools

import ml_dtypes
import numpy as np
import pytest
import torch

from kithara_ray.hf.merging import delta

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _bits(array) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.view(torch.int16 if array.itemsize == 2 else torch.int32).numpy()
    return array.view(np.int16 if array.itemsize == 2 else np.int32)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _case(n_out: int, n_in: int, r: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n_out * 7 + r)
    w_OI = torch.randn(n_out, n_in, generator=generator) * 0.05
    b_OR, a_RI = torch.randn(n_out, r, generator=generator) * 0.02, torch.randn(r, n_in, generator=generator) * 0.05
    b_OR[0], b_OR[1], w_OI[0, ::2], w_OI[1, ::2], w_OI[2] = 0.0, -0.0, -0.0, -0.0, 0.0  # signed zeros
    return w_OI.to(TORCH[dtype]), b_OR, a_RI


@functools.cache
def _chain_of_this_processor() -> int:
    """Up to which R torch's sgemm is one chain: 192 with AVX2, 384 with AVX-512."""
    _, b_OR, a_RI = _case(64, 80, 384, "float32")
    halves = b_OR[:, :192] @ a_RI[:192] + b_OR[:, 192:] @ a_RI[192:]
    return 192 if torch.equal(b_OR @ a_RI, halves) else 384


@pytest.fixture
def as_this_processor(monkeypatch):
    monkeypatch.setattr(delta, "MKL_K_BLOCK", _chain_of_this_processor())


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(
    ("n_out", "n_in", "r"),
    [(576, 576, 16), (192, 576, 4), (192, 576, 64), (192, 576, 8), (37, 53, 1), (37, 53, 3), (64, 80, 193)]
    + [(64, 80, 256), (64, 80, 512), (1024, 512, 16), (12, 2048, 16)],
)
def test_merged_rows_equal_torch_bit_by_bit(n_out, n_in, r, dtype, as_this_processor):
    w_OI, b_OR, a_RI = _case(n_out, n_in, r, dtype)
    expected = w_OI.clone()
    expected += (b_OR @ a_RI) * (10 / 3)  # what peft's Linear.merge does
    merged = delta.merged_rows(_numpy(w_OI), b_OR.numpy(), a_RI.numpy(), 10 / 3)
    assert np.array_equal(_bits(merged), _bits(expected))
    assert not np.array_equal(_bits(merged), _bits(w_OI))


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(("n_out", "n_in", "r"), [(576, 576, 16), (192, 1536, 4), (64, 80, 256), (37, 53, 3)])
def test_dora_rows_equal_torch_bit_by_bit(n_out, n_in, r, dtype, as_this_processor):
    w_OI, b_OR, a_RI = _case(n_out, n_in, r, dtype)
    w_OI[2] += 0.25  # a row of zeros has no direction
    magnitude = torch.linspace(-0.5, 3, n_out)
    adapted = w_OI + (b_OR @ a_RI) * (10 / 3)  # what peft's DoraLinearVariant.merge_unsafe does
    factor = magnitude / torch.linalg.norm(adapted, dim=1)
    expected = (factor.view(-1, 1) * adapted).to(TORCH[dtype])
    merged = delta.dora_rows(_numpy(w_OI), b_OR.numpy(), a_RI.numpy(), 10 / 3, magnitude.numpy())
    assert np.array_equal(_bits(merged), _bits(expected))


@pytest.mark.parametrize(("r", "sizes"), [(193, (96, 96, 1)), (256, (128, 128)), (512, (192, 192, 128))])
def test_a_large_rank_has_the_bits_of_avx2_on_every_processor(r, sizes):
    """No part is so long that torch would sum it in another order elsewhere."""
    w_OI, b_OR, a_RI = _case(64, 80, r, "float32")
    parts = zip(b_OR.split(sizes, dim=1), a_RI.split(sizes), strict=True)
    expected = w_OI + sum((b @ a for b, a in parts), torch.zeros(64, 80)) * (10 / 3)
    merged = delta.merged_rows(w_OI.numpy(), b_OR.numpy(), a_RI.numpy(), 10 / 3)
    assert np.array_equal(_bits(merged), _bits(expected))


@pytest.mark.parametrize("n_in", [3, *range(16, 25), 1007, 14336])
def test_row_norms_equal_torch_bit_by_bit(n_in):
    v_OI = torch.randn(2048, n_in, generator=torch.Generator().manual_seed(n_in))
    assert np.array_equal(_bits(delta.row_norms(v_OI.numpy())), _bits(torch.linalg.norm(v_OI, dim=1)))


@pytest.mark.parametrize("dtype", TORCH)
def test_the_row_block_does_not_change_a_bit(dtype):
    w_OI, b_OR, a_RI = (_numpy(x) for x in _case(101, 67, 16, dtype))
    whole = delta.merged_rows(w_OI, b_OR, a_RI, 1.7)
    parts = [delta.merged_rows(w_OI[i : i + 7], b_OR[i : i + 7], a_RI, 1.7) for i in range(0, 101, 7)]
    assert np.array_equal(_bits(whole), _bits(np.concatenate(parts)))


def test_double_rounding_is_repaired():
    # 1 + 2^-24 is a tie between two float32; the 2^-70 beyond it vanishes in float64 and must still decide upwards.
    acc = np.array([1.0, 1.0, 1.0 + 2**-23], np.float32)
    product = np.array([2**-24 + 2**-70, 2**-24, 2**-24 - 2**-70], np.float64)
    delta._fma(acc, product, np.empty(3))
    assert acc.tolist() == [1.0 + 2**-23, 1.0, 1.0 + 2**-23]


def test_out_dtype_is_rounded_once_from_float32():
    w_OI, b_OR, a_RI = _case(64, 48, 4, "float32")
    merged = delta.merged_rows(w_OI.numpy(), b_OR.numpy(), a_RI.numpy(), 2.0, ml_dtypes.bfloat16)
    assert np.array_equal(_bits(merged), _bits((w_OI + (b_OR @ a_RI) * 2.0).to(torch.bfloat16)))
    w_OI = w_OI.to(torch.bfloat16)
    merged = delta.merged_rows(_numpy(w_OI), b_OR.numpy(), a_RI.numpy(), 2.0, np.float32)
    assert np.array_equal(_bits(merged), _bits(w_OI.float() + (b_OR @ a_RI) * 2.0))


@pytest.mark.parametrize(
    ("r", "chunks"),
    [(16, [(0, 16)]), (192, [(0, 192)]), (193, [(0, 96), (96, 192), (192, 193)]), (384, [(0, 192), (192, 384)])],
)
def test_k_chunks(r, chunks):
    assert delta.k_chunks(r) == chunks
