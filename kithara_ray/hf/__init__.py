"""Hugging Face files: storage, base checkpoints, PEFT adapters, merge, export. No jax, keras, ray, torch."""
