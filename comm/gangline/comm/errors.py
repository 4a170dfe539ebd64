"""What can go wrong between ranks. Torch-free, so that a supervisor can name these errors, too.

CommError                 a collective, an exchange or a join did not finish
|- PeerLostError          a connection broke: the peer died, left, or gave up on an error of its own
|- CommTimeoutError       no answer within the mesh's time-out: the peer hangs, or is not there
|- CommAbortedError       this rank's own `Mesh.abort` ended the wait
`- JoinError              the group could not be formed

After any of them the mesh is broken on this rank, and soon on all: leave it and join again under
the next generation. The tensors of the failed call hold garbage.
"""

from typing import Any


class CommError(Exception):
    """Say which operation failed, over which group, on which rank, after how long.

    `group` is the axis and the generation ("ep@3"); `sequence` counts the operations of this rank
    on that group from 1, the same on all its ranks (0: no operation was under way); `peer` is the
    rank at the other end where that is known, else None.
    """

    def __init__(
        self,
        *,
        op: str,
        axis: str,
        rank: int,
        elapsed_s: float,
        detail: str,
        group: str = "",
        sequence: int = 0,
        peer: int | None = None,
    ) -> None:
        self.op = op
        self.axis = axis
        self.rank = rank
        self.elapsed_s = elapsed_s
        self.detail = detail
        self.group = group or axis
        self.sequence = sequence
        self.peer = peer
        number = f" {sequence}" if sequence else ""
        other = f" with rank {peer}" if peer is not None else ""
        super().__init__(
            f"{op}{number} over {self.group} failed on rank {rank}{other} after {elapsed_s:.3f} s: "
            f"{detail}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling by themselves, and these
        # travel from worker to supervisor.
        fields = {name: value for name, value in self.__dict__.items() if name in _FIELDS}
        return (_rebuild, (type(self), fields))


class PeerLostError(CommError):
    """A connection to a peer broke."""


class CommTimeoutError(CommError):
    """A peer did not answer in time."""


class CommAbortedError(CommError):
    """This rank's own `Mesh.abort` ended the wait."""


class JoinError(CommError):
    """The group of this generation could not be formed."""


_FIELDS = ("op", "axis", "rank", "elapsed_s", "detail", "group", "sequence", "peer")


def _rebuild(kind: type[CommError], fields: dict[str, Any]) -> CommError:
    return kind(**fields)
