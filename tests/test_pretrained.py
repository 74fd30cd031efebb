"""Loading and exporting: what is absent, does not fit, or asks for what our models do not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import data, pretrained
from support.data import DataError
from support.gpt import GPTConfig, GPTModel
from support.llama import LlamaConfig, LlamaModel
from support.names import ARCHITECTURES, GGUF_NAMES, plan
from support.pretrained import export, load
from support.tokenizer import BPETokenizer

ROOT = Path(__file__).resolve().parents[1]
GPT = GPTConfig(300, 16, d_model=32, n_heads=4, n_layers=2, dropout=0.1)
LLAMA = LlamaConfig(300, 16, 48, 6, 2, n_layers=2, d_ff=80, rope_base=700.0, eps=0.03)
TEXT = "low lower lowest 12 x\n\n3 newest" * 9


def build(config):
    torch.manual_seed(0)
    model = (GPTModel if isinstance(config, GPTConfig) else LlamaModel)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(params=[GPT, LLAMA], ids=["gpt2", "llama"])
def folder(request, tmp_path):
    """A whole model on disk."""
    tokenizer = BPETokenizer.train(TEXT, 300, ["<|endoftext|>", "<pad>"])
    export(build(request.param), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gpt(tmp_path):
    export(build(GPT), BPETokenizer.train(TEXT, 300, ["<|endoftext|>"]), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def llama(tmp_path):
    export(build(LLAMA), None, tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# ---- out and in again ---------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_gpt_comes_back(tmp_path, tie_weights, qkv_bias):
    config = GPTConfig(300, 16, 32, 4, 2, 0.1, qkv_bias, tie_weights)
    check_comes_back(build(config), tmp_path)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("g", [1, 2, 6])
def test_llama_comes_back(tmp_path, tie_weights, g):
    config = LlamaConfig(300, 16, 48, 6, g, 2, 80, 700.0, 0.03, tie_weights)
    check_comes_back(build(config), tmp_path)


def check_comes_back(model, folder):
    tokenizer = BPETokenizer.train(TEXT, 300, ["<|endoftext|>", "<pad>"])
    export(model, tokenizer, folder)
    again, same_tokenizer = load(str(folder))
    assert again.config == model.config
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert (again.head.weight is again.tok_emb.weight) == model.config.tie_weights
    assert all(p.requires_grad and p.is_contiguous() for p in again.parameters())
    for part in ("vocab", "merges", "special_tokens", "pattern"):
        assert getattr(same_tokenizer, part) == getattr(tokenizer, part)
    assert same_tokenizer.eos_token == "<|endoftext|>"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    export(again, same_tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_every_parameter_has_a_name_elsewhere():
    for architecture, config in zip(ARCHITECTURES.values(), (GPT, LLAMA), strict=True):
        config.tie_weights = False
        model = build(config)
        config.tie_weights = True
        tables = [architecture.names, GGUF_NAMES] if config is LLAMA else [architecture.names]
        for names in tables:
            found = [part for parts in plan(model, names).values() for part in parts]
            assert sorted(found) == sorted(name for name, _ in model.named_parameters())


def test_an_export_that_stops_leaves_no_broken_model(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(pretrained, "save_file", full_disk)
        export(build(GPT), None, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "replace", full_disk)
        export(build(GPT), None, folder)
    with pytest.raises(DataError, match="a folder that has a config.json"):
        load(folder)


def test_an_older_tokenizer_does_not_stay(gpt):
    export(build(GPT), None, gpt)
    assert load(gpt)[1] is None
    assert sorted(path.name for path in gpt.iterdir()) == ["config.json", "model.safetensors"]


def test_vocab_and_merges_alone(gpt):
    file = json.loads((gpt / "tokenizer.json").read_text())["model"]
    (gpt / "vocab.json").write_text(json.dumps(file["vocab"]))
    lines = ["#version: 0.2", *map(" ".join, file["merges"])]
    (gpt / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    want = load(gpt)[1]
    (gpt / "tokenizer.json").unlink()
    found = load(gpt)[1]
    for part in ("vocab", "merges", "special_tokens", "pattern", "eos_token"):
        assert getattr(found, part) == getattr(want, part)


# ---- weights that do not fit --------------------------------------------------------------------


def test_every_tensor_that_does_not_fit_is_named(gpt):
    path = gpt / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.h.1.ln_2.bias"], weights["transformer.wpe.weight"]
    weights["transformer.h.0.attn.c_attn.weight"] = torch.zeros(96, 32)  # not turned
    weights["transformer.h.2.ln_1.weight"] = torch.zeros(32)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit") as error:
        load(gpt)
    assert str(error.value).splitlines()[1:] == [
        "wpe.weight is missing: expected (16, 32)",
        "h.0.attn.c_attn.weight: expected (32, 96), found (96, 32)",
        "h.1.ln_2.bias is missing: expected (32,)",
        "h.2.ln_1.weight is unexpected: found (32,)",
    ]


def test_a_shard_that_is_missing_or_cut_off(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {"a.safetensors": {}, "b.safetensors": {}}
    for i, name in enumerate(weights):
        halves["ab"[i % 2] + ".safetensors"][name] = weights[name]
    for name, half in halves.items():
        save_file(half, folder / name, {"format": "pt"})
    index = {name: file for file, half in halves.items() for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert load(folder)[0].config in (GPT, LLAMA)
    cut = folder / "b.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(ValueError, match="b.safetensors is not a whole safetensors file"):
        load(folder)
    cut.unlink()
    with pytest.raises(DataError, match="b.safetensors is not there"):
        load(folder)


def test_a_pickle_is_never_read(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="weights in a pickle .* are never read"):
        load(folder)


# ---- what our models do not have ----------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"n_inner": 100},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"attn_pdrop": 0.3},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_gpt2_that_ours_is_not(gpt, setting):
    change(gpt / "config.json", **setting)
    ((key, value),) = setting.items()
    with pytest.raises(ValueError, match=f"says {key}={value!r}: our models only know"):
        load(gpt)


@pytest.mark.parametrize(
    "setting",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"head_dim": 32},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 700.0, "factor": 8.0}},
        {"rope_parameters": {"rope_theta": 700.0, "partial_rotary_factor": 0.5}},
        {"sliding_window": 8},
        {"quantization_config": {"bits": 4}},
        {"model_type": "mistral"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_llama_that_ours_is_not(llama, setting):
    change(llama / "config.json", **setting)
    key = {"rope_parameters": "rope_"}.get(*2 * list(setting))
    with pytest.raises(ValueError, match=key or "partial_rotary_factor"):
        load(llama)


@pytest.mark.parametrize(
    ("part", "setting", "said"),
    [
        ("", {"normalizer": {"type": "NFC"}}, "asks for 'normalizer'"),
        ("", {"pre_tokenizer": {"type": "Whitespace"}}, "by a rule .*Whitespace"),
        ("", {"pre_tokenizer": None}, "cuts text by a rule"),
        ("", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "by a rule"),
        ("model", {"type": "Unigram"}, "is a Unigram tokenizer"),
        ("model", {"ignore_merges": True}, "asks for 'ignore_merges'"),
        ("model", {"byte_fallback": True}, "asks for 'byte_fallback'"),
    ],
)
def test_a_tokenizer_that_ours_is_not(gpt, part, setting, said):
    path = gpt / "tokenizer.json"
    file = json.loads(path.read_text())
    (file[part] if part else file).update(setting)
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=said):
        load(gpt)


def test_a_pattern_without_a_name_is_not_exported(tmp_path):
    plain = BPETokenizer.train(TEXT, 300)
    odd = BPETokenizer(plain.vocab, plain.merges, {}, r"\S+|\s+")
    with pytest.raises(ValueError, match="no name for the pattern"):
        export(build(GPT), odd, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- what is not there --------------------------------------------------------------------------


def test_no_such_model():
    with pytest.raises(DataError, match="'smollm3': name story, story-sft, smollm2-135m, gpt2"):
        load("smollm3")


def test_the_house_model_before_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "DATA", tmp_path)
    with pytest.raises(DataError, match="run `make pretrain`"):
        load("story")
    with pytest.raises(DataError, match="run `python -m support.house_sft`"):
        load("story-sft")
    export(build(GPT), None, tmp_path / "models" / "story")
    assert load("story")[0].config == GPT


def test_the_hub_without_a_network(tmp_path):
    script = "from support.pretrained import load\nload('gpt2')"
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, **closed, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "Could not fetch openai-community/gpt2 from huggingface.co" in last
    assert "load('smollm2-135m'), which needs none" in last


# ---- GGUF ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf():
    path = data.DATA / "cache" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("SmolLM2 is not in data/cache: run `make data`.")
    return path


@pytest.mark.parametrize("size", [0, 1000, 3_000_000, 50_000_000])
def test_a_gguf_file_that_is_cut_off(gguf, tmp_path, size):
    with gguf.open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(size))
    with pytest.raises(ValueError, match="cut.gguf is not a whole GGUF file"):
        load(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"llama.rope.freq_base", b"llama.rope.freq_bas_", "does not say llama.rope.freq_base"),
        (b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0qwen22", "ggml.pre='qwen22'"),
        (b"general.license", b"llama.new_trick", "asks for llama.new_trick"),
    ],
)
def test_a_gguf_file_of_another_kind(gguf, tmp_path, old, new, said):
    content = gguf.read_bytes()
    assert content.count(old) == 1
    (tmp_path / "other.gguf").write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "other.gguf")


def test_loading_smollm_needs_little_more_than_its_weights(gguf):
    script = """
import re
from support import data, pretrained
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
data.fetch("smollm2-135m")
before = memory("VmRSS")
model, _ = pretrained.load("smollm2-135m")
weights = sum(parameter.nbytes for parameter in model.parameters())
print((memory("VmHWM") - before) / weights)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("Peak memory is read from /proc.")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert 0.99 < float(done.stdout) <= 1.3
