"""The one way from a rank to the head: what a rank reports, sends and waits for.

A run on a cluster has a `head.ray_channel.RayChannel`. Nothing else in a rank's loop knows that there is a cluster.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.orchestration.worker.heartbeat import Beat, Limits
from kithara_ray.sharding.gather import Shard

if TYPE_CHECKING:
    from kithara_ray.hf.exports.trained import TensorSlice

Event = dict[str, Any]
# Waits until the head has done with what was sent. Raises what the head raised.
Wait = Callable[[], None]


@dataclass(frozen=True)
class AdapterSpec:
    """The adapter that the shards of all ranks make up.

    Attributes:
        base: handle of the base.
        config: of the adapter.
        shapes: of every tensor, by name.
        num_ranks: how many ranks hold a part of it.
    """

    base: str
    config: LoraConfig
    shapes: Mapping[str, tuple[int, ...]]
    num_ranks: int


@dataclass(frozen=True)
class SnapshotPart:
    """One rank's shards of the adapter after a step.

    Attributes:
        destination: where the whole adapter of that step is written, a path or URL.
    """

    adapter: AdapterSpec
    step: int
    rank: int
    shards: Sequence[Shard]
    destination: str


@dataclass(frozen=True)
class WeightsSpec:
    """The trained weights that the slices of all ranks make up.

    Attributes:
        base: handle of the base that they were trained from; the head opens it on its own host.
        names: of the tensors.
        dtype: that they come in.
        directory: the run's; they are written into a new directory below it.
    """

    base: str
    names: Sequence[str]
    dtype: str
    directory: str


class Channel(Protocol):
    """A rank's end of it. Methods may be called from several threads."""

    @property
    def node_id(self) -> str:
        """The node that this process runs on, as the head names it."""

    def record(self, event: Event, wait: bool = False) -> None:
        """Report an event. With `wait`, return when the head has it; without, at once."""

    def beat(self, beat: Beat, limits: Limits) -> str | None:
        """Give a sign of life; returns what the head asks of all ranks. Raises where the head does not answer soon."""

    def is_draining(self) -> bool:
        """Whether the cluster has announced that the node of one of the ranks will go."""

    def put_shards(self, rank: int, shards: Sequence[Shard]) -> None:
        """Send what a rank holds of the trained adapter; returns when the head has it."""

    def put_snapshot(self, part: SnapshotPart) -> Wait:
        """Send what a rank holds of the adapter now. The wait ends when the head has written it, or has kept it for
        the other ranks' parts."""

    def begin_weights(self, weights: WeightsSpec) -> int:
        """Have the head make room for trained weights; returns the token that their slices are sent with."""

    def put_slices(self, token: int, slices: "Iterable[TensorSlice]") -> None:
        """Send slices of trained weights, a bounded number of them on the way; returns when the head has written all.

        Raises:
            ExportError: the token is of an attempt that is over, or a slice does not fit.
        """
