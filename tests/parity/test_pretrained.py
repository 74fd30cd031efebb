"""Weights that transformers writes, or reads too, give the same numbers in our models."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from support import data, pretrained
from support.generate import generate
from support.llama import LlamaConfig, LlamaModel
from support.names import CONV1D, plan
from support.tokenizer import BPETokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FAST = settings(deadline=None, max_examples=500, derandomize=True, database=None)
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
LEFT = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] * 8 + [1]]).bool()
GPT2 = {
    "vocab_size": 61,
    "n_positions": 16,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 3,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 16,
    "rms_norm_eps": 0.03,  # no default of either library, and large enough to show
    "rope_parameters": {"rope_theta": 700.0, "rope_type": "default"},
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS = {
    "gpt2": (transformers.GPT2Config, GPT2),
    "gpt2 untied": (transformers.GPT2Config, GPT2 | {"tie_word_embeddings": False}),
    "llama": (transformers.LlamaConfig, LLAMA | {"num_key_value_heads": 2}),
    "llama tied": (
        transformers.LlamaConfig,
        LLAMA | {"num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "llama multi-head": (transformers.LlamaConfig, LLAMA),
}


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def random_model(kind):
    """A model of transformers, far from its first state, where all logits are nearly equal."""
    config, options = KINDS[kind]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return theirs


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    """A random model of transformers, and ours with the weights that it saved."""
    theirs = random_model(request.param)
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = pretrained.load(tmp_path)
    assert tokenizer is None
    return theirs, ours


# ---- folders ------------------------------------------------------------------------------------


def test_logits_loss_and_gradients(pair):
    theirs, ours = pair
    ids = torch.randint(61, (3, 16))
    want, logits = theirs(ids, labels=ids), ours(ids)
    assert want.logits.std() > 0.5
    assert not ours.training
    same(logits, want.logits)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    same(loss, want.loss)
    loss.backward()
    want.loss.backward()
    architecture = pretrained.ARCHITECTURES[theirs.config.model_type]
    mine, compared = dict(ours.named_parameters()), 0
    for name, parts in plan(ours, architecture.names).items():
        name = name if name.startswith("lm_head") else architecture.prefix + name
        gradient = theirs.get_parameter(name).grad
        gradient = gradient.T if name.endswith(CONV1D) else gradient
        same(torch.cat([mine[part].grad for part in parts]), gradient)
        compared += len(parts)
    assert compared == len(mine)


@torch.no_grad()
def test_padding(pair):
    theirs, ours = pair
    ids = torch.randint(61, (3, 9))
    positions = (LEFT.long().cumsum(-1) - 1).clamp(min=0)
    want = theirs(ids, attention_mask=LEFT.long(), position_ids=positions).logits
    same(ours(ids, LEFT)[LEFT], want[LEFT])


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(pair, use_cache):
    theirs, ours = pair
    ids = torch.randint(61, (2, 4))
    want = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    assert torch.equal(generate(ours, ids, 12, temperature=0, use_cache=use_cache), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
    theirs = random_model("llama").to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours, _ = pretrained.load(tmp_path)
    ids = torch.randint(61, (3, 16))
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    load = transformers.AutoModelForCausalLM.from_pretrained
    same(ours(ids), load(tmp_path, dtype=torch.float32)(ids).logits)


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Without a prefix, and with the causal masks of that time among the weights."""
    from safetensors.torch import save_file

    theirs = random_model("gpt2")
    theirs.save_pretrained(tmp_path)
    weights = {
        name.removeprefix("transformer."): weight.contiguous()
        for name, weight in theirs.state_dict().items()
        if name != "lm_head.weight"
    }
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(3)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.randint(61, (3, 16))
    same(pretrained.load(tmp_path)[0](ids), theirs(ids).logits)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "gpt2 without biases", "llama"])
def test_transformers_loads_what_we_export(tmp_path, kind, tie_weights):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(300, 16, 48, 6, 2, 3, 80, 700.0, 0.03, tie_weights)
        ours = LlamaModel(config).eval()
    else:
        config = pretrained.ARCHITECTURES["gpt2"].config(300, 16, 32, 4, 3, 0.2)
        config.tie_weights, config.qkv_bias = tie_weights, kind == "gpt2"
        ours = pretrained.ARCHITECTURES["gpt2"].model(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    text = "low lower lowest 12 x\n\n3 newest" * 9
    tokenizer = BPETokenizer.train(text, 300, ["<|endoftext|>", "<pad>"])
    pretrained.export(ours, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(300, (3, 16))
    assert ours(ids).std() > 0.5
    same(theirs(ids).logits, ours(ids))
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert other.eos_token == "<|endoftext|>"
    assert (
        other.eos_token_id
        == theirs.config.eos_token_id
        == tokenizer.special_tokens["<|endoftext|>"]
    )
    for piece in (text, "a<|endoftext|> <pad>é😀  9\n\n  12", ""):
        assert other(piece).input_ids == tokenizer.encode(piece, "all")
        assert other.decode(tokenizer.encode(piece)) == piece


# ---- SmolLM2 ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder():
    if not (path := data.DATA / "cache" / "smollm2-135m" / NAME).exists():
        pytest.skip("SmolLM2 is not in data/cache: run `make data`.")
    return path.parent


@pytest.fixture(scope="session")
def smollm(folder):
    return pretrained.load("smollm2-135m")


@pytest.fixture(scope="session")
def their_smollm(folder):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, gguf_file=NAME, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def plain_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=NAME)


@pytest.fixture(scope="session")
def their_tokenizer(folder):
    """transformers' own, with the step that the file calls "smollm" and transformers leaves out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=NAME)
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


CHAT = [
    {"role": "user", "content": "Name three colors.\n\n"},
    {"role": "assistant", "content": "Red, green, blue."},
    {"role": "user", "content": "And 2 + 2?"},
]


@torch.no_grad()
def test_smollm_weights_and_logits(smollm, their_smollm):
    model, tokenizer = smollm
    assert model.head.weight is model.tok_emb.weight
    ids = torch.tensor([tokenizer.encode(pretrained.chat_prompt(CHAT), "all")])
    want, logits = their_smollm(ids).logits, model(ids)
    same(logits, want, 2e-4)  # of logits up to 30, after 30 blocks
    same(logits.log_softmax(-1).exp(), want.log_softmax(-1).exp(), 1e-5)
    parameters = dict(model.named_parameters())
    names = pretrained.ARCHITECTURES["llama"].names
    for theirs, (ours,) in plan(model, names).items():
        assert torch.equal(parameters[ours], their_smollm.get_parameter("model." + theirs)), theirs


def test_smollm_greedy_tokens(smollm, their_smollm):
    model, tokenizer = smollm
    ids = torch.tensor([tokenizer.encode(pretrained.chat_prompt(CHAT), "all")])
    want = their_smollm.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    stop = tokenizer.special_tokens[tokenizer.eos_token]
    assert torch.equal(generate(model, ids, 24, temperature=0, stop_id=stop), want)


fragments = st.lists(
    st.sampled_from(
        [*"aZé1٣½²!’'日ع😀 \n\t\u3000\x04\x1d", "  ", "\n\n", "12", "'ll", "<|im_end|>"]
    )
    | st.characters(exclude_categories=["Cs", "Cn"])
).map("".join)
CODE = "def f(x):\n\treturn {k: 10**2 for k, v in x.items() if 1}  # ok?\n\n\n    1\n  22 a  3"


@FAST
@given(fragments)
@example(CODE)
@example("a  1 \n\n2\n\n\n3 4\t 5   x\u30006")
@example("\x04a\x06\x13 \x14\x16b\x1d")
def test_smollm_ids(smollm, their_tokenizer, text):
    ids = smollm[1].encode(text, "all")
    assert ids == their_tokenizer(text).input_ids
    assert smollm[1].decode(ids) == their_tokenizer.decode(ids)


def test_smollm_ids_of_real_text(smollm, their_tokenizer, plain_tokenizer):
    if not (data.DATA / "cache" / "shakespeare" / "shakespeare.txt").exists():
        pytest.skip("Shakespeare is not in data/cache: run `make data`.")
    text = data.load_text("shakespeare")[:200_000]
    assert smollm[1].encode(text) == their_tokenizer(text).input_ids
    # Without white space before digits the two rules agree.
    assert smollm[1].encode(text) == plain_tokenizer(text).input_ids
    rng = random.Random(0)
    text = "".join(rng.choices([*"ab.é日'!", "12", " 7", "\n"], k=5000)).replace("\n1", "\n")
    assert smollm[1].encode(text) == their_tokenizer(text).input_ids


def test_smollm_special_tokens_only_when_allowed(smollm, their_tokenizer):
    _, tokenizer = smollm
    assert tokenizer.special_tokens == their_tokenizer.get_added_vocab()
    assert tokenizer.vocab_size == len(their_tokenizer) == 49_152
    ids = tokenizer.encode("a<|im_end|>")
    assert not {*ids} & {*tokenizer.special_tokens.values()}
    assert tokenizer.decode(ids) == "a<|im_end|>"


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize(
    "messages",
    [CHAT, CHAT[:1], [{"role": "system", "content": "Be\nbrief."}, *CHAT], CHAT[1:], []],
)
def test_chat_prompt(smollm, plain_tokenizer, messages, begin):
    text = pretrained.chat_prompt(messages, add_generation_prompt=begin)
    options = {"tokenize": False, "add_generation_prompt": begin}
    assert smollm[1].chat_template == plain_tokenizer.chat_template
    if messages:  # transformers refuses an empty conversation
        assert text == plain_tokenizer.apply_chat_template(messages, **options)
    else:
        assert text == ("<|im_start|>assistant\n" if begin else "")


def test_smollm_exported(smollm, their_tokenizer, tmp_path):
    model, tokenizer = smollm
    pretrained.export(model, tokenizer, tmp_path)
    again, same_tokenizer = pretrained.load(tmp_path)
    assert again.config == model.config
    pairs = zip(again.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for t in (same_tokenizer, other):
        assert (t.eos_token, t.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)
    assert same_tokenizer.encode(CODE + "<|im_end|>", "all") == other(CODE + "<|im_end|>").input_ids
    assert other(CODE).input_ids == their_tokenizer(CODE).input_ids
    want = pretrained.chat_prompt(CHAT)
    options = {"tokenize": False, "add_generation_prompt": True}
    assert other.apply_chat_template(CHAT, **options) == want
