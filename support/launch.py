"""torchrun from a notebook: several processes on this machine, and nothing left behind."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import psutil


def torchrun(
    *command: object,
    n: int = 2,
    max_restarts: int = 0,
    timeout: float = 500,
    watch: Callable[[list[psutil.Process]], None] | None = None,
) -> str:
    """Run `torchrun --standalone --nproc-per-node n command`, and return what it printed.

    The processes talk over the loopback, on ports that are free, and have one thread each.

    Args:
        command: a script with its arguments, or "-m" and a module with its arguments.
        max_restarts: how often all processes may be started anew because one has died.
        timeout: seconds until all of them are ended.
        watch: is called again and again with the processes that are running.

    Raises TimeoutError, and RuntimeError with the last lines of the errors if the run fails.
    """
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--local-addr=127.0.0.1", f"--nproc-per-node={n}", f"--max-restarts={max_restarts}"]
    line += map(str, command)
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    settings = {"OMP_NUM_THREADS": "1", "COURSE_QUIET": "1", "PYTHONUNBUFFERED": "1"}
    # Each start meets in a store of its own: in a shared one, workers that are started anew find
    # the addresses of those that died, and wait for them.
    settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if loopback:
        settings["GLOO_SOCKET_IFNAME"] = loopback[0]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        streams = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": errors}
        agent = psutil.Popen(line, env=os.environ | settings, **streams)
        end = time.monotonic() + timeout
        try:
            while agent.poll() is None:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"{_short(command)} has not ended within timeout={timeout:g} s and was "
                        "stopped: give it more, or look for a process that waits for another."
                    )
                if watch:
                    watch(agent.children())
                time.sleep(0.01)
        finally:
            _kill(agent)
        said.seek(0)
        errors.seek(0)
        if agent.returncode:
            own = re.sub(r"^[EW]\d{4} .*\n", "", errors.read(), flags=re.MULTILINE)
            own = own.rpartition("Traceback (most")[0]  # without torchrun's own, at the end
            last = "\n".join(own.splitlines()[-20:])
            raise RuntimeError(f"{_short(command)} ended with {agent.returncode}:\n{last}")
        return said.read()


def _kill(process: psutil.Process) -> None:
    """End a process, and first those that it has started and would start anew."""
    try:
        process.suspend()
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


def _short(command: Sequence[object]) -> str:
    return " ".join(map(str, command))
