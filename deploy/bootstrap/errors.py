"""The one exception whose text is meant for the user: one line, what happened and the way out."""


class Problem(Exception):
    """Printed as `fetch: TEXT`, without a traceback; the exit status is 1."""
