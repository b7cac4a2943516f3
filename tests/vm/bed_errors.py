"""What can go wrong with the bed itself."""


class BedError(Exception):
    """One line: what failed and what to do about it."""
