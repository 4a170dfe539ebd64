"""What can go wrong between ranks. Torch-free, so that a supervisor can name these errors, too.

CommError                 a collective, an exchange or a join did not finish
|- PeerLostError          a connection broke: the peer died, left, or gave up on an error of its own
|- CommTimeoutError       no answer within the mesh's time-out: the peer hangs, or is not there
|- CommAbortedError       this rank's own `Mesh.abort` ended the wait
`- JoinError              the group could not be formed

After any of them the mesh is broken on this rank, and soon on all: leave it and join again under
the next generation. The tensors of the failed call hold garbage.
"""


class CommError(Exception):
    """Say which operation failed, over which axis, on which rank, after how long."""

    def __init__(self, *, op: str, axis: str, rank: int, elapsed_s: float, detail: str) -> None:
        self.op = op
        self.axis = axis
        self.rank = rank
        self.elapsed_s = elapsed_s
        self.detail = detail
        super().__init__(
            f"{op} over axis {axis!r} failed on rank {rank} after {elapsed_s:.3f} s: {detail}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling by themselves, and these
        # travel from worker to supervisor.
        return (_rebuild, (type(self), self.op, self.axis, self.rank, self.elapsed_s, self.detail))


class PeerLostError(CommError):
    """A connection to a peer broke."""


class CommTimeoutError(CommError):
    """A peer did not answer in time."""


class CommAbortedError(CommError):
    """This rank's own `Mesh.abort` ended the wait."""


class JoinError(CommError):
    """The group of this generation could not be formed."""


def _rebuild(
    kind: type[CommError], op: str, axis: str, rank: int, elapsed_s: float, detail: str
) -> CommError:
    return kind(op=op, axis=axis, rank=rank, elapsed_s=elapsed_s, detail=detail)
