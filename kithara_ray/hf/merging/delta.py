"""Merge arithmetic without torch, bit for bit what torch and PEFT compute on a CPU.

LoRA is W' = W + scale * (B @ A), and DoRA is W' = m * (W + scale * (B @ A)) / ||rows||.

Legend: O out features, I in features, R rank, N single elements.

PEFT (peft/tuners/lora/layer.py, Linear.get_delta_weight and merge; float32 factors, as PEFT loads them) computes
`delta = (B @ A) * float32(scale)` in float32 and `W += delta`, which torch rounds once to W's dtype. All of that is
elementwise except the sum over R.

Measurements show that torch's sgemm (MKL) is a chain of fused multiply-adds over R from 0 upwards. This holds for O >=
12 and I >= 16 with one or two threads and every R up to 192 (tests/hf/test_hf_delta.py). For larger R with AVX2, it
sums chunks (see `k_chunks`) and adds their results; this module uses that order on every processor. With AVX-512 it is
one chain up to R = 384. With four or more threads, torch's own last bits change if I is not a multiple of 16. numpy's
OpenBLAS sums in another order (2 % of the elements differ in the last bit for R = 16), and that order changes with the
row block. So:

* float32 results: this module emulates the chain in float64. The product of two float32 values is exact there, and so
  is the sum up to one rounding. `_fma` repairs the double rounding where it can matter.
* 16-bit results: BLAS gives the sum up to a known error. Scaling, adding and rounding are monotone. If both ends of the
  error interval round to the same 16 bits, these are the bits. The chain computes the rest, about 1e-4.
"""

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)

MKL_K_BLOCK = 192  # measured with torch 2.13 (MKL 2024.2, AVX2): R <= 192 is one chain
CHAIN_ELEMENTS = 1 << 15  # float64 scratch of 256 KiB each: stays in the L2 cache
CACHED_ELEMENTS = 1 << 18  # for the 16-bit path: float32 scratch of 1 MiB each
ONE_THREAD_PRODUCTS = 1 << 17  # multiplications up to which OpenBLAS' sgemm uses one thread
UNIT_ROUNDOFF = 2.0**-24
LOW_BITS = (1 << 29) - 1  # float64's bits below float32's last bit
TIE = 1 << 28
NORM_LANES = 8  # in torch.linalg.norm over rows, torch 2.13 with AVX2 and AVX-512


def k_chunks(r: int) -> list[tuple[int, int]]:
    """Return the [begin, end) ranges of R that torch's sgemm sums separately with AVX2.

    Measurements are bit-identical for R up to 1024.
    """
    size = r if r <= MKL_K_BLOCK else r // 2 if r <= 2 * MKL_K_BLOCK else MKL_K_BLOCK
    return [(begin, min(begin + size, r)) for begin in range(0, r, size)]


def _start(r: int) -> np.float32:
    """Return the chain's first value: for R = 1 torch keeps the product's own sign of zero, as -0 + product does."""
    return np.float32(-0.0 if r == 1 else 0.0)


def _fma(acc: np.ndarray, product: np.ndarray, total: np.ndarray) -> None:
    """acc = float32(acc + product) rounded once, in place. acc float32, product and scratch total float64, one shape.

    float64(acc + product) is rounded a second time on its way to float32. That is wrong only if the float64 sum lies
    exactly between two float32 values and was itself inexact. This function first moves such elements towards the true
    sum.
    """
    np.add(product, acc, out=total)
    ties = (total.view(np.int64) & LOW_BITS) == TIE
    if not ties.any():
        acc[...] = total
        return
    p_N, acc_N, total_N = product[ties], acc[ties].astype(np.float64), total[ties]
    back_N = total_N - p_N  # TwoSum (Knuth): the exact error of the float64 sum
    error_N = (p_N - (total_N - back_N)) + (acc_N - back_N)
    moved_N = np.nextafter(total_N, np.copysign(np.inf, error_N))
    total[ties] = np.where(error_N == 0, total_N, moved_N)
    acc[...] = total


def chain_product(b_OR: np.ndarray, a_RI: np.ndarray) -> np.ndarray:
    """B @ A as float32 (O, I) with torch's rounding. b_OR (O, R), a_RI (R, I) of float32."""
    n_out, r = b_OR.shape
    n_in = a_RI.shape[1]
    b64_OR, a64_RI = b_OR.astype(np.float64), a_RI.astype(np.float64)
    product_OI = np.empty((n_out, n_in), np.float32)
    rows = max(1, CHAIN_ELEMENTS // max(1, n_in))
    term, total = np.empty((2, rows, n_in), np.float64)
    for begin in range(0, n_out, rows):
        out = product_OI[begin : begin + rows]
        n = len(out)
        for number, (k_begin, k_end) in enumerate(k_chunks(r)):
            acc = np.full((n, n_in), _start(r), np.float32)
            for k in range(k_begin, k_end):
                np.multiply(b64_OR[begin : begin + n, k, None], a64_RI[k], out=term[:n])
                _fma(acc, term[:n], total[:n])
            out[...] = acc if number == 0 else out + acc
    return product_OI


def _chain_elements(b_OR: np.ndarray, a_RI: np.ndarray, o_N: np.ndarray, i_N: np.ndarray) -> np.ndarray:
    """The elements [o_N, i_N] of chain_product, float32 (N,)."""
    r = b_OR.shape[1]
    product_N = np.empty(len(o_N), np.float32)
    total_N = np.empty(len(o_N), np.float64)
    for number, (k_begin, k_end) in enumerate(k_chunks(r)):
        acc_N = np.full(len(o_N), _start(r), np.float32)
        for k in range(k_begin, k_end):
            _fma(acc_N, b_OR[o_N, k].astype(np.float64) * a_RI[k, i_N], total_N)
        product_N = acc_N if number == 0 else product_N + acc_N
    return product_N


def merged_rows(
    w_OI: np.ndarray,
    b_OR: np.ndarray,
    a_RI: np.ndarray,
    scale: float,
    out_dtype: np.dtype | None = None,
    rounds: bool = False,
) -> np.ndarray:
    """W + scale * (B @ A) for a block of rows, in `out_dtype` (None: W's), rounded once from float32.

    With `rounds`, scale * (B @ A) is first rounded to W's dtype, if that is `out_dtype`: PEFT does so for parameters.

    w_OI (O, I) float32, bfloat16 or float16; b_OR (O, R) and a_RI (R, I) any float of 32 bits or fewer; scale > 0.
    The result does not depend on how the rows are split into blocks. Rounding to float16 may overflow to infinity.
    """
    out_dtype = w_OI.dtype if out_dtype is None else np.dtype(out_dtype)
    rounds = rounds and w_OI.dtype == out_dtype
    w_OI, b_OR, a_RI = (np.ascontiguousarray(x, np.float32) for x in (w_OI, b_OR, a_RI))
    scale_32 = np.float32(scale)
    with np.errstate(over="ignore", invalid="ignore"):
        if out_dtype == FLOAT32:
            return w_OI + chain_product(b_OR, a_RI) * scale_32
        merged_OI = np.empty(w_OI.shape, out_dtype)
        rows = max(1, CACHED_ELEMENTS // max(1, w_OI.shape[1]))
        for begin in range(0, len(w_OI), rows):
            part = slice(begin, begin + rows)
            merged_OI[part] = _merged_16(w_OI[part], b_OR[part], a_RI, scale_32, out_dtype, rounds)
        return merged_OI


def dora_rows(
    w_OI: np.ndarray,
    b_OR: np.ndarray,
    a_RI: np.ndarray,
    scale: float,
    magnitude_O: np.ndarray,
    out_dtype: np.dtype | None = None,
) -> np.ndarray:
    """Return magnitude * V / ||V|| by rows, V = W + scale * (B @ A), as PEFT merges DoRA. Otherwise like `merged_rows`.

    A row of zeros has no direction: it becomes NaN, as PEFT's does.
    """
    out_dtype = w_OI.dtype if out_dtype is None else np.dtype(out_dtype)
    w_OI, b_OR, a_RI = (np.ascontiguousarray(x, np.float32) for x in (w_OI, b_OR, a_RI))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        v_OI = w_OI + chain_product(b_OR, a_RI) * np.float32(scale)
        v_OI *= (magnitude_O.astype(np.float32) / row_norms(v_OI))[:, None]
        return v_OI.astype(out_dtype, copy=False)


def row_norms(v_OI: np.ndarray) -> np.ndarray:
    """Return torch.linalg.norm(v, dim=1), float32 (O,), with torch's order of additions.

    Squares are added in 8 lanes, then the lanes to each other, then the rest of the row. If the rest has four or more
    columns, the first four are added plainly. The remaining columns are added one by one, fused.
    """
    n_out, n_in = v_OI.shape
    whole = n_in - n_in % NORM_LANES
    lanes = np.zeros((n_out, NORM_LANES), np.float32)
    for begin in range(0, whole, NORM_LANES):
        lanes += np.square(v_OI[:, begin : begin + NORM_LANES])
    total = lanes[:, 0].copy()
    for lane in range(1, NORM_LANES):
        total += lanes[:, lane]
    fused = whole + (4 if n_in - whole >= 4 else 0)
    for column in range(whole, fused):
        total += np.square(v_OI[:, column])
    for column in range(fused, n_in):
        _fma(total, np.square(v_OI[:, column], dtype=np.float64), np.empty(n_out))
    return np.sqrt(total)


def _blas_product(b_OR: np.ndarray, a_RI: np.ndarray) -> np.ndarray:
    """Return B @ A as BLAS rounds it, in pieces so small that OpenBLAS uses only this thread.

    For R = 16, waiting for its other threads costs more than they save: three times the processor time of all else
    here.
    """
    product_OI = np.empty((len(b_OR), a_RI.shape[1]), np.float32)
    rows = max(1, ONE_THREAD_PRODUCTS // max(1, a_RI.size))
    for begin in range(0, len(b_OR), rows):
        np.matmul(b_OR[begin : begin + rows], a_RI, out=product_OI[begin : begin + rows])
    return product_OI


def _merged_16(
    w_OI: np.ndarray, b_OR: np.ndarray, a_RI: np.ndarray, scale: np.float32, out_dtype: np.dtype, rounds: bool
) -> np.ndarray:
    def rounded(product: np.ndarray, w: np.ndarray) -> np.ndarray:
        product *= scale
        if rounds:
            product = product.astype(out_dtype).astype(np.float32)
        product += w
        return product.astype(out_dtype)

    # Each of the two sums is within R u |B||A| of the true one, |B||A| <= norm * norm; 2 u more for rounding the ends.
    r = a_RI.shape[0]
    b_norm_O = np.sqrt(np.einsum("or,or->o", b_OR, b_OR, dtype=np.float64)) * 1.001
    a_norm_I = np.sqrt(np.einsum("ri,ri->i", a_RI, a_RI, dtype=np.float64)) * 1.001
    relative = (2.2 * r + 2) * UNIT_ROUNDOFF
    error_OI = np.multiply.outer((b_norm_O * relative).astype(np.float32), a_norm_I.astype(np.float32))
    error_OI += np.float32(1e-37)  # a BLAS may flush subnormals
    product_OI = _blas_product(b_OR, a_RI)
    low_OI = rounded(product_OI - error_OI, w_OI)
    high_OI = rounded(np.add(product_OI, error_OI, out=error_OI), w_OI)
    differ_N = np.flatnonzero(low_OI.view(np.uint16) != high_OI.view(np.uint16))
    if len(differ_N):
        o_N, i_N = np.divmod(differ_N, low_OI.shape[1])
        low_OI[o_N, i_N] = rounded(_chain_elements(b_OR, a_RI, o_N, i_N), w_OI[o_N, i_N])
    return low_OI
