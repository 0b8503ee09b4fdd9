"""The same questions to a real Triton and to Cresset, and their answers compared field by field.

    differential.py record --triton DIR                            a real Triton's answers into oracle/recorded.json
    differential.py compare --coordinator ADDRESS --worker ADDRESS  Cresset's answers with the recorded ones

What differs and is meant to is in oracle/meant.py with its reason; what is there and doesn't differ any more is an error too.
"""

import argparse
import json
import os
import sys

from checks import Endpoint
from oracle import compare, meant, probes, server

RECORDED = os.path.join(server.HERE, "recorded.json")


def ask(endpoint, place):
    """Every probe's answers, by its name."""
    return {name: function(endpoint) for name, function, at in probes.PROBES if place in at}


def record(home):
    """Asks a Triton of its own and writes what it said."""
    with server.running(home) as address:
        endpoint = Endpoint(address)
        metadata = endpoint.client.get_server_metadata()
        answers = {name: function(endpoint) for name, function, _ in probes.PROBES}
    recording = {"server": {"name": metadata.name, "version": metadata.version}, "answers": answers}
    with open(RECORDED, "w", encoding="utf-8") as file:
        json.dump(recording, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")
    print(f"{metadata.name} {metadata.version}: {compare.leaves(answers)} answers of {len(answers)} probes recorded")
    return 0


def check(places):
    """Asks Cresset, prints what differs, and returns the exit code."""
    with open(RECORDED, encoding="utf-8") as file:
        recording = json.load(file)
    failed = False
    for place, address in places.items():
        # By way of JSON, as the recorded ones went.
        answered = json.loads(json.dumps(ask(Endpoint(address), place)))
        recorded = {name: recording["answers"].get(name) for name in answered}
        lines = compare.differences(place, recorded, answered, meant.DIFFERENCES)
        print(f"{place}: {compare.leaves(recorded)} answers of Triton {recording['server']['version']} compared, {len(lines)} unexpected differences")
        print("\n".join(lines))
        failed = failed or bool(lines)
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("--triton", help="where `fetch.py triton` put it")
    parser.add_argument("--coordinator", help="host:port")
    parser.add_argument("--worker", help="host:port")
    given = parser.parse_args()
    if given.what == "record":
        return record(given.triton) if given.triton else parser.error("--triton is needed")
    places = {place: getattr(given, place) for place in ["coordinator", "worker"] if getattr(given, place)}
    return check(places) if places else parser.error("--coordinator or --worker is needed")


if __name__ == "__main__":
    sys.exit(main())
