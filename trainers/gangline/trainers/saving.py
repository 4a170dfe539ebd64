"""The trainer's side of checkpoints: when to save, and what to make of what became of a save."""

from collections.abc import Callable
from typing import Any

from gangline.comm.errors import PeerLostError
from gangline.comm.mesh import Mesh
from gangline.trainers.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointEvent,
    StaleGenerationError,
    State,
)
from gangline.trainers.stopwatch import Stopwatch


class Saving:
    """Save at the steps that are due, and pass on what became of it."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        mesh: Mesh,
        *,
        every_steps: int,
        on_event: Callable[[CheckpointEvent], None],
    ) -> None:
        self._checkpointer = checkpointer
        self._mesh = mesh
        self._every_steps = every_steps
        self._on_event = on_event
        self._newest_event: CheckpointEvent | None = None

    def save_if_due(
        self, step: int, state: State, extra: dict[str, Any], *, is_last: bool
    ) -> dict[str, float]:
        """Save every n steps and at the end; return the time that the training stood still.

        Communicates: see Checkpointer.save.
        """
        watch = Stopwatch()
        if is_last or step % self._every_steps == 0:
            self._checkpointer.save(step, state, extra)
        watch.lap("checkpoint_stall")
        return watch.parts_s

    def pass_on_events(self) -> None:
        """Hand over what has come in.

        Raises: StaleGenerationError when a newer generation runs: this one must end.
        """
        for event in self._checkpointer.poll():
            self._newest_event = event
            self._on_event(event)
            if event.is_fenced:
                raise StaleGenerationError(
                    f"generation {self._mesh.generation} may no longer commit: a newer one runs; "
                    "end this process or join the newer generation"
                )

    def await_last(self, step: int) -> None:
        """Wait until the save of the last step is committed.

        Raises: PeerLostError when a peer was lost before that; CheckpointError when the
        checkpoint could not be written.
        """
        self._checkpointer.wait()
        self.pass_on_events()
        event = self._newest_event
        if event is None or event.step != step or event.status != "failed":
            return
        if self._mesh.is_aborted:
            raise PeerLostError(
                op=f"checkpoint of step {step}",
                axis="checkpoint",
                rank=self._mesh.rank,
                elapsed_s=event.parts_s.get("total", 0.0),
                detail=event.reason,
            )
        raise CheckpointError(
            f"the last checkpoint, of step {step}, was not committed: {event.reason}"
        )
