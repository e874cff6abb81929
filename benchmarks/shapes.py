"""Models of a known shape with random weights, for measuring speed without a checkpoint."""

from pathlib import Path
from typing import Any

import torch

from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.load import model_architecture

# Name -> config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
}
# Layers of SmolLM2-135M, Qwen3-0.6B and Gemma 3 270M as they are, fewer of them, over the vocabulary of SmolLM2's
# tokenizer: for comparing families on a CPU. Gemma has five layers with a window for one without.
_SMALL: dict[str, Any] = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
SHAPES |= {
    "llama-small": {
        **_SMALL,
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "qwen3-small": {
        **_SMALL,
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "gemma3-small": {
        **_SMALL,
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
    },
}
# The same with a window that is shorter than the benchmark's prompts.
SHAPES["gemma3-narrow"] = {**SHAPES["gemma3-small"], "sliding_window": 128}


def random_model(config: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> LanguageModel:
    """Return a model of that `config.json` with normal weights of deviation 0.02 and norms of 1."""
    architecture = model_architecture(config, Path(config["model_type"]))
    with torch.device("meta"):
        model: LanguageModel = architecture.Model(architecture.read_config(config)).to(dtype)
    model = model.to_empty(device=device).eval()
    draws = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1) if name.endswith("norm.weight") else weight.normal_(0, 0.02, generator=draws)
    init_buffers = getattr(model, "init_buffers", None)
    if init_buffers is not None:
        init_buffers(device)
    return model
