#!/usr/bin/env python3
"""Tests of the bootstrap that need no network: pip is replaced by a small script."""

import contextlib
import hashlib
import io
import os
import sys
import tarfile
import tempfile
import textwrap
import unittest
import wave
import zipfile
from unittest import mock

import fetch
import folders
import packages
import pins
import speech
from errors import Problem


def setUpModule():
    silence = contextlib.redirect_stdout(io.StringIO())
    silence.__enter__()
    unittest.addModuleCleanup(silence.__exit__, None, None, None)


class WithHome(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.home = folders.Home(os.path.join(scratch.name, "home"))
        self.home.prepare()

    def build(self, text, stop=False):
        with self.home.building("thing", self.home("thing"), "recipe " + text, ["file"]) as fresh:
            with open(os.path.join(fresh, "file"), "w", encoding="ascii") as file:
                file.write(text)
            if stop:
                raise KeyboardInterrupt

    def is_current(self, text):
        return self.home.is_current("thing", self.home("thing"), "recipe " + text)


class Folders(WithHome):
    def test_a_folder_is_complete_or_not_there(self):
        with self.assertRaises(KeyboardInterrupt):
            self.build("one", stop=True)
        self.assertFalse(os.path.exists(self.home("thing")))
        self.assertFalse(self.is_current("one"))
        self.build("one")
        self.assertTrue(self.is_current("one"))
        self.assertEqual(os.listdir(self.home("downloads")), [])

    def test_a_broken_rebuild_leaves_the_old_folder(self):
        self.build("one")
        with self.assertRaises(KeyboardInterrupt):
            self.build("two", stop=True)
        self.assertTrue(self.is_current("one"))
        self.build("two")
        self.assertTrue(self.is_current("two"))
        self.assertFalse(self.is_current("one"))

    def test_a_damaged_folder_or_stamp_is_noticed(self):
        self.build("one")
        with open(self.home("thing", "file"), "a", encoding="ascii") as file:
            file.write("more")
        self.assertFalse(self.is_current("one"))
        self.build("one")
        for content in ("", "[]", '{"recipe": "recipe one"}'):
            with open(self.home("stamps", "thing.json"), "w", encoding="ascii") as file:
                file.write(content)
            self.assertFalse(self.is_current("one"), content)

    def test_no_room_is_said_before_the_work(self):
        with self.assertRaisesRegex(Problem, "not enough disk space"):
            self.home.room(1 << 60)


class Packages(WithHome):
    content = b"the package"

    def setUp(self):
        super().setUp()
        self.package = pins.Package("thing", "1.0", "thing-1.0-py3-none-any.whl", len(self.content),
                                    hashlib.sha256(self.content).hexdigest(), ["any"], "py3", "none")

    def pip(self, body):
        """Lets a script take pip's place; `target` is where pip was asked to put the file."""
        script = self.home("pip.py")
        with open(script, "w", encoding="utf-8") as file:
            file.write("import os, sys\nfolder = sys.argv[sys.argv.index('--dest') + 1]\n"
                       f"target = os.path.join(folder, '{self.package.file}')\n" + textwrap.dedent(body))
        run = packages.subprocess.run
        replace = mock.patch.object(packages.subprocess, "run",
                                    lambda command, **options: run([sys.executable, script, *command[3:]], **options))
        replace.start()
        self.addCleanup(replace.stop)

    def test_a_complete_package_is_not_fetched_twice(self):
        self.pip("open(target, 'wb').write(b'the package')")
        path = packages.download(self.home, self.package)
        self.pip("sys.exit(1)")
        self.assertEqual(packages.download(self.home, self.package), path)
        self.assertEqual(os.listdir(self.home("downloads")), [self.package.file])

    def test_a_damaged_package_is_fetched_again(self):
        self.pip("open(target, 'wb').write(b'the package')")
        with open(self.home("downloads", self.package.file), "wb") as file:
            file.write(b"the pack")
        path = packages.download(self.home, self.package)
        self.assertEqual(packages.sha256(path), self.package.sha256)

    def test_another_file_than_the_pinned_one_is_refused(self):
        self.pip("open(target, 'wb').write(b'not the package')")
        with self.assertRaisesRegex(Problem, "instead of"):
            packages.download(self.home, self.package)
        self.assertEqual(os.listdir(self.home("downloads")), [])

    def test_failures_are_told_apart(self):
        for output, told in [
            ("WARNING: Retrying after NewConnectionError\nERROR: No matching distribution", "cannot reach the package index"),
            ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "SHA-256 differs"),
            ("ERROR: Could not install: [Errno 28] No space left on device", "no space left"),
            ("/usr/bin/python3: No module named pip", "python3-pip"),
            ("ERROR: No matching distribution found for thing", "No matching distribution"),
        ]:
            self.pip(f"print({output!r}); sys.exit(1)")
            with self.assertRaisesRegex(Problem, told) as raised:
                packages.download(self.home, self.package)
            self.assertNotIn("\n", str(raised.exception))

    def test_unpacking_names_what_is_missing_and_keeps_times(self):
        wheel = self.home("downloads", self.package.file)
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(zipfile.ZipInfo("a/b.h", (2020, 2, 2, 0, 0, 0)), "x")
        packages.extract(wheel, {"a/b.h": "include/b.h"}, self.home("out"))
        first = os.stat(self.home("out", "include", "b.h")).st_mtime
        packages.extract(wheel, {"a/b.h": "include/b.h"}, self.home("out"))
        self.assertEqual(os.stat(self.home("out", "include", "b.h")).st_mtime, first)
        with self.assertRaisesRegex(Problem, "holds no a/c.h"):
            packages.extract(wheel, {"a/c.h": "c.h"}, self.home("out"))


class Speech(WithHome):
    def test_the_minute_is_the_same_each_time_and_has_pauses(self):
        archive = self.home("reader-1.tar.gz")
        with tarfile.open(archive, "w:gz") as tar:
            for number in ("0870", "0880", "0890", "0920", "0930"):
                data = io.BytesIO()
                with wave.open(data, "wb") as clip:
                    clip.setparams((1, 2, 16_000, 0, "NONE", ""))
                    clip.writeframes((1600).to_bytes(2, "little") * 16_000)
                entry = tarfile.TarInfo(f"reader-1/test/data/librivox/sense_and_sensibility_01_austen_64kb-{number}.wav")
                entry.size = len(data.getvalue())
                tar.addfile(entry, io.BytesIO(data.getvalue()))
        digests = set()
        for name in ("one.wav", "two.wav"):
            seconds = speech.assemble(archive, self.home(name))
            digests.add(packages.sha256(self.home(name)))
        self.assertEqual(len(digests), 1)
        self.assertAlmostEqual(seconds, 10 + 11.9)
        with wave.open(self.home("one.wav")) as file:
            frames = file.readframes(file.getnframes())
        loudness = [abs(int.from_bytes(frames[at : at + 2], "little", signed=True)) for at in range(0, len(frames), 2)]
        self.assertLessEqual(max(loudness[: 16_000 * 4 // 10]), 8)
        self.assertEqual(set(loudness) - set(range(9)), {1600, 900})


class CommandLine(unittest.TestCase):
    def test_usage(self):
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            self.assertEqual(fetch.main([]), 2)
            self.assertEqual(fetch.main(["everything"]), 2)
            self.assertEqual(fetch.main(["--help"]), 0)
            with tempfile.NamedTemporaryFile() as file:
                self.assertEqual(fetch.main(["--home", file.name + "/sub", "deny"]), 1)
        self.assertIn("unknown target everything", errors.getvalue())
        self.assertIn("cannot write in", errors.getvalue())


if __name__ == "__main__":
    unittest.main()
