"""The comparison itself: it has to see what differs, and to miss no entry of the list that has become wrong."""

import unittest

from oracle.compare import ABSENT, Allowed, differences, words

GOOD = {"code": "OK", "answer": {"outputs": [{"raw": "00"}, {"raw": "01"}]}}
REFUSED = {"code": "INVALID_ARGUMENT", "message": "too few. "}


def seen(theirs, ours, *allowed, place="worker"):
    return differences(place, {"p": theirs}, {"p": ours}, list(allowed))


class Comparison(unittest.TestCase):
    def test_what_is_equal_is_no_difference_and_more_words_are_none(self):
        self.assertEqual(seen(GOOD, GOOD), [])
        self.assertEqual(seen(REFUSED, {**REFUSED, "message": "model 'm': too few: 1 of 2"}), [])
        self.assertEqual(seen({"error": "too few"}, {"error": "model 'm': too few"}), [])

    def test_each_kind_of_difference_is_seen(self):
        changed = {"code": "OK", "answer": {"outputs": [{"raw": "00"}, {"raw": "02"}]}}
        shorter = {"code": "OK", "answer": {"outputs": [{"raw": "00"}]}}
        for ours in [changed, shorter, REFUSED, {**GOOD, "more": 1}]:
            self.assertEqual(len(seen(GOOD, ours)), 1, ours)
            self.assertEqual(len(seen(ours, GOOD)), 1, ours)
        self.assertEqual(len(seen(REFUSED, {**REFUSED, "code": "INTERNAL"})), 1, "same words, another code")
        self.assertEqual(len(seen(REFUSED, {**REFUSED, "message": "few"})), 1, "fewer words")
        self.assertEqual(len(seen({"error": "x"}, {"error": ""})), 1, "an error of a stream that is none")

    def test_a_meant_difference_is_that_difference_and_no_other(self):
        other = {"code": "INTERNAL", "message": "broken"}
        self.assertEqual(seen(REFUSED, other, Allowed("p", "INTERNAL: broken", "why")), [])
        self.assertEqual(len(seen(REFUSED, other, Allowed("p", "INTERNAL: something", "why"))), 2)
        self.assertEqual(len(seen(REFUSED, other, Allowed("p", words("broken"), "why"))), 2, "Triton's words haven't that in them")
        self.assertEqual(seen(REFUSED, other, Allowed("p", words("broken"), "why", triton=words("few"))), [])
        self.assertEqual(seen({"a": 1}, {}, Allowed("p / *", ABSENT, "why")), [])
        self.assertEqual(len(seen(REFUSED, other, Allowed("p", ..., "why", at="coordinator"))), 1, "meant elsewhere only")

    def test_a_meant_difference_that_is_none_any_more_is_an_error(self):
        entry = Allowed("p", "INTERNAL: broken", "why")
        self.assertEqual(len(seen(REFUSED, REFUSED, entry)), 1)
        self.assertEqual(len(seen(REFUSED, REFUSED, Allowed("p", ..., "why", at="coordinator"))), 0, "not asked there")


if __name__ == "__main__":
    unittest.main()
