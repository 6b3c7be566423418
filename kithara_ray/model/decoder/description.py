"""Values that describe a decoder of ours: made from config.json, read by its layers; no jax, no keras.

    D  hidden width    N  query heads    K  key and value heads    H  head width    I  width inside an MLP    E  experts

A family is a function from config.json to a `Description`. The layers in `block` know no family.
"""

from dataclasses import dataclass

from kithara_ray.model.decoder.rope import Rotation


@dataclass(frozen=True)
class Norm:
    """A normalisation of the last dim, or of each head's.

    Attributes:
        kind: "rms", or "layer" (which subtracts the mean first).
        epsilon: added to the mean square.
        bias: True if a bias follows the weight.
        offset: added to the weight, 1.0 where the weights are stored around zero.
    """

    kind: str
    epsilon: float
    bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Attention:
    """One block's attention.

    Attributes:
        heads, key_heads, head_dim: N, K and H.
        scale: factor of the logits.
        rotation: None rotates nothing.
        window: number of tokens that a token sees, itself included; None sees all before it.
        norm: of queries and keys, at their heads' width.
        norm_whole: True to normalise queries (N * H) and keys (K * H) as wholes.
        norm_after_rotation: True to rotate first.
        norm_names: the norms' modules.
        bias, out_bias: of the projections to queries, keys and values; of the projection back.
        fused: the module that projects to queries, keys and values at once, or None.
        out_name: the module that projects back.
        growth: (beta, length) multiplies the query at position p of its sample by 1 + beta * log(1 + p // length); None
            leaves queries as they are.
    """

    heads: int
    key_heads: int
    head_dim: int
    scale: float
    rotation: Rotation | None
    window: int | None = None
    norm: Norm | None = None
    norm_whole: bool = False
    norm_after_rotation: bool = False
    norm_names: tuple[str, str] = ("q_norm", "k_norm")
    bias: bool = False
    out_bias: bool = False
    fused: str | None = None
    out_name: str = "o_proj"
    growth: tuple[float, int] | None = None

    @property
    def is_placed(self) -> bool:
        """True if positions count, and not only distances between them.

        Norms behind the rotation weigh rotated places.
        """
        return self.norm_after_rotation or self.growth is not None


@dataclass(frozen=True)
class Mlp:
    """One block's MLP: down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate.

    Attributes:
        width: I.
        activation: one of `ACTIVATIONS`.
        bias: of all its layers.
        gate, up, down: their modules. `gate` is None without a gate, and equal to `up` if one module computes both.
    """

    width: int
    activation: str
    bias: bool = False
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def is_fused(self) -> bool:
        return self.gate == self.up


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in an MLP's place. Each expert is gated.

    Attributes:
        count, chosen: E experts, and how many of them each token gets.
        width: I of each expert.
        activation: one of `ACTIVATIONS`.
        scores: "softmax" or "sigmoid" of the router's logits.
        correction, correction_shape: tensor, added to the scores for the choice only, and its shape.
        normalised: True to divide the chosen scores by their sum.
        floor: least divisor.
        factor: of the weighted sum.
        gate, up, down: each expert's modules.
        shared: an MLP that every token also gets, in the module `shared_experts`; None if there is none.
    """

    count: int
    chosen: int
    width: int
    activation: str
    scores: str
    correction: str
    correction_shape: tuple[int, ...]
    normalised: bool = True
    floor: float = 0.0
    factor: float = 1.0
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: Mlp | None = None


@dataclass(frozen=True)
class Block:
    """One decoder block: x + r * attention, then + r * MLP, with norms before and after each.

    Attributes:
        attention, mlp: its parts.
        mlp_name: the module of its MLP or mixture.
        norm: of all its norms.
        before_attention, after_attention, before_mlp, after_mlp: modules of the norms; None where there is none.
        parallel: the MLP reads the attention's normalised input, and both are added to x.
        residual: r, the factor of each part's output.
    """

    attention: Attention
    mlp: Mlp | Experts
    norm: Norm
    mlp_name: str = "mlp"
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False
    residual: float = 1.0

    @property
    def norms(self) -> tuple[str, ...]:
        """The modules of its norms."""
        names = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in names if name is not None)


@dataclass(frozen=True)
class Description:
    """A whole decoder.

    Attributes:
        vocabulary, hidden: V and D.
        blocks: in order.
        tied: True if the head is the token embedding.
        last_norm: the module of the norm behind the last block.
        embedding_scale: factor of the embedding.
        logit_scale: factor of the logits.
        logit_soft_cap: logits become cap * tanh(logits / cap); None leaves them.
        head_bias: True if the head has a bias.
    """

    vocabulary: int
    hidden: int
    blocks: tuple[Block, ...]
    tied: bool
    last_norm: str = "norm"
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    head_bias: bool = False


# transformers' names of activations that `layers.activate` computes.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "xielu")
# xIELU's tensors, in the order of its formula; transformers keeps the last two as buffers.
XIELU = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
