"""A random llama and an adapter of it, by numpy alone: files as transformers and PEFT write them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kithara_ray.hf.safetensors_file import read_array, read_header, write_arrays

HIDDEN, KEYS, INNER, VOCABULARY, LAYERS = 16, 8, 24, 32, 2
CONFIG = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    rope_theta=10000.0,
    tie_word_embeddings=False,
)


def shapes(prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    found = {f"{prefix}embed_tokens.weight": (VOCABULARY, HIDDEN), f"{prefix}norm.weight": (HIDDEN,)}
    found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for number in range(LAYERS):
        layer = f"{prefix}layers.{number}."
        found |= {f"{layer}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        found |= {f"{layer}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        found |= {f"{layer}self_attn.{name}_proj.weight": (KEYS, HIDDEN) for name in "kv"}
        found |= {f"{layer}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INNER)
    return found


def write(
    directory: Path,
    seed: int = 0,
    change: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
    prefix: str = "model.",
    **fields,
) -> Path:
    """`change` is given the tensors by name before they are written; `fields` are of config.json."""
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes(prefix).items()}
    change(tensors)
    directory.mkdir(parents=True)
    write_arrays(directory / "model.safetensors", tensors, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | fields))
    return directory


def tensors_of(directory: Path, name: str = "model.safetensors") -> dict[str, np.ndarray]:
    return {name: read_array(info) for name, info in read_header(directory / name)[0].items()}


def adapter(
    directory: Path,
    base: Path | str,
    rename: Callable[[str], str] = lambda name: name,
    target: str = "q_proj",
    **fields,
) -> Path:
    """Rank 2 on `target`; `rename` is given PEFT's name of each tensor."""
    rng, tensors, wide = np.random.default_rng(9), {}, {"q_proj": HIDDEN, "v_proj": KEYS}[target]
    for number in range(LAYERS):
        for kind, shape in (("A", (2, HIDDEN)), ("B", (wide, 2))):
            name = f"base_model.model.model.layers.{number}.self_attn.{target}.lora_{kind}.weight"
            tensors[rename(name)] = rng.normal(size=shape).astype(np.float32)
    directory.mkdir(parents=True)
    write_arrays(directory / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": [target]}
    config |= {"base_model_name_or_path": str(base), "revision": None, **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
