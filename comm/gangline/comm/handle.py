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
        """Return the rank whose address gloo names; it knows of no ranks."""
        for host, port in _ADDRESS.findall(text):
            peer = self.mesh.rank_at((host.removeprefix("::ffff:"), int(port)))
            if peer is not None:
                return peer
        return None


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
