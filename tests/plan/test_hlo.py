"""Programs' HLO text, read by known amounts: products, loops, collectives and traffic."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kithara_ray.plan import hlo, hlo_text, terms
from kithara_ray.sharding.mesh import make_mesh


def test_loops_count_as_often_as_they_run():
    """A scan of 7 products of (16, 32) by (32, 32), and within each a scan of 3 of (16, 32) by (32, 8)."""

    def inner(x, w):
        return x, jnp.tanh(x @ w)

    def outer(x, _):
        x = jnp.tanh(x @ big)
        return x, jax.lax.scan(inner, x, small)[1]

    big, small = jnp.ones((32, 32)), jnp.ones((3, 32, 8))
    compiled = jax.jit(lambda x: jax.lax.scan(outer, x, None, length=7)).lower(jnp.ones((16, 32))).compile()
    assert hlo.cost_of(compiled.as_text()).matmul_flops == 7 * 2 * (16 * 32 * 32 + 3 * 16 * 32 * 8)


def test_collectives_count_what_a_device_receives():
    """On 4 devices: a weight of 4 KiB gathered 5 times in a scan, a sum of 2 KiB over all."""
    mesh = make_mesh(devices=jax.devices()[:4])
    on = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731

    def step(x, weights):
        def body(x, w):
            w = jax.lax.with_sharding_constraint(w, on())
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(body, x, weights)
        return jax.lax.with_sharding_constraint(jnp.sum(x.reshape(4, 16, 32), axis=0), on())

    shapes = (
        jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=on("fsdp")),
        jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=on(None, "fsdp")),
    )
    cost = hlo.cost_of(jax.jit(step).lower(*shapes).compile().as_text())
    assert cost.collectives["all-gather"] == 5 * 4096 * 3 / 4
    assert cost.collectives["all-reduce"] == 2 * 2048 * 3 / 4
    assert cost.collective_counts == {"all-gather": 5, "all-reduce": 1}


_GATHER = "all-gather(%w), channel_id=3, replica_groups=mesh['a'=1,'b'=4] {'b'}, dimensions={0}"
_TPU = f"""\
HloModule jit_step

%body (p: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {{
  %w = bf16[64,128]{{1,0}} parameter(0)
  %gather.1 = bf16[256,128]{{1,0:T(8,128)}} {_GATHER}
  %gather.2 = bf16[256,128]{{1,0:T(8,128)S(1)}} {_GATHER}
  %x = bf16[16,64,1]{{2,1,0}} constant({{...}})
  %k = bf16[2,64,128]{{2,1,0}} constant({{...}})
  %y = bf16[16,2,128]{{2,1,0}} convolution(%x, %k), window={{size=2 pad=1_1 rhs_reversal=1}}, dim_labels=bf0_0io->b0f
  %mha_fwd.4 = f32[8]{{0}} custom-call(%y), custom_call_target="tpu_custom_call"
  %sizes = s32[3]{{0}} constant({{...}})
  %rows = bf16[96,64]{{1,0}} constant({{...}})
  %more = bf16[96,32]{{1,0}} constant({{...}})
  %experts = bf16[3,64,32]{{2,1,0}} constant({{...}})
  %ragged-dot-metadata.1 = (s32[4]{{0}}, s32[1]{{0}}) custom-call(%sizes), custom_call_target="tpu_custom_call"
  %ragged-dot-none.2 = bf16[96,32]{{1,0}} custom-call(%sizes, %rows, %experts), custom_call_target="tpu_custom_call"
  %ragged-dot-none.3 = bf16[3,64,32]{{2,1,0}} custom-call(%sizes, %rows, %more), custom_call_target="tpu_custom_call"
}}

%condition (p: s32[]) -> pred[] {{
  %counter = s32[]{{:T(128)}} parameter(0)
  %limit = s32[]{{:T(128)}} constant(26)
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}}

%all-reduce-scatter.1 (input: bf16[4,8]) -> bf16[1,8] {{
  %input = bf16[4,8]{{1,0}} parameter(0)
  %sum = bf16[4,8]{{1,0}} all-reduce(%input), channel_id=9, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  ROOT %part = bf16[1,8]{{1,0}} dynamic-slice(%sum), dynamic_slice_sizes={{1,8}}
}}

ENTRY %main (p: bf16[4,8]) -> bf16[1,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  %loop = (s32[], bf16[64,128]) while(%p), condition=%condition, body=%body
  ROOT %scattered = bf16[1,8]{{1,0}} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""


def test_what_only_a_tpu_program_has():
    """One gather spread over a pipeline counts once; products are convolutions whose window lies half outside; a
    reduce-scatter is written as an all-reduce of which a part is taken. A grouped product multiplies each row with the
    matrix of its group, and its gradient sums products of rows."""
    computations, entry = hlo_text.parse(_TPU)
    assert (entry, set(computations)) == ("main", {"body", "condition", "all-reduce-scatter.1", "main"})
    cost = hlo.cost_of(_TPU)
    assert cost.collectives == {"all-gather": 26 * 256 * 128 * 2 * 3 / 4, "reduce-scatter": 4 * 8 * 2 * 3 / 4}
    assert cost.matmul_flops == 26 * 2 * (16 * 64 * 128 * 2 + 2 * 96 * 64 * 32)
    assert cost.kernels == {"mha_fwd": 26, "ragged-dot-metadata": 26, "ragged-dot-none": 2 * 26}


_PIPELINED = f"""\
HloModule jit_step

%step (v: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {{
  %v = bf16[64,128]{{1,0}} parameter(0)
  %doubled = bf16[64,128]{{1,0}} add(%v, %v)
  %gathered = bf16[256,128]{{1,0}} {_GATHER.replace("%w", "%v")}
  ROOT %both = (bf16[64,128]{{1,0}}, bf16[256,128]{{1,0}}) tuple(%doubled, %gathered)
}}

ENTRY %main (w: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {{
  %w = bf16[64,128]{{1,0}} parameter(0)
  ROOT %first = (bf16[64,128]{{1,0}}, bf16[256,128]{{1,0}}) fusion(%w), kind=kCustom, calls=%step
}}
"""


def test_a_step_of_a_pipeline_hands_the_gathered_array_on():
    """It does not write it: the products beside which a gather runs would each write all of it."""
    cost = hlo.cost_of(_PIPELINED)
    assert cost.hbm_bytes == 2 * 64 * 128 * 2
    assert cost.collectives == {"all-gather": 256 * 128 * 2 * 3 / 4}


def test_windowed_products_count_once():
    """Two products of a block, D=2048 and F=8192, in a scan of 6 over 16 chips, each with one row of 2,048 tokens.

    The compiler gathers a weight in parts while it multiplies, in loops whose counters go to 8 in steps of 2. The
    program runs two products forward, one again, and two backward. Two of these five share a weight gathered whole.
    """
    cost = hlo.cost_of((Path(__file__).parent / "golden" / "windowed_products_v5e_16.hlo").read_text())
    product, weight = 2 * 2048 * 2048 * 8192, 2 * 2048 * 8192
    assert cost.matmul_flops == 6 * 5 * product
    # A windowed product starts with a part from one side; then each of 4 trips takes two from both sides.
    assert cost.collective_counts == {"collective-permute": 6 * 3 * (1 + 4 * 4), "all-gather": 6}
    assert cost.collectives == {
        "collective-permute": 6 * 3 * 17 * weight / 16,
        "all-gather": 6 * weight * 15 / 16,
    }


_LOOP = """\
%body (state: (f32[], s32[])) -> (f32[], s32[]) {
  %state = (f32[], s32[]) parameter(0)
  %x = f32[] get-tuple-element(%state), index=0
  %i = s32[] get-tuple-element(%state), index=1
  %y = f32[4,4] constant({...})
  %z = f32[4,4] dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %step = s32[] constant(STEP)
  %next = s32[] fusion(%step, %i), kind=kLoop, calls=%added
  ROOT %after = (f32[], s32[]) tuple(%x, %next)
}

%added (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %sum = s32[] add(%b, %a)
}

%compared (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=WAY
}

%condition (state: (f32[], s32[])) -> pred[] {
  %state = (f32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=1
  %limit = s32[] constant(LIMIT)
  ROOT %said = pred[] fusion(%i, %limit), kind=kLoop, calls=%compared
}

ENTRY %main (p: f32[]) -> (f32[], s32[]) {
  %p = f32[] parameter(0)
  %start = s32[] constant(START)
  %first = (f32[], s32[]) tuple(%p, %start)
  ROOT %loop = (f32[], s32[]) while(%first), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("start", "step", "way", "limit"),
    [(0, 1, "LT", 26), (0, 2, "LT", 8), (3, 2, "LT", 8), (1, 3, "LE", 10), (9, -2, "GT", 0), (8, -2, "GE", 0)],
)
def test_a_loops_own_arithmetic_says_how_often_it_runs(start, step, way, limit):
    text = _LOOP.replace("START", str(start)).replace("STEP", str(step)).replace("WAY", way)
    counted = {"LT": range(start, limit, step), "LE": range(start, limit + 1, step)}
    counted |= {"GT": range(start, limit, step), "GE": range(start, limit - 1, step)}
    assert hlo.cost_of(text.replace("LIMIT", str(limit))).matmul_flops == len(counted[way]) * 2 * 4**3


@pytest.mark.parametrize(("seq_len", "window"), [(5, None), (5, 2), (6, 6), (7, 1)])
def test_seen_pairs(seq_len, window):
    pairs = [(q, k) for q in range(seq_len) for k in range(q + 1) if window is None or q - k < window]
    assert terms.seen_pairs(seq_len, window) == len(pairs)


def test_refusals_are_read():
    """As libtpu words them."""
    assert hlo.refused_bytes(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.61G) exceeds "
        "available HBM (15.75G)."
    ) == {"temporaries": int(17.61 * 2**30), "available": int(15.75 * 2**30)}
    used = "Ran out of memory in memory space hbm. Used 22.50G of 15.75G hbm. Exceeded by 6.75G."
    assert hlo.refused_bytes(used) == {"total": int(22.5 * 2**30), "available": int(15.75 * 2**30)}
    assert hlo.refused_bytes("RESOURCE_EXHAUSTED: something else") == {"available": None}
