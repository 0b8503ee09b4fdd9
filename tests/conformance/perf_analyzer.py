#!/usr/bin/env python3
"""Runs Triton's load tool against a worker and a coordinator, in every way that it can ask. `make perf-analyzer` calls it.

The binary needs glibc 2.38. Where this system's is older, a Debian 13 in `.cresset/debian` serves (debootstrap, as root: 80 s,
214 MB, once); where that isn't possible this says so and ends well.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys

_HOME = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), ".cresset")
_DEBIAN = os.path.join(_HOME, "debian")
_MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
_NEEDS = (2, 38)
_LIMIT_S = 120
# Inside the Debian, and where the tool asks for the CUDA runtime before it touches shared memory.
_TOOL = "/opt/perf_analyzer"

# Enough for several windows; the tool's own search for a stable figure is for idle machines.
_COUNT = ["--request-count", "200"]
_SIMPLE = ["-m", "simple", *_COUNT]
_REPEAT = ["-m", "repeat", "--streaming", "--shape", "IN:4", "--input-data", "random", "--request-count", "40"]

# (what, where, flags)
RUNS = [
    ("unary", "both", [*_SIMPLE, "--concurrency-range", "4"]),
    ("asynchronous", "both", [*_SIMPLE, "-a", "--concurrency-range", "8"]),
    ("batches", "both", [*_SIMPLE, "-b", "4", "--concurrency-range", "2"]),
    ("a rate, Poisson", "both", [*_SIMPLE, "-a", "--request-rate-range", "100", "--request-distribution", "poisson"]),
    ("gzip", "both", [*_SIMPLE, "--grpc-compression-algorithm", "gzip", "--concurrency-range", "1"]),
    ("deflate", "both", [*_SIMPLE, "--grpc-compression-algorithm", "deflate", "--concurrency-range", "1"]),
    ("a stream", "both", [*_SIMPLE, "--streaming", "--concurrency-range", "4"]),
    ("strings", "both", ["-m", "echo_bytes", "--shape", "x:5", "--string-data", "seven", *_COUNT]),
    ("strings of its own", "both", ["-m", "echo_bytes", "--shape", "x:5", "--string-length", "40", *_COUNT]),
    ("sequences", "both", ["-m", "numbered", "--concurrency-range", "2", "--sequence-length", "5", *_COUNT]),
    ("sequences on a stream", "both", [
        "-m", "numbered", "--streaming", "--concurrency-range", "3", "--sequence-length", "5", "--sequence-id-range", "100:200", *_COUNT,
    ]),
    ("serial sequences at a rate", "both", [
        "-m", "numbered", "--streaming", "--request-rate-range", "100", "--num-of-sequences", "3", "--serial-sequences", *_COUNT,
    ]),
    ("decoupled", "worker", _REPEAT),
    ("system shared memory", "worker", [*_SIMPLE, "--shared-memory", "system", "--output-shared-memory-size", "1024", "--concurrency-range", "2"]),
    ("trace settings", "both", [*_SIMPLE, "--trace-level", "OFF", "--concurrency-range", "1"]),
    ("until it is stable", "both", ["-m", "simple", "--concurrency-range", "2", "-p", "1000", "-s", "999", "--max-trials", "5"]),
]


def runner():
    """What to put in front of the tool's path and the environment it needs; or a sentence why it can't be run."""
    found = platform.libc_ver()
    version = tuple(int(part) for part in found[1].split(".")[:2]) if found[0] == "glibc" else (0, 0)
    cuda = os.path.join(_HOME, "libtorch", "lib", "libcudart.so.13")
    if version >= _NEEDS:
        folder = os.path.join(_HOME, "perf-analyzer")
        return [], os.path.join(folder, "perf_analyzer"), _with_cudart(folder, cuda)
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        return f"the tool needs glibc 2.38, this system has {'.'.join(map(str, version))}; and a Debian 13 needs root and debootstrap"
    if not os.path.exists(os.path.join(_DEBIAN, "complete")):
        print("perf_analyzer: making a Debian 13, about 80 s", flush=True)
        shutil.rmtree(_DEBIAN, ignore_errors=True)
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=libstdc++6,libssl3t64,zlib1g", "trixie", _DEBIAN, _MIRROR],
            capture_output=True, text=True, check=False,
        )
        if made.returncode != 0:
            return f"debootstrap made no Debian 13: {(made.stderr or made.stdout).strip().splitlines()[-1:]}"
        with open(os.path.join(_DEBIAN, "complete"), "w", encoding="ascii"):
            pass
    inside = _DEBIAN + _TOOL
    os.makedirs(inside, exist_ok=True)
    shutil.copy(os.path.join(_HOME, "perf-analyzer", "perf_analyzer"), inside)
    # With the shared memory of this machine, in a mount namespace that ends with the tool.
    script = 'mount --bind /dev/shm "$0/dev/shm" && exec chroot "$0" "$@"'
    return ["unshare", "--mount", "sh", "-c", script, _DEBIAN], f"{_TOOL}/perf_analyzer", {**_with_cudart(inside, cuda), "LD_LIBRARY_PATH": _TOOL}


def _with_cudart(folder, cuda):
    """The tool opens `libcudart.so` before it uses system shared memory, GPU or not."""
    if os.path.exists(cuda):  # else that run says so
        shutil.copy(cuda, os.path.join(folder, "libcudart.so"))
    return {"LD_LIBRARY_PATH": folder}


def _run(prefix, tool, environment, address, flags):
    """None, or what was wrong. The tool's own words decide with its status: it ends with 0 after some kinds of trouble."""
    command = [*prefix, tool, *flags, "-i", "grpc", "-u", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}) as process:
        try:
            said, _ = process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return None, f"not finished after {_LIMIT_S} s"
    rate = re.search(r"Throughput: ([0-9.]+) infer/sec", said)
    if process.returncode != 0 or not rate or float(rate.group(1)) <= 0 or re.search(r"(?i)\bfailed\b|error", said):
        return None, f"status {process.returncode}\n    {' '.join(command)}\n{said}"
    return float(rate.group(1)), None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", required=True, help="host:port")
    parser.add_argument("--worker", required=True, help="host:port")
    parser.add_argument("--only", default="", help="runs whose names contain this")
    given = parser.parse_args()
    ready = runner()
    if isinstance(ready, str):
        print(f"perf_analyzer: skipped: {ready}")
        return 0
    prefix, tool, environment = ready
    failures = 0
    for what, where, flags in RUNS:
        for place in ["coordinator", "worker"] if where == "both" else [where]:
            if given.only not in what:
                continue
            rate, problem = _run(prefix, tool, environment, getattr(given, place), flags)
            failures += problem is not None
            print(f"{'FAIL' if problem else 'ok  '} {place}: {what}" + (f": {problem}" if problem else f" ({rate:.0f} inferences/s)"), flush=True)
    print(f"perf_analyzer: {failures} runs failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
