"""Everything that stock clients of Triton expect, checked against a running cluster. See `--help`, and checks.py."""

import sys

import checks

# The order is that of the run.
import descriptors  # noqa: F401
import server  # noqa: F401
import predictions  # noqa: F401
import kserve_sdk  # noqa: F401
import datatypes  # noqa: F401
import transport  # noqa: F401
import sequences  # noqa: F401
import streams  # noqa: F401
import refusals  # noqa: F401
import model_statistics  # noqa: F401
import settings  # noqa: F401
import shared_memory  # noqa: F401
import repository  # noqa: F401

if __name__ == "__main__":
    sys.exit(checks.run(checks.arguments()))
