"""What all ranks learn of a step two steps later: votes to leave, and losses that are not finite."""

import jax.numpy as jnp
import pytest

from kithara_ray.errors import TrainingError
from kithara_ray.orchestration.worker.votes import GO_ON, INTERRUPT, MAX_SKIPPED_IN_A_ROW, PREEMPTED, Outcomes
from kithara_ray.sharding.agree import Ballot
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.sharding.shape import MeshShape

NAN, ONE = jnp.float32("nan"), jnp.float32(1)


@pytest.fixture(scope="module")
def ballot():
    return Ballot(make_mesh(MeshShape(fsdp=2, tensor=2)))


def outcomes(ballot, on_nan="stop"):
    skipped = []
    made = Outcomes(ballot, on_nan, lambda step: [100 * step, 7], lambda step, rows: skipped.append((step, rows)))
    return made, skipped


def test_the_highest_vote_is_taken_once(ballot):
    made, _ = outcomes(ballot)
    for step, vote in enumerate((GO_ON, INTERRUPT, PREEMPTED, GO_ON), 1):
        made.cast(step, vote, {"loss": ONE, "grad_norm": ONE})
    assert made.look(-1) == GO_ON
    # A look at a logged step leaves votes for the look at which all ranks decide.
    assert made.look(4, take_votes=False) == GO_ON
    assert made.look(2) == INTERRUPT
    assert made.look(4) == PREEMPTED
    assert made.look(4) == GO_ON


@pytest.mark.parametrize("bad", [{"loss": NAN, "grad_norm": ONE}, {"loss": ONE, "grad_norm": jnp.float32("inf")}])
def test_what_is_not_finite_stops_by_its_rows(ballot, bad):
    made, _ = outcomes(ballot)
    made.cast(1, GO_ON, {"loss": ONE, "grad_norm": ONE})
    made.cast(2, GO_ON, bad)
    assert made.look(1) == GO_ON
    with pytest.raises(TrainingError, match=r"step 2: .* the batch holds rows 200, 7 of the dataset"):
        made.look(2)


def test_skipped_steps_are_told_and_ten_in_a_row_end_the_run(ballot):
    made, skipped = outcomes(ballot, "skip")
    for step in range(1, MAX_SKIPPED_IN_A_ROW + 3):
        made.cast(step, GO_ON, {"loss": ONE if step == 2 else NAN, "grad_norm": ONE})
    made.look(MAX_SKIPPED_IN_A_ROW + 1)
    assert skipped[0] == (1, [100, 7])
    assert len(skipped) == MAX_SKIPPED_IN_A_ROW
    with pytest.raises(TrainingError, match="so were 10 steps in a row"):
        made.look(MAX_SKIPPED_IN_A_ROW + 2)
