"""A GPT of transformers and ours with the same random weights."""

import pytest
import torch
from torch import nn

from support.gpt import GPTConfig, GPTModel


def copy_weights(theirs, ours: GPTModel) -> None:
    """Copy every weight of a GPT2LMHeadModel; it writes linear layers as (in, out)."""

    def put(mine: nn.Module, weight, bias=None):
        mine.weight.copy_(weight)
        if mine.bias is not None:
            mine.bias.copy_(bias)

    with torch.no_grad():
        gpt = theirs.transformer
        ours.tok_emb.weight.copy_(gpt.wte.weight)
        ours.embed.pos_emb.weight.copy_(gpt.wpe.weight)
        put(ours.ln, gpt.ln_f.weight, gpt.ln_f.bias)
        put(ours.head, theirs.lm_head.weight)
        for mine, block in zip(ours.blocks, gpt.h, strict=True):
            put(mine.ln1, block.ln_1.weight, block.ln_1.bias)
            put(mine.ln2, block.ln_2.weight, block.ln_2.bias)
            weights = block.attn.c_attn.weight.T.chunk(3)
            biases = block.attn.c_attn.bias.chunk(3)
            attention = mine.attention
            for i, linear in enumerate((attention.W_q, attention.W_k, attention.W_v)):
                put(linear, weights[i], biases[i])
            put(attention.W_o, block.attn.c_proj.weight.T, block.attn.c_proj.bias)
            put(mine.ff.up, block.mlp.c_fc.weight.T, block.mlp.c_fc.bias)
            put(mine.ff.down, block.mlp.c_proj.weight.T, block.mlp.c_proj.bias)


@pytest.fixture
def gpt_pair():
    """Return a function that builds (transformers' GPT-2, ours), both in eval mode."""
    transformers = pytest.importorskip("transformers")

    def build(seed=0, tie_weights=True, **shape):
        config = GPTConfig(61, 16, d_model=32, n_heads=4, n_layers=3, tie_weights=tie_weights)
        settings = transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.d_model,
            n_head=config.n_heads,
            n_layer=config.n_layers,
            tie_word_embeddings=tie_weights,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(seed)
        theirs = transformers.GPT2LMHeadModel(settings).eval()
        with torch.no_grad():  # far from its first state, where all logits are nearly equal
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        ours = GPTModel(config).eval()
        copy_weights(theirs, ours)
        return theirs, ours

    return build
