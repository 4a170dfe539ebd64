"""End a rank's wait on its peers, from another thread.

On gloo by shutting down the sockets (see sockets.py); on NCCL by the backend's own abort.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from gangline.comm import sockets

# How long `abort` goes on to break what a forming mesh still opens.
_INSIST_S = 5.0


class AbortSwitch:
    """Break whatever the mesh that holds this waits for: once, and for good.

    Make one before `Mesh.join` to be able to end the join; pulled before it, the join fails at
    once.
    """

    def __init__(self) -> None:
        self._pulled = threading.Event()
        self._settled = threading.Event()  # no join is under way
        self._settled.set()
        self._break: Callable[[], None] = _nothing

    @property
    def is_pulled(self) -> bool:
        return self._pulled.is_set()

    def abort(self) -> None:
        """Break every wait, from any thread, more than once if need be.

        Returns at once when the mesh stands; when it is still forming, as soon as the joining
        thread has given up.
        """
        self._pulled.set()
        self._break()
        # A group that is being formed may be about to open its next connection.
        deadline = time.monotonic() + _INSIST_S
        while not self._settled.wait(0.01) and time.monotonic() < deadline:
            self._break()

    @contextlib.contextmanager
    def while_joining(self, store: sockets.Address, *, opened_since: set[int]) -> Iterator[None]:
        """Let `abort` break connections to the store and those of half-made groups meanwhile.

        Raises: RuntimeError when it was pulled before or during the join.
        """

        def break_joining() -> None:
            ends = [store, *sockets.listening_addresses(opened_since=opened_since)]
            sockets.shut_down(sockets.connections_between(ends, opened_since=opened_since))

        self._break = break_joining
        self._settled.clear()
        try:
            self._refuse_if_pulled()
            yield
            self._refuse_if_pulled()
        finally:
            self._settled.set()

    def breaks(
        self,
        connections: set[int],
        groups: Sequence[dist.ProcessGroup | None],
        device: torch.device,
    ) -> None:
        """Say what `abort` breaks from now on: these sockets, and the groups' NCCL backends."""

        def break_groups() -> None:
            sockets.shut_down(connections)
            for group in groups if device.type == "cuda" else ():
                if group is not None:
                    with contextlib.suppress(RuntimeError):  # the gloo-only checkpoint group
                        group._get_backend(device).abort()

        self._break = break_groups

    def forget(self) -> None:
        """Let go of the groups, which are about to be destroyed."""
        self._break = _nothing

    def _refuse_if_pulled(self) -> None:
        if self._pulled.is_set():
            raise RuntimeError("the join was aborted")


def _nothing() -> None:
    """Stand for what there is to break when there is nothing."""
