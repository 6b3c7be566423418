"""Names and shapes of the tensors of a decoder of ours, from its description only: no jax, no keras."""

from collections.abc import Iterator

from kithara_ray.hf.tied_head import EMBEDDING, HEAD
from kithara_ray.model.decoder.description import XIELU, Attention, Block, Description, Experts, Mlp

# A tensor's dims: config.json's name for each, and its size.
Dims = tuple[tuple[str, int], ...]


def tensors_of(description: Description) -> Iterator[tuple[str, Dims]]:
    """Yield the name and the dims of every tensor."""
    vocabulary, hidden = ("vocab_size", description.vocabulary), ("hidden_size", description.hidden)
    yield EMBEDDING, (vocabulary, hidden)
    yield from _norm(f"model.{description.last_norm}", description.blocks[0].norm.bias, hidden)
    if not description.tied:
        yield HEAD, (vocabulary, hidden)
    if description.head_bias:
        yield HEAD.removesuffix("weight") + "bias", (vocabulary,)
    for number, block in enumerate(description.blocks):
        for name, dims in _block(block, hidden):
            yield f"model.layers.{number}.{name}", dims


def _norm(module: str, bias: bool, dim: tuple[str, int]) -> Iterator[tuple[str, Dims]]:
    yield f"{module}.weight", (dim,)
    if bias:
        yield f"{module}.bias", (dim,)


def _linear(module: str, out: tuple[str, int], into: tuple[str, int], bias: bool) -> Iterator[tuple[str, Dims]]:
    yield f"{module}.weight", (out, into)
    if bias:
        yield f"{module}.bias", (out,)


def _block(block: Block, hidden: tuple[str, int]) -> Iterator[tuple[str, Dims]]:
    for name in block.norms:
        yield from _norm(name, block.norm.bias, hidden)
    yield from _attention(block.attention, hidden)
    if isinstance(block.mlp, Experts):
        yield from _experts(block.mlp, block.mlp_name, hidden)
    else:
        yield from _mlp(block.mlp, block.mlp_name, hidden)


def _attention(attention: Attention, hidden: tuple[str, int]) -> Iterator[tuple[str, Dims]]:
    queries = ("num_attention_heads * head_dim", attention.heads * attention.head_dim)
    keys = ("num_key_value_heads * head_dim", attention.key_heads * attention.head_dim)
    outs = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    if attention.fused is not None:
        outs = {
            attention.fused: ("(num_attention_heads + 2 * num_key_value_heads) * head_dim", queries[1] + 2 * keys[1])
        }
    for name, out in outs.items():
        yield from _linear(f"self_attn.{name}", out, hidden, attention.bias)
    yield from _linear(f"self_attn.{attention.out_name}", hidden, queries, attention.out_bias)
    if attention.norm is not None:
        for name, whole in zip(attention.norm_names, (queries, keys), strict=True):
            width = whole if attention.norm_whole else ("head_dim", attention.head_dim)
            yield from _norm(f"self_attn.{name}", attention.norm.bias, width)


def _experts(experts: Experts, module: str, hidden: tuple[str, int]) -> Iterator[tuple[str, Dims]]:
    count, inner = ("number of experts", experts.count), ("width of an expert", experts.width)
    yield f"{module}.gate.weight", (count, hidden)
    yield f"{module}.{experts.correction}", tuple(("number of experts", size) for size in experts.correction_shape)
    for number in range(experts.count):
        for name in (experts.gate, experts.up):
            yield f"{module}.experts.{number}.{name}.weight", (inner, hidden)
        yield f"{module}.experts.{number}.{experts.down}.weight", (hidden, inner)
    if experts.shared is not None:
        yield from _mlp(experts.shared, f"{module}.shared_experts", hidden)


def _mlp(mlp: Mlp, module: str, hidden: tuple[str, int]) -> Iterator[tuple[str, Dims]]:
    inner = ("intermediate_size", mlp.width)
    if mlp.is_fused:
        yield from _linear(f"{module}.{mlp.up}", ("2 * intermediate_size", 2 * mlp.width), hidden, mlp.bias)
    else:
        for name in filter(None, (mlp.gate, mlp.up)):
            yield from _linear(f"{module}.{name}", inner, hidden, mlp.bias)
    yield from _linear(f"{module}.{mlp.down}", hidden, inner, mlp.bias)
    if mlp.activation == "xielu":
        for name, shape in XIELU.items():
            yield f"{module}.act_fn.{name}", tuple(("1", size) for size in shape)
