"""What the tests let several processes do at once; each is a rank, as torchrun would make it."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import small_run
import torch
import torch.distributed as dist
from small_run import config, data, small_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from support.parallel import data_parallel, held_bytes, processes, shard
from support.train import evaluate, make_optimizer, train, train_step

EVALUATIONS = [data(500), data(501), data(502)]  # three batches for two processes


def together(function: Callable, *arguments, n: int = 2, timeout: float = 240) -> list:
    """Call a function in n processes that know of each other; return what each returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.train", "torch.distributed.fsdp"])
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env |= {"WORLD_SIZE": str(n), "COURSE_QUIET": "1"}
    ranks = [
        context.Process(target=be, args=(env | {"RANK": str(rank)}, queue, function, *arguments))
        for rank in range(n)
    ]
    for process in ranks:
        process.start()
    try:
        found = dict(queue.get(timeout=timeout) for _ in ranks)
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    return [found[rank] for rank in range(n)]


def be(env: dict, queue, function: Callable, *arguments) -> None:
    """Be one of several processes, and hand on what the function returns."""
    os.environ.update(env)
    torch.set_num_threads(1)
    with processes(torch.device("cpu")) as (rank, _):
        queue.put((rank, function(*arguments)))
        dist.barrier()


def random_model() -> nn.Module:
    """Return a model in float64, where another order of a sum hardly shows."""
    model = small_model().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def one_step(model: nn.Module) -> tuple[dict, dict]:
    """Let a model make a step; return its weights, as they lie here, and the bytes they take."""
    optimizer = make_optimizer(model, config())
    train_step(data_parallel(model), optimizer, data(0), 0, config())
    held = held_bytes(model, optimizer)
    evaluate(model, EVALUATIONS)
    parts = {name: getattr(p, "to_local", lambda p=p: p)() for name, p in model.named_parameters()}
    return {name: part.detach().numpy() for name, part in parts.items()}, held


def several_runs(folder: Path, exact: dict, broken_off: dict) -> dict:
    """Train in several ways, and return what can be seen only where the processes are."""
    found = {}
    small_run.main(folder / "two", **exact)
    small_run.main(folder / "sharded", sharded=True, **exact)
    small_run.main(folder / "never", sharded=True, **broken_off)
    small_run.main(folder / "stopped", sharded=True, stop_at=4, **broken_off)
    small_run.main(folder / "stopped", sharded=True, **broken_off)

    torch.manual_seed(7 + dist.get_rank())  # each begins with other weights
    model = shard(random_model())
    found["parts"], found["held"] = one_step(model)
    gathered = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    found["gathered"] = {name: weight.numpy() for name, weight in gathered.items()}
    found["held by two"] = one_step(random_model())[1]
    found["evaluated"] = evaluate(shard(small_model()), EVALUATIONS)
    one_row = [tuple(tensor[:1] for tensor in data(0))]
    for name, options in {"sample": {"sample": str}, "rows": {"evaluations": one_row}}.items():
        try:
            train(shard(small_model()), data, config(steps=5), **options)
        except ValueError as error:
            found[name] = str(error)
    return found
