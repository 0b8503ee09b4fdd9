"""A real Triton on this machine, with the comparison's models by its Python backend, on a free port, for as long as it is needed."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import grpc

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = os.path.join(HERE, "models")
# The Python that Debian 12 has, and whose numpy the backend's helper process imports.
_PYTHON = "/usr/bin/python3.11"
_READY_S = 120
# What a repository holds that isn't served from the start.
NOT_LOADED = ("misspelt", "spare")


def _check_machine(home):
    if not os.path.exists(os.path.join(home, "pytriton/tritonserver/bin/tritonserver")):
        sys.exit(f"there is no Triton in {home}: run `python3 deploy/bootstrap/fetch.py triton`")
    tried = subprocess.run([_PYTHON, "-c", "import numpy"], capture_output=True, text=True, check=False) if os.path.exists(_PYTHON) else None
    if tried is None or tried.returncode != 0:
        sys.exit("Triton's Python backend needs Python 3.11 with numpy (Debian 12: apt-get install libpython3.11 python3-numpy)")


def _repository(folder):
    """The models with their twins; which backend runs them isn't written in the shared configurations."""
    for name in sorted(os.listdir(MODELS)):
        target = os.path.join(folder, name)
        shutil.copytree(os.path.join(MODELS, name), target)
        with open(os.path.join(target, "config.pbtxt"), "a", encoding="utf-8") as file:
            file.write('\nbackend: "python"\n')
        os.makedirs(os.path.join(target, "1"))
        shutil.copyfile(os.path.join(HERE, "twin.py"), os.path.join(target, "1", "model.py"))


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(home):
    """Yields the address of a Triton that serves every model but those of `NOT_LOADED`."""
    _check_machine(home)
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        repository, log = os.path.join(folder, "models"), os.path.join(folder, "log")
        os.makedirs(repository)
        _repository(repository)
        backends = os.path.join(folder, "backends")
        shutil.copytree(os.path.join(home, "pytriton/tritonserver/backends"), backends)
        stub = os.path.join(backends, "python", "triton_python_backend_stub")
        shutil.copyfile(os.path.join(home, "pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub"), stub)
        os.chmod(stub, 0o755)
        address = f"127.0.0.1:{_free_port()}"
        command = [
            os.path.join(home, "pytriton/tritonserver/bin/tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in sorted(os.listdir(MODELS)) if name not in NOT_LOADED),
            f"--grpc-port={address.rpartition(':')[2]}",
            "--grpc-address=127.0.0.1",
            "--allow-http=false",
            "--allow-metrics=false",
            "--cuda-memory-pool-byte-size=0:0",
        ]
        environment = dict(os.environ, LD_LIBRARY_PATH=os.path.join(home, "nvidia_pytriton.libs"))
        with open(log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_until_ready(address, process, log)
            yield address
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(address, process, log):
    """Returns when it answers; if it ends instead, so does this program, with Triton's own errors."""
    with grpc.insecure_channel(address) as channel:
        ready = grpc.channel_ready_future(channel)
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < _READY_S:
            with contextlib.suppress(grpc.FutureTimeoutError):
                return ready.result(timeout=1)
    with open(log, encoding="utf-8", errors="replace") as file:
        errors = [line for line in file if line.startswith(("E", "error"))]
    sys.exit("Triton did not start:\n" + "".join(errors))
