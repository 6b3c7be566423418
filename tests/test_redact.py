"""Secrets by the names and values of the environment, and by their own shape."""

import pytest

from kithara_ray.redact import redact, secret_values

ENV = {"HF_TOKEN": "canary-one", "WANDB_API_KEY": "canary-two", "AWS_SECRET_ACCESS_KEY": "canary", "HOME": "/home/me"}


def test_values_of_secret_variables():
    assert secret_values(ENV) == ["canary-one", "canary-two", "canary"]
    value = {"a": ["x canary-one y", 3, None], "b": {"c": "canary-two/home/me"}}
    assert redact(value, secret_values(ENV)) == {"a": ["x *** y", 3, None], "b": {"c": "***/home/me"}}


def test_secret_names_in_what_is_written():
    written = {"HF_TOKEN": "abc", "api_key": "def", "password": "x", "tokenizer_handle": "t", "tokens_per_s": "9"}
    hidden = {"HF_TOKEN": "***", "api_key": "***", "password": "***", "tokenizer_handle": "t", "tokens_per_s": "9"}
    assert redact(written, []) == hidden


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf_" + "a1B2" * 8, "***"),
        ("https://me:pass@host/x", "https://***@host/x"),
        ("gs://b/x?access_token=abc&y=1", "gs://b/x?access_token=***&y=1"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\ndef", "***"),
        ("ghp_" + "x" * 36, "***"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("s3://bucket/path@2/x", "s3://bucket/path@2/x"),
        ("model.safetensors.index.json", "model.safetensors.index.json"),
    ],
)
def test_shapes(text, expected):
    assert redact(text, []) == expected
