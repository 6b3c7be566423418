"""The parts that a run begins with: a model without values, its data, its state and its compiled steps."""

import logging
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.fetch import fetch
from kithara_ray.hf.resizing.tables import resized
from kithara_ray.model.causal_lm import CausalLM, Frozen, Params, build
from kithara_ray.orchestration.data.batches import HostStream
from kithara_ray.orchestration.data.loading import training_batches
from kithara_ray.orchestration.data.unbounded import EndlessOrder
from kithara_ray.orchestration.data.unbounded_batches import EndlessStream
from kithara_ray.orchestration.worker.checkpointing import Saving, identity_of
from kithara_ray.orchestration.worker.evaluation import Evaluation
from kithara_ray.orchestration.worker.event_log import EventLog
from kithara_ray.orchestration.worker.spec import RunSpec
from kithara_ray.sft.batches.order import Order
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.train.optimizer import KerasOptimizer, OptaxOptimizer, is_elementwise
from kithara_ray.train.programs import ByLength
from kithara_ray.train.step import compile_step, initial_state

logger = logging.getLogger(__name__)

State = dict[str, Any]


@dataclass
class Parts:
    """A run's parts before any of them holds a value.

    Attributes:
        base: the base checkpoint, on this host.
        mesh: the mesh of all ranks' devices.
        data: the training batches.
        evaluation: the evaluation; None if the run has none.
        total_steps: number of steps of the whole run.
    """

    base: BaseCheckpoint
    mesh: Mesh
    model: CausalLM
    optimizer: KerasOptimizer | OptaxOptimizer
    data: HostStream | EndlessStream
    evaluation: Evaluation | None
    total_steps: int


def open_parts(spec: RunSpec, log: EventLog) -> Parts:
    """Fetch the base, build the model with shapes and no values, and open the data."""
    model, step = spec.model, spec.step
    with log.phase("fetch"):
        base = resized(BaseCheckpoint.open(fetch(model.base, log.fetched)), model.lora)
    with log.phase("build"):
        mesh = make_mesh(step.mesh)
        built = build(
            base.config,
            model.lora,
            mesh,
            model.precision,
            remat=step.remat,
            stack_factors=is_elementwise(*step.optimizer),
            quantize=model.quantize,
            train_weights=model.lora is None,
            router_aux_loss_coef=step.router_aux_loss_coef,
        )
        kind, value = step.optimizer
        optimizer = KerasOptimizer(value) if kind == "keras" else OptaxOptimizer(value)
    data = training_batches(spec.train, mesh, spec.platform)
    evaluation = Evaluation(spec.eval, mesh, spec.platform) if spec.eval is not None else None
    return Parts(base, mesh, built, optimizer, data, evaluation, _total_steps(spec, data.order))


def _total_steps(spec: RunSpec, order: Order | EndlessOrder) -> int:
    if spec.steps is not None:
        return spec.steps
    assert spec.epochs is not None
    assert isinstance(order, Order)  # a stream has no epochs
    return order.total_steps(spec.epochs)


def find_checkpoint(spec: RunSpec, rank: int, parts: Parts) -> Saving:
    """Find the newest of the run's checkpoints; all ranks call this."""
    assert spec.checkpointer is not None
    tensors = {f"params/{slot.key}": slot.names for slot in parts.model.adapter_slots}
    saving = Saving(spec.checkpointer, rank, spec.num_workers, tensors, spec.model.base)
    saving.look(lambda: identity_of(spec, parts.base, parts.data.order))
    if saving.step > parts.total_steps:
        logger.warning("the run already has %d steps; %d were asked for", saving.step, parts.total_steps)
    return saving


def load_state(spec: RunSpec, parts: Parts, saving: Saving | None, is_finished: bool) -> tuple[State, Frozen | None]:
    """Return (trained state, frozen weights). Each rank reads what its devices own, from a checkpoint if there is one.

    Args:
        is_finished: True if no step will be trained; the frozen weights are then left out.
    """
    model = parts.model
    if spec.model.lora is None:
        # A run that has ended needs the parameters too: a checkpoint is read into their place.
        params, frozen = model.as_params(model.load(parts.base)), []
    else:
        frozen = None if is_finished else model.load(parts.base)
        params = _factors(spec, model, frozen)
    state = initial_state(model, parts.optimizer, params)
    return (state if saving is None else saving.restore(state)), frozen


def _factors(spec: RunSpec, model: CausalLM, frozen: Frozen | None) -> Params:
    if spec.model.adapter is None:
        return model.initial_factors(spec.step.seed, frozen)
    return model.place_factors(spec.model.adapter)


def compile_steps(spec: RunSpec, parts: Parts, state: State, frozen: Frozen) -> ByLength:
    """Compile the step and, if there is one, the evaluation: a program for each length of a batch."""
    how = spec.step

    def compiled(batch: Any):
        given = (parts.model, parts.optimizer, state, frozen, batch)
        return compile_step(*given, how.micro_batches, how.seed, skip_nonfinite=how.on_nan == "skip")

    step = ByLength(compiled, parts.model, parts.data.order.batch_rows, parts.data.shapes)
    if parts.evaluation is not None:
        parts.evaluation.compile(parts.model, state["params"], frozen)
    return step
