"""LoRA equals peft: outputs, gradients, merged weights, the count of what learns, and its files."""

import json

import peft
import pytest
import torch
import transformers
from torch import nn

from support.adapter_files import load_adapter, read_peft, save_adapter, their_layers, write_peft
from support.gpt import GPTConfig, GPTModel
from support.llama import LlamaConfig, LlamaModel
from support.lora import (
    LoRALayer,
    LoRALinear,
    adapted,
    add_adapter,
    count_learning,
    merge_adapter,
    unwrap,
)
from support.pretrained import export

CONFIGS = {
    "gpt2": GPTConfig(61, 24, d_model=32, n_heads=4, n_layers=12),  # so that there is a block 1x
    "llama": LlamaConfig(61, 24, d_model=32, n_heads=4, n_kv_heads=2, n_layers=2, d_ff=48),
}
MODELS = {"gpt2": GPTModel, "llama": LlamaModel}
TARGETS = {
    "gpt2": ["W_q", "W_k", "W_v", "W_o", "ff.*"],
    "llama": ["attention.*", "ff.*"],
}
THEIRS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
PATTERNS = {  # an alpha and a rank of its own for some layers
    "gpt2": ({r"\d+.mlp.c_fc": 9}, {"c_attn": 2}),
    "llama": ({"up_proj": 9}, {"q_proj": 2}),
}
IDS = torch.tensor([[5, 9, 2, 7, 7, 1], [60, 0, 12, 3, 8, 8]])


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


def ours(kind, targets=None, rank=3, alpha=5.0):
    """Return a model with an adapter that does something."""
    torch.manual_seed(0)
    model = MODELS[kind](CONFIGS[kind]).eval()
    add_adapter(model, targets or TARGETS[kind], rank, alpha)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapted(model).values():
            nn.init.normal_(layer.adapters["default"].B, std=0.3)
    return model


def base(kind, folder):
    """Return transformers' model with the weights of `ours`, and no adapter."""
    torch.manual_seed(0)
    export(MODELS[kind](CONFIGS[kind]), None, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_one_layer_equals_pefts_in_everything():
    torch.manual_seed(0)
    linear = nn.Linear(20, 12)
    holder = nn.Sequential()
    holder.add_module("proj", linear)
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["proj"])
    weight = linear.weight.detach().clone()
    theirs = peft.get_peft_model(holder, config)
    layer = theirs.base_model.model.proj
    mine = LoRALinear(nn.Linear(20, 12))
    mine.linear.load_state_dict(layer.base_layer.state_dict())
    mine.adapters["default"], mine.active = LoRALayer(20, 12, 4, 10), "default"
    nn.init.normal_(layer.lora_B["default"].weight)
    with torch.no_grad():
        mine.adapters["default"].A.copy_(layer.lora_A["default"].weight.T)
        mine.adapters["default"].B.copy_(layer.lora_B["default"].weight.T)
    x = torch.randn(3, 7, 20)
    same(mine(x), theirs(x))
    for output in (mine(x), theirs(x)):
        output.pow(2).sum().backward()
    same(mine.adapters["default"].A.grad.T, layer.lora_A["default"].weight.grad, 1e-3)
    same(mine.adapters["default"].B.grad.T, layer.lora_B["default"].weight.grad, 1e-3)
    same(mine.adapters["default"].update(), layer.get_delta_weight("default"))
    assert layer.base_layer.weight.grad is None
    mine.merge()
    theirs.merge_adapter()
    same(mine.linear.weight, layer.base_layer.weight)
    assert not torch.allclose(mine.linear.weight, weight, atol=0.1)


def test_peft_reads_our_folder_and_answers_and_learns_as_we_do(kind, tmp_path):
    model = ours(kind)
    write_peft(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        base(kind, tmp_path / "base"), tmp_path / "adapter", is_trainable=True
    )
    same(model(IDS), theirs(IDS).logits)
    assert (model(IDS) - base(kind, tmp_path / "base")(IDS).logits).abs().max() > 0.1
    for logits in (model(IDS), theirs(IDS).logits):
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for path, parts in their_layers(model)[1].items():
        a, b = (gradients.get(f"base_model.model.{path}.lora_{x}.default.weight") for x in "AB")
        if a is None:
            continue
        rows, r = 0, 3
        for i, part in enumerate(parts):
            adapter = model.get_submodule(part).adapters["default"]
            mine = slice(i * r, (i + 1) * r)
            same(adapter.A.grad.T, a[mine])
            same(adapter.B.grad.T, b[rows : rows + adapter.B.shape[1], mine])
            rows += adapter.B.shape[1]
    merged = theirs.merge_and_unload()
    same(unwrap(merge_adapter(model))(IDS), merged(IDS).logits)
    export(model, None, tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for a, b in zip(merged.parameters(), again.parameters(), strict=True):
        same(a, b, 1e-6)


def test_we_read_what_peft_writes(kind, tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=THEIRS[kind],
        alpha_pattern=PATTERNS[kind][0],
        rank_pattern=PATTERNS[kind][1],
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base(kind, tmp_path / "base"), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    model = MODELS[kind](CONFIGS[kind]).eval()
    before = model(IDS)
    read_peft(model, tmp_path / "adapter", "from elsewhere")
    same(model(IDS), theirs(IDS).logits)
    assert (model(IDS) - before).abs().max() > 0.1
    write_peft(model, tmp_path / "back", "from elsewhere")  # and to and fro
    assert json.loads((tmp_path / "back/adapter_config.json").read_text())["fan_in_fan_out"] == (
        kind == "gpt2"
    )
    third = peft.PeftModel.from_pretrained(base(kind, tmp_path / "base"), tmp_path / "back")
    same(third(IDS).logits, theirs(IDS).logits)
    save_adapter(model, tmp_path / "ours.safetensors", "from elsewhere")
    torch.manual_seed(0)
    fresh = MODELS[kind](CONFIGS[kind]).eval()
    same(load_adapter(fresh, tmp_path / "ours.safetensors")(IDS), theirs(IDS).logits)


def test_some_of_the_queries_keys_and_values_will_do(tmp_path):
    model = ours("gpt2", ["W_q", "blocks.0.attention.W_v"])
    write_peft(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base("gpt2", tmp_path / "base"), tmp_path / "adapter")
    same(model(IDS), theirs(IDS).logits)


def test_as_many_numbers_learn_as_in_peft(tmp_path):
    model = ours("llama")
    config = peft.LoraConfig(r=3, target_modules=THEIRS["llama"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base("llama", tmp_path), config)
    learning, _ = theirs.get_nb_trainable_parameters()
    assert count_learning(model) == learning > 1000
    output_only = ours("gpt2", ["W_o", "ff.*"])
    config = peft.LoraConfig(r=3, target_modules=["c_proj", "c_fc"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(base("gpt2", tmp_path), config)
    assert count_learning(output_only) == theirs.get_nb_trainable_parameters()[0]


def test_a_forgotten_scale_would_be_found(tmp_path, monkeypatch):
    model = ours("llama")
    write_peft(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base("llama", tmp_path / "base"), tmp_path / "adapter")
    monkeypatch.setattr(LoRALayer, "scale", 1.0)  # instead of alpha / rank
    with pytest.raises(AssertionError):
        same(model(IDS), theirs(IDS).logits)


@pytest.mark.parametrize(
    ("field", "value"), [("use_dora", True), ("use_rslora", True), ("bias", "all")]
)
def test_what_we_do_not_have_is_refused(field, value, tmp_path):
    write_peft(ours("llama"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=field):
        read_peft(LlamaModel(CONFIGS["llama"]), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    write_peft(ours("llama"), tmp_path)
    wider = LlamaConfig(61, 24, d_model=64, n_heads=4, n_kv_heads=2, n_layers=2, d_ff=48)
    with pytest.raises(ValueError, match=r"of shape .*32.*, which in this model is .*64"):
        read_peft(LlamaModel(wider), tmp_path)
    with pytest.raises(ValueError, match="has no place"):
        read_peft(GPTModel(CONFIGS["gpt2"]), tmp_path)
    with pytest.raises(ValueError, match="not Sequential"):
        write_peft(add_adapter(nn.Sequential(nn.Linear(4, 4)), "0"), tmp_path)
