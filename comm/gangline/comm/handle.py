"""An operation under way, and what becomes of it when a peer fails.

gloo and NCCL raise one class of error for all that can happen; here each becomes the right kind of
CommError (tree in errors.py), with all that is known of the operation.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from gangline.comm.errors import CommAbortedError, CommError, CommTimeoutError, PeerLostError
from gangline.comm.mesh import Axis, Mesh

# What gloo says of a peer: [::ffff:10.0.0.1]:4711 or [10.0.0.1]:4711.
_ADDRESS = re.compile(r"\[([0-9a-fA-F.:]+)\]:(\d+)")
_GLOO_NOISE = re.compile(r"^\[\S+\.cc:\d+\] | This is typically caused by .*$")


@dataclass(frozen=True)
class Call:
    """One operation on one axis, as an error would describe it."""

    op: str
    axis: Axis
    mesh: Mesh
    sequence: int
    started_s: float

    def guard(self, call: Callable[[], Any]) -> Any:
        """Return what `call` returns, or raise a CommError and abort the mesh."""
        try:
            return call()
        except RuntimeError as error:  # torch has one class for all that can happen here
            text = _GLOO_NOISE.sub("", str(error).split("\n", 1)[0])
            kind: type[CommError] = PeerLostError
            if self.mesh.is_aborted:
                kind, text = CommAbortedError, "this rank's mesh was aborted"
            elif "imed out" in text or "timeout" in text.lower():
                kind = CommTimeoutError
                text = f"no answer in time ({text})"
            self.mesh.abort()
            raise self.error(kind, text, peer=self._peer_in(text)) from error

    def error(self, kind: type[CommError], detail: str, peer: int | None = None) -> CommError:
        """Return an error of this call."""
        return kind(
            op=self.op,
            axis=self.axis.name,
            group=f"{self.axis.name}@{self.mesh.generation}",
            rank=self.mesh.rank,
            sequence=self.sequence,
            peer=peer,
            elapsed_s=time.monotonic() - self.started_s,
            detail=detail,
        )

    def _peer_in(self, text: str) -> int | None:
        """Return the rank whose address gloo names; it knows of no ranks.

        gloo prints the two bytes of a port in the order of the network (torch 2.13): 58744 as
        30949.
        """
        found = set()
        for host, port in _ADDRESS.findall(text):
            first, second = divmod(int(port), 256)
            for number in (int(port), 256 * second + first):
                found.add(self.mesh.rank_at((host.removeprefix("::ffff:"), number)))
        found.discard(None)
        return found.pop() if len(found) == 1 else None


class Handle:
    """Stand for an operation under way; its tensors may be touched after `wait`."""

    def __init__(
        self,
        call: Call,
        works: Sequence[dist.Work] = (),
        *,
        finish: Callable[[], None] | None = None,
    ) -> None:
        self._call = call
        self._works = list(works)
        self._finish = finish

    def then(self, finish: Callable[[], None]) -> "Handle":
        """Let `wait` call `finish`, too, when the operation is complete; return this handle."""
        before = self._finish

        def both() -> None:
            if before is not None:
                before()
            finish()

        self._finish = both
        return self

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the operation is complete (on CUDA: until the stream may go on).

        `timeout_s` counts from here; None leaves it to the mesh's time-out.

        Raises: CommError; the mesh is aborted then.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self._works:
            left = None if deadline_s is None else max(deadline_s - time.monotonic(), 0.001)
            work = self._works.pop()
            if left is None:
                self._call.guard(work.wait)
            else:
                self._call.guard(partial(work.wait, timedelta(seconds=left)))
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()


def start(
    op: str,
    axis: Axis,
    mesh: Mesh,
    post: Callable[[], Any],
    *,
    finish: Callable[[], None] | None = None,
) -> Handle:
    """Start what `post` posts, and return the handle of it; on one rank nothing is posted."""
    call = Call(op, axis, mesh, mesh.next_sequence(axis.name), time.monotonic())
    if axis.group is None:
        if axis.size > 1:
            raise call.error(CommAbortedError, "the mesh was left")
        return Handle(call, finish=finish)
    posted = call.guard(post)
    return Handle(call, posted if isinstance(posted, list) else [posted], finish=finish)
