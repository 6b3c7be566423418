"""The choice of remat, mesh and rows: the decision on figures alone, and one that a TPU's compiler takes part in."""

from types import SimpleNamespace

import pytest
from tiny import SIZES, VOCABULARY

from kithara_ray.errors import ConfigError, PlanError
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.options import REMAT
from kithara_ray.plan import choose, planner, slice_of
from kithara_ray.plan.chooser import FINALISTS, MARGIN, decide
from kithara_ray.plan.estimates import Variant, variants
from kithara_ray.sharding.shape import MeshShape

ROOM = 16 * 10**9


def made(seconds: float, gb: float, fits: bool | None = None, moved: float = 0.0, tokens: int = 4096, kept: float = 0):
    """A plan, as far as the decision looks at it: all of its memory is temporaries."""
    total = int(gb * 10**9)
    return SimpleNamespace(
        fits=total <= ROOM if fits is None else fits,
        hbm_bytes_per_chip={"total": total, "temporaries": total, "available": ROOM},
        step_time_s={"compute": seconds, "interconnect": moved},
        step_time_s_bound=seconds,
        host={"kept_bytes": kept * 10**9},
        chips=8,
        hosts=2,
        tokens_per_step=tokens,
    )


def decided(estimates, programs):
    """The number of the decision, and the numbers that were compiled; None stands for a failure of the compiler."""
    calls = []

    def compiled(number):
        calls.append(number)
        if programs[number] is None:
            raise PlanError("it did not compile")
        return programs[number]

    best, tried = decide(estimates, compiled)
    assert [plan for plan in programs if any(plan is other for other in tried)] == sorted(tried, key=programs.index)
    return programs.index(best), calls


SLOW, MIDDLE, FAST = made(3.0, 2), made(2.0, 8), made(1.0, 14)


def test_the_fastest_is_compiled_first_and_alone_if_it_fits():
    assert decided([SLOW, MIDDLE, FAST], [SLOW, MIDDLE, made(1.0, 15)]) == (2, [2])


def test_a_refused_program_gives_way_to_the_next():
    assert decided([SLOW, MIDDLE, FAST], [SLOW, MIDDLE, made(1.0, 17)]) == (1, [2, 1])
    assert decided([SLOW, MIDDLE, FAST], [SLOW, MIDDLE, made(1.0, 9, fits=False)]) == (1, [2, 1])


def test_a_program_within_the_margin_is_too_large():
    almost = made(1.0, ROOM * (1 - MARGIN / 2) / 1e9)
    assert almost.fits
    assert decided([SLOW, MIDDLE, FAST], [SLOW, MIDDLE, almost]) == (1, [2, 1])
    assert decided([almost], [almost]) == (0, [0])  # there is nothing else


def test_a_program_slower_than_its_estimate_is_compared_with_the_next():
    """It takes 2.5 s, not 1: the next, estimated at 2, is compiled and taken; the third, at 3, is not compiled."""
    assert decided([SLOW, MIDDLE, FAST], [SLOW, MIDDLE, made(2.5, 14)]) == (1, [2, 1])
    assert decided([SLOW, MIDDLE, FAST], [SLOW, made(2.6, 8), made(2.5, 14)]) == (2, [2, 1])


def test_what_cannot_fit_is_not_compiled():
    """An estimate may be half too high; one three times too high is not."""
    assert decided([SLOW, made(1.0, 40)], [SLOW, None]) == (0, [0])
    assert decided([SLOW, made(1.0, 20)], [SLOW, made(1.0, 12)]) == (1, [1])


def test_hosts_need_room_for_what_four_chips_keep_there():
    kept = made(1.0, 5, kept=90)
    assert decided([SLOW, kept], [SLOW, kept]) == (1, [1])
    assert decided([SLOW, made(1.0, 5, kept=100)], [SLOW, None]) == (0, [0])


def test_equal_times_are_decided_by_what_moves():
    assert decided([made(1.0, 8, moved=0.5), made(1.0, 12)], [None, made(1.0, 12)]) == (1, [1])


def test_the_time_is_that_of_a_token():
    assert decided([made(1.0, 2), made(1.5, 4, tokens=8192)], [None, made(1.5, 4, tokens=8192)]) == (1, [1])


def test_a_compiler_that_fails_is_not_the_end():
    assert decided([SLOW, MIDDLE, FAST], [SLOW, MIDDLE, None]) == (1, [2, 1])
    with pytest.raises(PlanError):
        decided([SLOW, FAST], [None, None])


def test_few_programs_are_compiled_and_the_smallest_is_one_of_them():
    estimates = [made(10.0, 1), *(made(1.0 + number, 15) for number in range(8))]
    programs = [made(10.0, 1), *(made(1.0 + number, 20) for number in range(8))]
    assert decided(estimates, programs) == (0, [1, 2, 3, 0])
    assert len(decided(estimates, programs)[1]) == FINALISTS
    too_large = [made(10.0, 17), *programs[1:]]
    assert decided(estimates, too_large) == (0, [1, 2, 3, 0])


# --- whole choices ---------------------------------------------------------------------------------------------------

CONFIG = dict(SIZES["llama"], model_type="llama", vocab_size=VOCABULARY, rms_norm_eps=1e-6, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(planner.urls, "cache_dir", lambda: tmp_path_factory.getbasetemp() / "plans of choices")


def test_all_variants_are_estimated_of_one_model(monkeypatch):
    """On the other mesh every device holds what the two held together, and a plan of that mesh says the same."""
    where, asked = slice_of("v5e-4"), [
        Variant(remat, mesh, rows)
        for mesh in (MeshShape(), MeshShape(data=-1, fsdp=1))
        for remat in REMAT
        for rows in (1, 2)
    ]  # fmt: skip
    run, calls = planner.subprocess.run, []
    monkeypatch.setattr(planner.subprocess, "run", lambda *given, **how: (calls.append(1), run(*given, **how))[1])
    found = variants(CONFIG, where, 128, asked, {"lora": LoraConfig(r=4)})
    assert len(calls) == 1
    assert len(found) == len(asked)
    for number in (len(asked) - 3,):
        remat, mesh, rows = asked[number].remat, asked[number].mesh, asked[number].rows
        by_itself = planner.plan(CONFIG, where, 128, rows, lora=LoraConfig(r=4), remat=remat, mesh=mesh, compile=False)
        for name in ("mesh", "hbm_bytes_per_chip", "flops_per_token", "tokens_per_step", "step_time_s", "host"):
            assert getattr(found[number], name) == getattr(by_itself, name), name
    times = {variant.remat: plan.step_time_s["compute"] for variant, plan in zip(asked, found, strict=True)}
    assert sorted(times, key=lambda remat: times[remat])[0] == "dots"
    assert times["offload"] == times["projections"] < times["attention"] < times["block"] < times["nested"]


@pytest.mark.long
def test_a_choice_for_a_slice_is_compiled():
    """A block keeps its arrays in the host's memory, by the compiler's count and by the estimate."""
    found = choose(CONFIG, "v5e-4", 128, lora=LoraConfig(r=4), remat="offload", mesh=MeshShape())
    assert (found.compiled, found.fits) == (True, True)
    assert (found.settings["remat"], found.mesh) == ("offload", {"data": 1, "fsdp": 4, "tensor": 1})
    assert [one["compiled"] for one in found.chosen["compiled"]] == [True]
    assert found.chosen["why"].startswith(
        "remat=offload, mesh data=1 fsdp=4 tensor=1, 1 rows a device (global batch 4), "
    )
    (estimate,) = variants(
        CONFIG, slice_of("v5e-4"), 128, [Variant("offload", MeshShape(), 1)], {"lora": LoraConfig(r=4)}
    )
    assert 0.5 < found.host["kept_bytes"] / estimate.host["kept_bytes"] < 8  # heads of 16 numbers are padded to 128
    assert found.step_time_s["host"] > 0


def test_settings_are_chosen_for_known_chips_only():
    with pytest.raises(ConfigError, match="slice cpu-4: settings are chosen for the chips in"):
        choose(CONFIG, "cpu-4", 128)
