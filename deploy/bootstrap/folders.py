"""Folders that are either complete or not there.

A folder is built beside its final place and renamed into it; only then is its stamp written. A stamp
says from which inputs a folder was made and how large its main files are, so that a second run can
tell in a few milliseconds that there is nothing to do, and a broken run is never taken for a whole one.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys

from errors import Problem


def digest(*inputs):
    """A short name for `inputs` (anything that `repr` shows in full)."""
    return hashlib.sha256(repr(inputs).encode()).hexdigest()


class Home:
    """The folder that holds everything fetched; `.cresset` in the checkout unless told otherwise."""

    def __init__(self, path):
        self.path = os.path.abspath(path)

    def __call__(self, *parts):
        return os.path.join(self.path, *parts)

    def prepare(self):
        """Makes the folder, and says so in one line if it can't be written."""
        try:
            os.makedirs(self("stamps"), exist_ok=True)
            os.makedirs(self("downloads"), exist_ok=True)
        except OSError as error:
            raise Problem(f"cannot write in {self.path}: {error.strerror}") from error

    @contextlib.contextmanager
    def lock(self):
        """One fetch at a time: a second one waits for the first and then finds its work done."""
        with open(self("lock"), "w", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("fetch: waiting for another fetch of this checkout to end", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def room(self, bytes_needed):
        """Refuses to begin what the disk has no room for."""
        free = shutil.disk_usage(self.path).free
        if free < bytes_needed:
            raise Problem(
                f"not enough disk space in {self.path}: {free // 1_000_000} MB free, "
                f"{bytes_needed // 1_000_000} MB needed; make room, or make .cresset a link to a folder on a larger disk"
            )

    def is_current(self, stamp, folder, recipe):
        """Whether `folder` was made from `recipe` and its main files are still what they were."""
        try:
            with open(self("stamps", stamp + ".json"), encoding="utf-8") as file:
                record = json.load(file)
            return record["recipe"] == recipe and all(
                os.stat(os.path.join(folder, name)).st_size == size for name, size in record["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def write_stamp(self, stamp, folder, recipe, files):
        """Records that `folder` is complete."""
        sizes = {name: os.stat(os.path.join(folder, name)).st_size for name in files}
        path = self("stamps", stamp + ".json")
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump({"recipe": recipe, "files": sizes}, file, indent=1, sort_keys=True)
            file.write("\n")
        os.replace(path + ".new", path)

    def drop_stamp(self, stamp):
        """From here on the folder counts as not made."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self("stamps", stamp + ".json"))

    @contextlib.contextmanager
    def building(self, stamp, folder, recipe, files):
        """Yields an empty folder to fill; on success it becomes `folder` and gets its stamp."""
        parent, name = os.path.split(folder)
        os.makedirs(parent, exist_ok=True)
        # Not inside `parent`: that may be a model repository, which a running cluster looks at.
        fresh, old = self("downloads", name + ".new"), self("downloads", name + ".old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        os.makedirs(fresh)
        try:
            yield fresh
            self.drop_stamp(stamp)
            if os.path.lexists(folder):
                os.rename(folder, old)
            os.rename(fresh, folder)
            self.write_stamp(stamp, folder, recipe, files)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def say(text):
    """One line of progress."""
    print(f"fetch: {text}", flush=True)


def is_terminal():
    """Whether a progress line may be rewritten in place."""
    return sys.stdout.isatty()
