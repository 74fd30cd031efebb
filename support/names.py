"""What others call the parts of our models: transformers in its folders, GGUF in its files."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from support.gpt import GPTConfig, GPTModel
from support.llama import LlamaConfig, LlamaModel

# What config.json may say and our models cannot vary: each value they know, the usual one first.
ONLY = {
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "reorder_and_upcast_attn": [False],
    "add_cross_attention": [False],
    "hidden_act": ["silu"],
    "attention_bias": [False],
    "attention_dropout": [0.0],
    "mlp_bias": [False],
    "rope_type": ["default"],
    "rope_scaling": [None],
    "sliding_window": [None],
    "quantization_config": [None],
}


class Architecture(NamedTuple):
    """How transformers calls what one of our models has; * is the number of a block."""

    model: type
    config: type
    prefix: str
    settings: dict  # name in config.json: (our name, what it is when it is absent)
    names: dict  # name of a tensor: ours; several of ours lie side by side in one of theirs


ARCHITECTURES = {
    "gpt2": Architecture(
        GPTModel,
        GPTConfig,
        "transformer.",
        {
            "vocab_size": ("vocab_size", 50_257),
            "n_positions": ("context_length", 1024),
            "n_embd": ("d_model", 768),
            "n_head": ("n_heads", 12),
            "n_layer": ("n_layers", 12),
            "resid_pdrop": ("dropout", 0.1),
            "qkv_bias": ("qkv_bias", True),  # our own: transformers always has these biases
            "tie_word_embeddings": ("tie_weights", True),
        },
        {
            "wte": "embed.tok_emb",
            "wpe": "embed.pos_emb",
            "h.*.ln_1": "blocks.*.ln1",
            "h.*.attn.c_attn": " ".join(f"blocks.*.attention.W_{x}" for x in "qkv"),
            "h.*.attn.c_proj": "blocks.*.attention.W_o",
            "h.*.ln_2": "blocks.*.ln2",
            "h.*.mlp.c_fc": "blocks.*.ff.up",
            "h.*.mlp.c_proj": "blocks.*.ff.down",
            "ln_f": "ln",
            "lm_head": "head",
        },
    ),
    "llama": Architecture(
        LlamaModel,
        LlamaConfig,
        "model.",
        {
            "vocab_size": ("vocab_size", 32_000),
            "max_position_embeddings": ("context_length", 2048),
            "hidden_size": ("d_model", 4096),
            "num_attention_heads": ("n_heads", 32),
            "num_key_value_heads": ("n_kv_heads", None),
            "num_hidden_layers": ("n_layers", 32),
            "intermediate_size": ("d_ff", 11_008),
            "rope_theta": ("rope_base", 10_000.0),
            "rms_norm_eps": ("eps", 1e-6),
            "tie_word_embeddings": ("tie_weights", False),
        },
        {
            "embed_tokens": "tok_emb",
            "layers.*.input_layernorm": "blocks.*.ln1",
            "layers.*.self_attn.q_proj": "blocks.*.attention.W_q",
            "layers.*.self_attn.k_proj": "blocks.*.attention.W_k",
            "layers.*.self_attn.v_proj": "blocks.*.attention.W_v",
            "layers.*.self_attn.o_proj": "blocks.*.attention.W_o",
            "layers.*.post_attention_layernorm": "blocks.*.ln2",
            "layers.*.mlp.gate_proj": "blocks.*.ff.gate",
            "layers.*.mlp.up_proj": "blocks.*.ff.up",
            "layers.*.mlp.down_proj": "blocks.*.ff.down",
            "norm": "ln",
            "lm_head": "head",
        },
    ),
}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 stores these as (in, out)

GGUF_SETTINGS = {
    "llama.vocab_size": "vocab_size",
    "llama.context_length": "context_length",
    "llama.embedding_length": "d_model",
    "llama.attention.head_count": "n_heads",
    "llama.attention.head_count_kv": "n_kv_heads",
    "llama.block_count": "n_layers",
    "llama.feed_forward_length": "d_ff",
    "llama.rope.freq_base": "rope_base",
    "llama.attention.layer_norm_rms_epsilon": "eps",
}
GGUF_NAMES = {
    "token_embd": "tok_emb",
    "blk.*.attn_norm": "blocks.*.ln1",
    "blk.*.attn_q": "blocks.*.attention.W_q",
    "blk.*.attn_k": "blocks.*.attention.W_k",
    "blk.*.attn_v": "blocks.*.attention.W_v",
    "blk.*.attn_output": "blocks.*.attention.W_o",
    "blk.*.ffn_norm": "blocks.*.ln2",
    "blk.*.ffn_gate": "blocks.*.ff.gate",
    "blk.*.ffn_up": "blocks.*.ff.up",
    "blk.*.ffn_down": "blocks.*.ff.down",
    "output_norm": "ln",
    "output": "head",
}


def plan(model: nn.Module, names: dict[str, str]) -> dict[str, list[str]]:
    """Return for each stored tensor our parameters in it; a tied head is stored only once."""
    parameters, found = dict(model.named_parameters()), {}
    for theirs, ours in names.items():
        for i in map(str, range(len(model.blocks) if "*" in theirs else 1)):
            for kind in ("weight", "bias"):
                parts = [f"{part}.{kind}".replace("*", i) for part in ours.split()]
                if parts[0] in parameters:
                    found[f"{theirs}.{kind}".replace("*", i)] = parts
    return found


def refuse_all_but(said: dict, path: Path, known: dict[str, list]) -> None:
    """Raise ValueError if a file gives a setting a value that our models do not know."""
    for key, values in known.items():
        if (value := said.get(key, values[0])) not in values:
            raise ValueError(f"{path} says {key}={value!r}: our models only know {values[0]!r}.")


def read_config(architecture: Architecture, said: dict, path: Path) -> GPTConfig | LlamaConfig:
    """Return our configuration for a config.json. Raises ValueError for what we do not have."""
    rope = said.get("rope_parameters") or {}  # newer files keep rope_theta in here
    said = said | rope
    found = {
        ours: said.get(theirs, default) for theirs, (ours, default) in architecture.settings.items()
    }
    if "n_kv_heads" in found:
        found["n_kv_heads"] = found["n_kv_heads"] or found["n_heads"]
    config = architecture.config(**found)
    only = ONLY | {
        "n_inner": [None, 4 * config.d_model],
        "head_dim": [None, config.d_model // config.n_heads],
        **dict.fromkeys(("embd_pdrop", "attn_pdrop"), [getattr(config, "dropout", 0.0)]),
    }
    refuse_all_but(said, path, only)
    if unknown := rope.keys() - {"rope_theta", "rope_type"}:
        raise ValueError(f"{path} asks for {min(unknown)} in rope_parameters: we do not have it.")
    return config


def write_config(kind: str, config: GPTConfig | LlamaConfig, end: int | None) -> dict:
    """Return config.json as transformers reads it; `end` is the id that ends a text."""
    settings = ARCHITECTURES[kind].settings.items()
    said = {theirs: getattr(config, ours) for theirs, (ours, _) in settings}
    if kind == "gpt2":
        said |= dict.fromkeys(("embd_pdrop", "attn_pdrop"), config.dropout)
    names = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
    said |= {"model_type": kind, "architectures": [names[kind]]}
    return said | {"bos_token_id": end, "eos_token_id": end}
