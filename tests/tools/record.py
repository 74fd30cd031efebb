"""What transformers' own modules compute with random weights, so that a notebook can compare.

Run `python tests/tools/record.py`, which writes `data/models/transformers.safetensors`. Appendix C
compares its parts with this file, and `tests/parity/test_modern.py` the file with transformers.
"""

import tempfile

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MixtralConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.llama import modeling_llama
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)

from support.data import DATA
from support.pretrained import load

PATH = DATA / "models" / "transformers.safetensors"
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "attn_implementation": "eager",
}
LLAMA = LlamaConfig(**SIZES, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
MISTRAL = MistralConfig(**SIZES | {"sliding_window": 3})
MIXTRAL = MixtralConfig(**SIZES | {"num_local_experts": 5, "num_experts_per_tok": 2})


def shaken(module: nn.Module) -> nn.Module:
    """Return a module with weights far from its first ones, so that each of them shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return module.eval()


def by_our_names(attention: nn.Module) -> dict[str, Tensor]:
    """Return the weights of an attention by our names: q_proj is W_q."""
    return {f"W_{name[0]}.weight": weight for name, weight in attention.state_dict().items()}


def experts(block: MixtralSparseMoeBlock) -> dict[str, Tensor]:
    """Return the weights of Mixtral's experts by our names; it keeps them in two tensors."""
    found = {"router.weight": block.gate.weight}
    inside = block.experts
    for i, (both, down) in enumerate(zip(inside.gate_up_proj, inside.down_proj, strict=True)):
        gate, up = both.chunk(2)
        found |= {f"experts.{i}.gate.weight": gate, f"experts.{i}.up.weight": up}
        found |= {f"experts.{i}.down.weight": down}
    return found


@torch.no_grad()
def record() -> dict[str, Tensor]:
    """Return weights by our names, an input and an output of each part, as part/name."""
    torch.manual_seed(0)
    x, positions = torch.randn(2, 7, 24), torch.arange(7)[None]
    turns = modeling_llama.LlamaRotaryEmbedding(LLAMA)
    found = {}

    def add(part, weights, given, output):
        found.update({f"{part}/{name}": weight for name, weight in weights.items()})
        found.update({f"{part}/input": given, f"{part}/output": output})

    norm = shaken(modeling_llama.LlamaRMSNorm(24, 1e-5))
    add("RMSNorm", norm.state_dict(), x, norm(x))
    q, far = torch.randn(2, 6, 7, 4), torch.randint(5000, (2, 7))
    add(
        "rotate",
        {"positions": far},
        q,
        modeling_llama.apply_rotary_pos_emb(q, q, *turns(q, far))[0],
    )
    mlp = shaken(modeling_llama.LlamaMLP(LLAMA))
    add("SwiGLU", {k.replace("_proj", ""): v for k, v in mlp.state_dict().items()}, x, mlp(x))
    causal = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    window = create_sliding_window_causal_mask(
        config=MISTRAL, inputs_embeds=x, attention_mask=None, past_key_values=None,
        position_ids=positions,
    )  # fmt: skip
    attention = shaken(modeling_llama.LlamaAttention(LLAMA, 0))
    sliding = shaken(MistralAttention(MISTRAL, 0))
    for part, module, mask in (("attention", attention, causal), ("window", sliding, window)):
        add(part, by_our_names(module), x, module(x, turns(x, positions), attention_mask=mask)[0])
    block = shaken(MixtralSparseMoeBlock(MIXTRAL))
    add("experts", experts(block), x, block(x))
    logits = torch.randn(50, 5)
    add("balancing", {}, logits, load_balancing_loss_func((logits,), 5, top_k=2))
    whole, ids = shaken(LlamaForCausalLM(LLAMA)), torch.randint(61, (2, 9))
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        ours, _ = load(folder)
    add("Llama", dict(ours.named_parameters()), ids, whole(ids).logits)
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


if __name__ == "__main__":
    save_file(record(), PATH)
