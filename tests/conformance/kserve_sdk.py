"""KServe's own Python client. It runs as a program of its own, see kserve_client.py."""

import json
import os
import subprocess
import sys

from checks import check, contains, equal

_PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kserve_client.py")
_LIMIT_S = 120


def kserve(argument):
    """What the program printed."""
    ran = subprocess.run([sys.executable, _PROGRAM, argument], capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@check
def kserves_client_gets_everything_it_can_ask_for(place):
    told = kserve(place.of("simple").address)
    equal([told[what] for what in ["live", "ready", "model"]], [True, True, True])
    rows = [list(range(start, start + 16)) for start in [0, 16]]
    sums, differences = [[2 * value for value in row] for row in rows], [[0] * 16] * 2
    for kind in ["raw", "typed"]:
        wanted = {"model": "simple", "version": "1", "id": kind, "outputs": {"OUTPUT0": sums, "OUTPUT1": differences}}
        equal(told[kind], wanted, kind)
    equal(told["version"]["outputs"]["OUTPUT0"], sums[:1])
    equal(told["one output"]["outputs"], {"OUTPUT1": differences[:1]})
    equal(told["texts"]["outputs"], {"y": ["a", "", "ü"]})
    equal(told["unknown"]["code"], "NOT_FOUND")
    contains(told["unknown"]["message"], "unknown model: 'nope'")
    equal(told["many"], [str(number) for number in range(20)])
