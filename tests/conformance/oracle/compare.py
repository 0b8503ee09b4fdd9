"""Answers against the recorded ones, field by field, with the list of the differences that are meant."""

import re

# What `outcome` puts in front of a call's message; a response of a stream has no code.
_CODE = re.compile("[A-Z_]+: ")


def leaves(value):
    """How many single values there are."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(leaves, inner)) if inner else 1


def outcome(value):
    """How a call, or one response of a stream, ended, if that is what this is: its error, or that there is none."""
    if not isinstance(value, dict):
        return None
    if "code" in value:
        return "OK" if value["code"] == "OK" else f"{value['code']}: {value['message']}"
    if "error" in value:
        return value["error"] or "OK"
    return None


def _says(ours, theirs):
    """Whether a message has Triton's code and its whole text; it may have more."""
    if "OK" in (ours, theirs):
        return ours == theirs
    (code, _, text), (their_code, _, their_text) = ((side.partition(": ") if _CODE.match(side) else ("", "", side)) for side in (ours, theirs))
    return code == their_code and their_text.rstrip(" .") in text


def pairs(theirs, ours, path=()):
    """Every smallest thing that differs, as (path, Triton's, Cresset's). A refusal beside an answer is one difference."""
    if theirs == ours:
        return
    left, right = outcome(theirs), outcome(ours)
    if left is not None and right is not None:
        if not _says(right, left):
            yield " / ".join(path), left, right
        if "OK" in (left, right) and left != right:
            return
        theirs, ours = ({key: inner for key, inner in side.items() if key not in ("code", "message", "error")} for side in (theirs, ours))
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            yield from pairs(theirs.get(key, ABSENT), ours.get(key, ABSENT), (*path, key))
    elif isinstance(theirs, list) and isinstance(ours, list) and theirs and ours:
        for index in range(max(len(theirs), len(ours))):
            both = (side[index] if index < len(side) else ABSENT for side in (theirs, ours))
            yield from pairs(*both, (*path, str(index)))
    elif theirs != ours:
        yield " / ".join(path), theirs, ours


# What isn't there.
ABSENT = "absent"


class Words:
    """A message by what is in it."""

    def __init__(self, gist):
        self.gist = gist

    def __repr__(self):
        return f"words({self.gist!r})"

    def fits(self, answer):
        return isinstance(answer, str) and self.gist in answer


def words(gist):
    """A message that contains `gist`. Unless `triton` says otherwise Triton's has to contain it too."""
    return Words(gist)


class Allowed:
    """One meant difference: `where` is a pattern of paths with `*` for any text, `cresset` what it answers there.

    Both `cresset` and `triton` are a value, `ABSENT`, `words("…")`, or `...` for whatever it is. Triton's is the recording's
    anyway, so it is only told where it narrows down what a pattern covers.
    """

    def __init__(self, where, cresset, why, at=("coordinator", "worker"), triton=None):
        self.where, self.cresset, self.why = where, cresset, why
        self.triton = (cresset if isinstance(cresset, Words) else ...) if triton is None else triton
        self.at = (at,) if isinstance(at, str) else at
        self.pattern = re.compile(".*".join(map(re.escape, where.split("*"))))
        self.used = set()

    def covers(self, place, path, theirs, ours):
        """Whether this difference is the one that is meant."""
        fits = place in self.at and self.pattern.fullmatch(path) and _fits(self.cresset, ours) and _fits(self.triton, theirs)
        if fits:
            self.used.add(place)
        return fits


def _fits(wanted, answer):
    return wanted is ... or (wanted.fits(answer) if isinstance(wanted, Words) else wanted == answer)


def differences(place, recorded, answered, allowed):
    """Lines that say what differs and isn't meant to, then which meant differences are none any more."""
    lines = []
    for path, left, right in pairs(recorded, answered):
        # Not `any` over a generator: an entry that covers the same path isn't left over because another came first.
        if not any([entry.covers(place, path, left, right) for entry in allowed]):
            lines.append(f"{path}\n    Triton  {left!r}\n    Cresset {right!r}")
    for entry in allowed:
        if place in entry.at and place not in entry.used:
            lines.append(f"{entry.where}: is on the list of meant differences as {entry.cresset!r}, and nothing differs like that ({place})")
    return lines
