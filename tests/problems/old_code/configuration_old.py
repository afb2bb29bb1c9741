"""Configurations as code for transformers 4 has them."""

from transformers import PretrainedConfig


class OldConfig(PretrainedConfig):
    model_type = "old"

    def __init__(
        self,
        vocab_size=30,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=24,
        rope_theta=500.0,
        rope_scaling=None,
        initializer_range=0.02,
        use_cache=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.initializer_range = initializer_range
        super().__init__(use_cache=use_cache, **kwargs)
