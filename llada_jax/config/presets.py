"""The published architectures, as their config.json files state them."""

from collections.abc import Mapping
from typing import Any

# What every published LLaDA2.0 and 2.1 config.json says alike.
HF_CONSTANTS: Mapping[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 28,
    "moe_router_enable_expert_bias": True,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "output_router_logits": False,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
}

_PUBLISHED: Mapping[str, Any] = {
    "vocab_size": 157184,
    "pad_token_id": 156892,
    "eos_token_id": 156892,
    "mask_token_id": 156895,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rotary_dim": 64,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rope_theta": 600000,
    "max_position_embeddings": 32768,
}

_MINI = _PUBLISHED | {
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "moe_intermediate_size": 512,
}

_FLASH = _PUBLISHED | {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "moe_intermediate_size": 1024,
}

# The size our tests use: every part switched on, a few hundred thousand parameters.
_TINY: Mapping[str, Any] = {
    "vocab_size": 256,
    "pad_token_id": 252,
    "eos_token_id": 252,
    "mask_token_id": 255,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rope_theta": 600000,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": _TINY,
    "mini": _MINI,
    "mini-2.1": _MINI,
    "flash": _FLASH,
    "flash-2.1": _FLASH,
}
