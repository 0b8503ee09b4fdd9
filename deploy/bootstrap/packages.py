"""Downloads one pinned package with pip, shows how far it is, and checks its SHA-256.

pip is the client because it knows the user's index, proxy, certificates and cache. A file that is
complete is kept under its own name until it has been unpacked; what pip was writing when it was
stopped lies in a scratch folder and is thrown away.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile

from errors import Problem
from folders import is_terminal, say

# The Python that the pinned wheels are for, whatever Python runs this.
_PYTHON = "3.11"
# What pip prints when it can't reach an index, in the versions since 20.
_UNREACHABLE = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "Failed to establish", "ProxyError",
                "Read timed out", "ReadTimeoutError", "Connection aborted", "Network is unreachable", "SSLError",
                "Connection refused", "Temporary failure in name resolution")


def sha256(path):
    """The hexadecimal SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


def download(home, package):
    """The path of the verified package file, fetched if it isn't there yet."""
    path = home("downloads", package.file)
    if os.path.exists(path):
        if sha256(path) == package.sha256:
            return path
        say(f"{package.file} from an earlier run is damaged, fetching it again")
        os.remove(path)
    # pip writes into its scratch folder first and copies from there.
    home.room(2 * package.size + 50_000_000)
    scratch = home("downloads", "pip")
    shutil.rmtree(scratch, ignore_errors=True)
    os.makedirs(os.path.join(scratch, "done"))
    try:
        with _progress(package, scratch):
            _pip_download(package, scratch)
        fetched = os.path.join(scratch, "done", package.file)
        if not os.path.exists(fetched):
            raise Problem(f"pip fetched {os.listdir(os.path.join(scratch, 'done'))} instead of {package.file}")
        actual = sha256(fetched)
        if actual != package.sha256:
            raise Problem(f"{package.file} has SHA-256 {actual} instead of {package.sha256}: not used; "
                          "try again, and don't trust the index if it stays so")
        os.rename(fetched, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _pip_download(package, scratch):
    requirements = os.path.join(scratch, "requirements.txt")
    with open(requirements, "w", encoding="ascii") as file:
        file.write(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--retries", "3",
               "--dest", os.path.join(scratch, "done"), "--requirement", requirements]
    if package.platform is None:
        # The archive's build tools are fetched as wheels; nothing is compiled by `download`.
        command += ["--no-binary", package.name]
    else:
        command += ["--only-binary", ":all:", "--python-version", _PYTHON]
        if package.platform != ["any"]:
            command += ["--implementation", package.python[:2], "--abi", package.abi]
            for platform in package.platform:
                command += ["--platform", platform]
    environment = dict(os.environ, TMPDIR=scratch, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    run_pip(command, environment, package.file)


def run_pip(command, environment, what):
    """Runs pip, and turns its failure into one line."""
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if result.returncode == 0:
        return
    output = result.stdout
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or [f"exit status {result.returncode}"]
    if "No module named pip" in output:
        raise Problem("this Python has no pip: install it (Debian: apt-get install python3-pip python3-venv)")
    if "DO NOT MATCH THE HASHES" in output:
        raise Problem(f"{what} is not the file that was pinned (SHA-256 differs): not used")
    if "No space left on device" in output:
        raise Problem(f"no space left on the disk while fetching {what}")
    if any(mark in output for mark in _UNREACHABLE):
        raise Problem(f"cannot reach the package index for {what}: check the network or pip's settings, then run again")
    raise Problem(f"pip could not fetch {what}: {errors[0][:300]}")


@contextlib.contextmanager
def _progress(package, scratch):
    """Watches what pip writes: in place on a terminal, else a line for each quarter."""
    title = f"{package.name} {package.version}"
    say(f"{title}: fetching {package.size / 1e6:.0f} MB")
    started, stop = time.monotonic(), threading.Event()

    def watch():
        shown = 0
        while not stop.wait(0.2):
            got = min(_bytes_under(scratch), package.size)
            percent = got * 100 // package.size
            if is_terminal():
                print(f"\rfetch: {title}: {got / 1e6:.0f} of {package.size / 1e6:.0f} MB, {percent} % ", end="", flush=True)
            elif percent // 25 > shown // 25:
                shown = percent
                say(f"{title}: {got / 1e6:.0f} of {package.size / 1e6:.0f} MB, {percent} %")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        if is_terminal():
            print(f"\r{'':70}\r", end="", flush=True)
    say(f"{title}: fetched and verified in {time.monotonic() - started:.1f} s")


def _bytes_under(folder):
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def extract(archive, members, folder):
    """Unpacks `members` (name in the wheel → name in `folder`), keeping modes and times."""
    with zipfile.ZipFile(archive) as wheel:
        for member, name in members.items():
            try:
                info = wheel.getinfo(member)
            except KeyError as error:
                raise Problem(f"{os.path.basename(archive)} holds no {member}") from error
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with wheel.open(info) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            # The archive's own times, so that a header fetched twice makes nothing rebuild.
            stamp = time.mktime(info.date_time + (0, 0, -1))
            os.utime(path, (stamp, stamp))
            mode = (info.external_attr >> 16) & 0o777
            os.chmod(path, mode or 0o644)


def members_under(archive, prefix):
    """The files of a wheel below `prefix`."""
    with zipfile.ZipFile(archive) as wheel:
        return [name for name in wheel.namelist() if name.startswith(prefix) and not name.endswith("/")]
