"""Forward passes side by side in one thread, each stopped wherever the model comes to a door.

A pass that is stopped keeps everything it had on its own stack, whatever the model hands from layer to layer: hidden
states, masks, recurrent states, the outputs of earlier layers. So nothing needs to be known about the model's forward
to run it layer by layer for a whole data set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

Door = TypeVar("Door")


class Lane(Generic[Door]):
    """One forward pass, which runs only while someone waits for it to come to its next door.

    Attributes:
        door: where it is stopped; None before it starts and after it has ended.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self.door: Door | None = None
        self._greenlet = greenlet(run)

    def go_on(self, answer: Any = None) -> None:
        """Let it run to its next door or to its end. Whatever it raises is raised here.

        Args:
            answer: what `stop_at` returns to the pass.
        """
        self._greenlet.parent = getcurrent()
        door = self._greenlet.switch(answer) if self._greenlet else self._greenlet.switch()
        self.door = None if self._greenlet.dead else door

    def end(self) -> None:
        """Have it end where it is."""
        self.door = None
        if self._greenlet:
            self._greenlet.parent = getcurrent()
            self._greenlet.throw(GreenletExit)


def stop_at(door: Any) -> Any:
    """Called inside a lane: wait at a door; returns the answer that `go_on` brings."""
    lane = getcurrent()
    if lane.parent is None:
        raise RuntimeError("only a pass in a lane can stop at a door")
    return lane.parent.switch(door)
