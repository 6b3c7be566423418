"""How long a sequence a base takes, as vLLM derives it from config.json."""

import pytest

from kithara_ray.hf.facts.positions import max_positions

CONFIGS = [
    ({}, None),
    ({"max_position_embeddings": 4096}, 4096),
    ({"n_positions": 1024}, 1024),
    ({"text_config": {"max_position_embeddings": 8192}, "max_position_embeddings": 1}, 8192),
    ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
    ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
    ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 8192),
    # Llama 3.1 writes the scaled length.
    (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        },
        131072,
    ),
    # Qwen2.5 with YaRN writes the length before scaling, DeepSeek and gpt-oss the scaled one.
    (
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
        },
        131072,
    ),
    # Transformers 5 keeps it in rope_parameters.
    ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 8192),
    ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 4096),
]


@pytest.mark.parametrize(("config", "expected"), CONFIGS)
def test_the_longest_sequence(config, expected):
    assert max_positions(config) == expected
