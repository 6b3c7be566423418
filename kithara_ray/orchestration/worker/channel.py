"""The only way from a rank to the head: it carries a rank's reports, data and requests.

A run on a cluster has a `head.ray_channel.RayChannel`. Nothing else in a rank's loop knows about the cluster.
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
# Waits until the head has processed the data sent. Raises the head's error.
Wait = Callable[[], None]


@dataclass(frozen=True)
class AdapterSpec:
    """The adapter that the shards of all ranks make up.

    Attributes:
        base: handle of the base.
        config: the adapter's settings.
        shapes: shape of every tensor, by name.
        num_ranks: number of ranks that hold a part of it.
    """

    base: str
    config: LoraConfig
    shapes: Mapping[str, tuple[int, ...]]
    num_ranks: int


@dataclass(frozen=True)
class SnapshotPart:
    """One rank's shards of the adapter after a step.

    Attributes:
        destination: the path or URL to which the whole adapter of that step is written.
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
        base: handle of the base that training started from; the head opens it on its own host.
        names: names of the tensors.
        dtype: dtype in which the ranks send them.
        directory: the run's directory; the head writes them into a new directory below it.
    """

    base: str
    names: Sequence[str]
    dtype: str
    directory: str


class Channel(Protocol):
    """A rank's end of the channel. Several threads may call its methods."""

    @property
    def node_id(self) -> str:
        """Return the id of this process's node, as the head names it."""
        ...

    def record(self, event: Event, wait: bool = False) -> None:
        """Report an event. With `wait`, return when the head has it; without, return at once."""

    def beat(self, beat: Beat, limits: Limits) -> str | None:
        """Give a sign of life; return the head's request to all ranks. Raises if the head does not answer soon."""

    def is_draining(self) -> bool:
        """Return True if the cluster has announced that the node of one of the ranks will go."""
        ...

    def put_shards(self, rank: int, shards: Sequence[Shard]) -> None:
        """Send a rank's shards of the trained adapter; return when the head has them."""

    def put_snapshot(self, part: SnapshotPart) -> Wait:
        """Send a rank's shards of the current adapter. The returned wait ends when the head has written the adapter, or
        has kept this part until the other ranks' parts arrive."""
        ...

    def begin_weights(self, weights: WeightsSpec) -> int:
        """Have the head prepare for trained weights; return the token that their slices are sent with."""
        ...

    def put_slices(self, token: int, slices: "Iterable[TensorSlice]") -> None:
        """Send slices of trained weights, with a bounded number in flight; return when the head has written all.

        Raises:
            ExportError: the token is from an attempt that is over, or a slice does not fit.
        """
