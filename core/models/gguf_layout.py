"""A family's GGUF files, as its architecture states them: names of tensors, and how llama.cpp changed them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# llama.cpp's name of a layer's tensor -> its name in the checkpoint, for a layer like Llama's.
LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class GgufLayout:
    """The GGUF files that llama.cpp writes of one architecture; the architecture's file exports one as GGUF."""

    architecture: str
    """`general.architecture`, which also begins the names of the metadata."""
    model_class: str
    """The name in `architectures` of config.json, by which transformers and vLLM find their own code."""
    layer: Mapping[str, str]
    """Names of a layer's tensors: llama.cpp's to the checkpoint's."""
    biases: tuple[str, ...] = ()
    """Those of them that have a bias besides."""
    permuted: bool = False
    """Whether the rows of q and k stand in the order of a rotation of neighbours."""
    norm_offset: float = 0.0
    """The number that llama.cpp added to the weights of all norms."""
    settings: Callable[[Callable[[str], Any]], Mapping[str, Any]] = lambda metadata: {}
    """Further fields of config.json, from a function that gives a metadata value by its name, or None."""
