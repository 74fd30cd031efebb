"""A JupyterLab that serves a copy of the notebooks, and a browser to look at it with."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
BROWSER_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    # The browser too finds nobody but this machine, so that a page cannot lean on the network.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


# Not for the whole session: while playwright is up, no other test can run an event loop of its own.
@pytest.fixture(scope="module")
def browser():
    """Start Debian's chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("No chromium on this machine: 'apt-get install chromium' makes this test run.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Serve the notebooks to this machine alone; yield the address and the token."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", home / "notebooks")
    settings = home / "config" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, token = f"http://127.0.0.1:{port}", secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home}"]
    command += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(
            command, env=_environment(home), stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_for_answer(f"{url}/api/status?token={token}", server, home / "log")
        yield url, token
    finally:
        _stop(server)


def _environment(home: Path) -> dict:
    """Return an environment with all of Jupyter's folders in `home`, and no way to the network."""
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    ours = {name: str(home / folder) for name, folder in folders.items()}
    for proxy in ("http_proxy", "https_proxy"):
        ours[proxy] = ours[proxy.upper()] = "http://127.0.0.1:9"  # nobody answers there
    ours["no_proxy"] = ours["NO_PROXY"] = "127.0.0.1,localhost"
    # The copies of the notebooks are to import this checkout's `support`.
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    ours["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # A reader sees the progress bars, so here they are not silenced.
    return {k: v for k, v in os.environ.items() if k != "COURSE_QUIET"} | ours


def _wait_for_answer(address: str, server: subprocess.Popen, log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            direct.open(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start. The end of its log:\n{log.read_text()[-3000:]}")


def _stop(server: subprocess.Popen) -> None:
    """End the server, which ends its kernels on the way; kill it if it does not go."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
