"""Count what this rank sends to which class of link, message by message.

Only what is sent from rank to rank by name is counted (the exchanges of collectives.py); what a
ring or a tree inside the backend moves is not known to the caller, and its formula stands in the
docstring of the collective.
"""

from collections import Counter
from enum import StrEnum


class Link(StrEnum):
    """Where a message goes."""

    LOCAL = "local"  # it stays on this rank: a copy
    INTRA_HOST = "intra_host"
    INTER_HOST = "inter_host"


class Traffic:
    """Hold the counts of one rank since they were last taken. For one thread."""

    def __init__(self) -> None:
        self.num_messages: Counter[Link] = Counter()
        self.num_bytes: Counter[Link] = Counter()

    def count(self, link: Link, num_bytes: int) -> None:
        """Add one message."""
        self.num_messages[link] += 1
        self.num_bytes[link] += num_bytes

    def take(self) -> "Traffic":
        """Return the counts and start again from zero."""
        taken = Traffic()
        taken.num_messages, self.num_messages = self.num_messages, taken.num_messages
        taken.num_bytes, self.num_bytes = self.num_bytes, taken.num_bytes
        return taken
