"""Real weights: read what others trained into our models, and write ours so that others read them.

Two kinds of files: GGUF, one file with everything, its numbers rounded to a few bits; and the
folders of Hugging Face, with config.json, model.safetensors and tokenizer.json. Never a pickle,
which could run code.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support.data import DATA, DataError, fetch
from support.llama import LlamaConfig, LlamaModel
from support.names import (
    ARCHITECTURES,
    CONV1D,
    GGUF_NAMES,
    GGUF_SETTINGS,
    plan,
    read_config,
    refuse_all_but,
    write_config,
)
from support.tokenizer import BPETokenizer
from support.tokenizer_files import (
    FILES,
    PretrainedTokenizer,
    end_of_text,
    gguf_tokenizer,
    read_tokenizer,
    tokenizer_files,
)

# What the course has trained itself, and what makes it anew.
HOUSE = {"story": "make pretrain", "story-sft": "python -m support.house_sft"}
HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# Old files also hold the causal mask and the rotations, which are no weights.
NO_WEIGHT = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


class Stored(NamedTuple):
    """A tensor in a file: its shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def load(name_or_path: str | Path) -> tuple[nn.Module, BPETokenizer | None]:
    """Return a pretrained model, in float32 and eval mode, and its tokenizer.

    Args:
        name_or_path: "story" (the house model), "story-sft" (it answers requests: chapter 7),
            "smollm2-135m", "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" (from the hub: needs a
            network the first time), a .gguf file of a llama, or a folder in Hugging Face's format.
            A folder without tokenizer files gives None as the tokenizer.

    Raises `DataError` for what is not there, and ValueError for files that do not fit together or
    ask for what our models do not have; it names each tensor that is missing or misshapen.
    """
    name = str(name_or_path)
    if name in HUB:
        return load_folder(download(name))[0], BPETokenizer.gpt2()
    path = DATA / "models" / name if name in HOUSE else Path(name_or_path)
    if name == "smollm2-135m":
        path = fetch(name)
    if path.suffix == ".gguf" and path.exists():
        return load_gguf(path)
    if (path / "config.json").exists():
        return load_folder(path)
    if name in HOUSE:
        raise DataError(f"{name} is not in {path}: run `{HOUSE[name]}` (an hour or two).")
    known = ", ".join([*HOUSE, "smollm2-135m", *HUB])
    raise DataError(f"No model {name!r}: name {known}, or a folder that has a config.json.")


def download(name: str) -> Path:
    """Return the folder with a model of the hub, from this computer's cache if it is there."""
    repository = f"openai-community/{name}"
    try:
        files = ["config.json", "model.safetensors"]
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # no network, no disk space, a proxy's refusal: many classes
        raise DataError(
            f"Could not fetch {repository} from huggingface.co ({type(error).__name__}): connect "
            "to a network once, or load('smollm2-135m'), which needs none."
        ) from error


def chat_prompt(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Return a conversation as SmolLM2 was taught to read it; encode it with special tokens.

    Args:
        messages: each {"role": "system", "user" or "assistant", "content": text}, in turn.
        add_generation_prompt: end where the assistant's answer begins.
    """
    if messages and messages[0]["role"] != "system":
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        messages = [{"role": "system", "content": system}, *messages]
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


# ---- tensors ------------------------------------------------------------------------------------


def fill(model_class: type, config, names: dict, stored: dict[str, Stored], source: Path):
    """Return a model with the stored tensors. Only one of them at a time is in memory twice."""
    with torch.device("meta"):  # shapes without memory
        model = model_class(config)
    parameters, places, problems = dict(model.named_parameters()), plan(model, names), []
    for theirs, ours in places.items():
        rows = sum(len(parameters[name]) for name in ours)
        shape = (rows, *parameters[ours[0]].shape[1:])
        shape = shape[::-1] if theirs.endswith(CONV1D) else shape
        if theirs not in stored:
            problems.append(f"{theirs} is missing: expected {shape}")
        elif stored[theirs].shape != shape:
            problems.append(f"{theirs}: expected {shape}, found {stored[theirs].shape}")
    unexpected = stored.keys() - places.keys()
    problems += [f"{name} is unexpected: found {stored[name].shape}" for name in sorted(unexpected)]
    if problems:
        raise ValueError(f"The tensors in {source} do not fit {config}:\n" + "\n".join(problems))
    # Room for all of them first: between weights that come and go, memory would be left in pieces.
    state = {name: torch.empty(parameter.shape) for name, parameter in parameters.items()}
    for theirs, ours in places.items():
        whole = stored[theirs].read()
        whole = whole.T if theirs.endswith(CONV1D) else whole
        parts = whole.split([len(parameters[name]) for name in ours])
        for name, part in zip(ours, parts, strict=True):
            state[name].copy_(part)  # as float32
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_weights:
        model.head.weight = model.tok_emb.weight
    return model.eval()


# ---- GGUF ---------------------------------------------------------------------------------------


class PlainReader(GGUFReader):
    """Reads slices of a plain array: slices of gguf's memory map take three times as long."""

    @property
    def data(self) -> np.ndarray:
        """The bytes of the file."""
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)


def load_gguf(path: Path) -> tuple[LlamaModel, PretrainedTokenizer]:
    """Return the llama-style model and its tokenizer in a GGUF file."""
    try:
        reader = PlainReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
    reader.fields.clear()  # they fill as much memory as a third of the weights
    if (kind := said["general.architecture"]) != "llama":
        raise ValueError(f"{path} is a {kind!r}: of GGUF files we read only llamas.")
    if missing := GGUF_SETTINGS.keys() - said.keys():
        raise ValueError(f"{path} does not say {min(missing)}.")
    config = LlamaConfig(
        **{ours: said.pop(theirs) for theirs, ours in GGUF_SETTINGS.items()},
        tie_weights=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )
    d_head = config.d_model // config.n_heads
    refuse_all_but(said, path, {"llama.rope.dimension_count": [d_head]})
    if more := [x for x in said if x.startswith("llama.") and x != "llama.rope.dimension_count"]:
        raise ValueError(f"{path} asks for {more[0]}={said[more[0]]}: our llama does not have it.")
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}

    def read(tensor):
        shape, dtype = tensor.data.shape, tensor.data.dtype
        packed = np.fromfile(path, dtype, tensor.data.size, offset=tensor.data_offset)
        parts = np.array_split(packed.reshape(shape), 1 + tensor.data.size // 2**20)
        weight = torch.cat([torch.from_numpy(dequantize(x, tensor.tensor_type)) for x in parts])
        if h := heads.get(tensor.name.split(".")[-2]):
            # GGUF's llama turns neighbors (2i, 2i + 1), ours (i, i + d/2): the rows change places.
            weight = weight.view(h, d_head // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
        return weight

    shapes = {tensor.name: tuple(tensor.shape[::-1].tolist()) for tensor in reader.tensors}
    stored = {t.name: Stored(shapes[t.name], partial(read, t)) for t in reader.tensors}
    model = fill(LlamaModel, config, GGUF_NAMES, stored, path)
    return model, gguf_tokenizer(said, path)


# ---- Hugging Face folders -----------------------------------------------------------------------


def load_folder(folder: Path) -> tuple[nn.Module, PretrainedTokenizer | None]:
    """Return the model and the tokenizer in a folder of Hugging Face's format."""
    path = folder / "config.json"
    said = json.loads(path.read_bytes())
    if (kind := said.get("model_type")) not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise ValueError(f"{path} says model_type={kind!r}: our models only know {known}.")
    architecture = ARCHITECTURES[kind]
    config = read_config(architecture, said, path)
    stored = {
        name.removeprefix(architecture.prefix): tensor
        for name, tensor in open_weights(folder).items()
        if not NO_WEIGHT.search(name)
        and not (config.tie_weights and name == "lm_head.weight")
        and not (said.get("qkv_bias") is False and name.endswith("c_attn.bias"))
    }
    model = fill(architecture.model, config, architecture.names, stored, folder)
    return model, read_tokenizer(folder)


def open_weights(folder: Path) -> dict[str, Stored]:
    """Return the tensors in a folder's safetensors files, by name; none is read yet."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / files[0]).exists():
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    stored = {}
    for path in (folder / file for file in files):
        if not path.exists():
            raise DataError(f"{path} is not there; weights in a pickle (.bin) are never read.")
        try:
            shard = safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        for name in shard.keys():  # noqa: SIM118 (it is no dictionary)
            shape = tuple(shard.get_slice(name).get_shape())
            stored[name] = Stored(shape, partial(shard.get_tensor, name))
    return stored


def export(model: nn.Module, tokenizer: BPETokenizer | None, folder: str | Path) -> None:
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load, and `load`.

    Files appear whole or not at all; config.json is the last, and without it there is no model.
    """
    folder = Path(folder)
    kind, architecture = next((k, a) for k, a in ARCHITECTURES.items() if type(model) is a.model)
    texts = tokenizer_files(tokenizer) if tokenizer else {}
    end = tokenizer.special_tokens.get(end_of_text(tokenizer)) if tokenizer else None
    texts["config.json"] = write_config(kind, model.config, end)
    parameters, tensors = dict(model.named_parameters()), {}
    for theirs, ours in plan(model, architecture.names).items():
        whole = torch.cat([parameters[name].detach().cpu() for name in ours])
        whole = whole.T.contiguous() if theirs.endswith(CONV1D) else whole
        tensors[theirs if theirs.startswith("lm_head") else architecture.prefix + theirs] = whole
        if theirs.endswith("c_attn.weight") and not model.config.qkv_bias:
            bias = theirs.replace("weight", "bias")
            tensors[architecture.prefix + bias] = torch.zeros(whole.shape[1])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as temporary:
        incoming = Path(temporary)
        save_file(tensors, incoming / "model.safetensors", {"format": "pt"})
        for name, content in texts.items():
            (incoming / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for name in ("config.json", "model.safetensors.index.json", *FILES):
            (folder / name).unlink(missing_ok=True)  # of an older model
        for name in ("model.safetensors", *texts):
            os.replace(incoming / name, folder / name)
