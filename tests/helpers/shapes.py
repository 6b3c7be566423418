"""Shapes of models that few numbers of chips divide evenly: their config.json with two blocks, and nothing else."""

_LLAMA_LIKE = dict(num_hidden_layers=2, rms_norm_eps=1e-6, tie_word_embeddings=True, dtype="bfloat16")
SHAPES = {
    # Biases of queries: (28, 128).
    "Qwen2.5-7B": dict(
        _LLAMA_LIKE, model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ),
    # An embedding and a head of 2,880 columns and an odd number of rows times 2^7.
    "gpt-oss-20b": dict(
        _LLAMA_LIKE, model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, vocab_size=201088, sliding_window=128, num_local_experts=32,
        num_experts_per_tok=4, swiglu_limit=7.0, attention_bias=True, tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "Qwen2.5-0.5B": dict(
        _LLAMA_LIKE, model_type="qwen2", hidden_size=896, intermediate_size=4864, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936,
    ),
    "SmolLM2-135M": dict(
        _LLAMA_LIKE, model_type="llama", hidden_size=576, intermediate_size=1536, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152,
    ),
}  # fmt: skip
