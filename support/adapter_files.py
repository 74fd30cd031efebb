"""An adapter on disk: a small file of its own, or a folder that the library peft reads and writes.

Neither holds a weight of the base model. Never a pickle, which could run code.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from support.data import write_atomic
from support.features import add_tensor
from support.lora import (
    LoRALayer,
    LoRALinear,
    adapted,
    adapter_names,
    linear_layers,
    put_adapter,
)
from support.names import ARCHITECTURES, refuse_all_but

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # the files of peft
PREFIX = "base_model.model."  # how its names begin

# What adapter_config.json may say and ours cannot vary: the values that we know.
ONLY = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "use_dora": [False],
    "use_rslora": [False],
    "lora_bias": [False],
}


def fingerprint(layers: Iterable[nn.Linear | LoRALinear]) -> str:
    """Return a hash of the layers' own weights, whatever adapters they have."""
    digest = hashlib.sha256()
    for layer in layers:
        add_tensor(digest, layer.weight)
    return digest.hexdigest()


def adapter_layers(model: nn.Module, name: str) -> dict[str, LoRALayer]:
    """Return an adapter's layers by name. Raises ValueError if there is no such adapter."""
    if name not in (names := adapter_names(model)):
        raise ValueError(f"There is no adapter {name!r}, only: {', '.join(names) or 'none'}.")
    return {p: m.adapters[name] for p, m in adapted(model).items() if name in m.adapters}


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Raises ValueError for another."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def refuse_shapes(tensors: dict[str, Tensor], wanted: dict[str, tuple], path) -> None:
    """Raise ValueError for the first tensor that has no place, or another shape than its place."""
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != wanted.get(key):
            place = f"is {wanted[key]}" if key in wanted else "has no place"
            raise ValueError(
                f"{path} holds {key} of shape {tuple(tensor.shape)}, which in this model {place}: "
                "load it onto the model that it was trained on."
            )


def save_adapter(
    model: nn.Module, path: str | Path, name: str = "default", also: Sequence[str] = ()
) -> None:
    """Write an adapter as safetensors, whole or not at all: A and B of each layer, no base weight.

    With it goes each layer's alpha, and a hash of the weights that it was trained beside.

    Args:
        also: names of modules to be stored whole, such as a new head.
    """
    adapters = adapter_layers(model, name)
    tensors = {f"{p}.{x}": getattr(a, x) for p, a in adapters.items() for x in "AB"}
    for module in also:
        tensors |= model.get_submodule(module).state_dict(prefix=f"{module}.")
    said = {"alpha": json.dumps({p: a.alpha for p, a in adapters.items()})}
    said["base"] = fingerprint(adapted(model)[p] for p in adapters)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_atomic(Path(path), save(tensors, said))


def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> nn.Module:
    """Put a stored adapter beside a model's layers, activate it, and return the model.

    Raises ValueError for a file that is damaged or no adapter, and for a model that has not the
    layers, the shapes or the weights that the adapter was trained beside.
    """
    tensors, said = read_tensors(path)
    if not {"alpha", "base"} <= said.keys():
        raise ValueError(f"{path} holds no adapter: write one with save_adapter.")
    alphas, found, own = json.loads(said["alpha"]), linear_layers(model), model.state_dict()
    if missing := [p for p in alphas if p not in found]:
        raise ValueError(f"{path} is for a model with a layer {missing[0]}: this one has none.")
    if cut := [key for p in alphas for key in (f"{p}.A", f"{p}.B") if key not in tensors]:
        raise ValueError(f"{path} is not whole: {cut[0]} is missing.")
    layers = {p: (tensors[f"{p}.A"].shape[-1], alpha) for p, alpha in alphas.items()}
    shapes = {key: tuple(own[key].shape) for key in tensors if key in own}
    for p, (rank, _) in layers.items():
        n_out, n_in = found[p].weight.shape
        shapes |= {f"{p}.A": (n_in, rank), f"{p}.B": (rank, n_out)}
    refuse_shapes(tensors, shapes, path)
    if fingerprint(found[p] for p in alphas) != said["base"]:
        raise ValueError(
            f"{path} was trained beside other weights than this model has: load it onto that base."
        )
    put_adapter(model, layers, name)
    with torch.no_grad():
        for key, tensor in tensors.items():
            p, _, last = key.rpartition(".")
            part = model.get_submodule(f"{p}.adapters.{name}" if p in layers else p)
            getattr(part, last).copy_(tensor)
    return model


# ---- the folders of peft ------------------------------------------------------------------------


def their_layers(model: nn.Module) -> tuple[str, dict[str, list[str]]]:
    """Return the kind of a language model, and for each layer of transformers' model our names.

    GPT-2's c_attn makes queries, keys and values at once, where we have three layers.
    """
    for kind, architecture in ARCHITECTURES.items():
        if type(model) is architecture.model:
            found = {}
            for theirs, ours in architecture.names.items():
                for i in map(str, range(len(model.blocks) if "*" in theirs else 0)):
                    parts = [part.replace("*", i) for part in ours.split()]
                    found[architecture.prefix + theirs.replace("*", i)] = parts
            return kind, found
    raise ValueError(f"peft's format is for GPTModel and LlamaModel, not {type(model).__name__}.")


def write_peft(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Write an adapter as the folder that `peft.PeftModel.from_pretrained(model, folder)` reads.

    Where several of our layers are one of theirs, their ranks add up: its B has a block for each.
    """
    folder, adapters, (kind, theirs) = (
        Path(folder),
        adapter_layers(model, name),
        their_layers(model),
    )
    found, tensors, ranks, alphas = linear_layers(model), {}, {}, {}
    for path, parts in theirs.items():
        if not (mine := [adapters[p] for p in parts if p in adapters]):
            continue
        ranks[path], scale = sum(a.rank for a in mine), mine[0].scale
        alphas[path] = scale * ranks[path]
        A = torch.cat([a.A.detach().T for a in mine])  # (their r, in)
        blocks = [  # a layer without an adapter has a block without columns
            adapters[p].B.detach().T * (adapters[p].scale / scale)
            if p in adapters
            else torch.empty(len(found[p].weight), 0)
            for p in parts
        ]
        for key, tensor in {"lora_A": A, "lora_B": torch.block_diag(*blocks)}.items():
            tensors[f"{PREFIX}{path}.{key}.weight"] = tensor.cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": min(ranks.values()),
        "lora_alpha": min(alphas.values()),
        "target_modules": list(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": kind == "gpt2",  # its Conv1D stores the weight as (in, out)
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # without it there is no adapter
    write_atomic(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_atomic(folder / CONFIG, json.dumps(config, indent=1).encode())


def read_peft(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """Put an adapter from a folder of peft's format beside a model's layers, and activate it.

    Where one of their layers is several of ours, each gets the same A and its own part of B.
    Raises ValueError for what we do not have, such as DoRA, and for tensors that do not fit.
    """
    folder, (_, theirs) = Path(folder), their_layers(model)
    said = json.loads((folder / CONFIG).read_bytes())
    refuse_all_but(said, folder / CONFIG, ONLY)
    tensors, _ = read_tensors(folder / WEIGHTS)
    found, layers, shapes, values = linear_layers(model), {}, {}, {}
    for path, parts in theirs.items():
        a, b = (f"{PREFIX}{path}.lora_{x}.weight" for x in "AB")
        if a not in tensors or b not in tensors:
            continue
        rank, rows = len(tensors[a]), [len(found[p].weight) for p in parts]
        shapes |= {a: (rank, found[parts[0]].weight.shape[1]), b: (sum(rows), rank)}
        patterns = (said.get("alpha_pattern") or {}).items()
        fits = (alpha for pattern, alpha in patterns if re.fullmatch(rf"(.*\.)?({pattern})", path))
        layers |= dict.fromkeys(parts, (rank, next(fits, said["lora_alpha"])))
        values |= {p: (a, b, slice(sum(rows[:i]), sum(rows[: i + 1]))) for i, p in enumerate(parts)}
    refuse_shapes(tensors, shapes, folder / WEIGHTS)
    put_adapter(model, layers, name)
    with torch.no_grad():
        for p, (a, b, mine) in values.items():
            adapter = model.get_submodule(p).adapters[name]
            adapter.A.copy_(tensors[a].T)
            adapter.B.copy_(tensors[b][mine].T)
    return model
