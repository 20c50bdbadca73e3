"""Work of a GPU that is the same each time: captured as a CUDA graph, and replayed."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymem.errors import first_line

# Eager steps before the capture: libraries choose their kernels and take their memory.
WARM_UP = 3


@functools.cache
def say_once(text: str) -> None:
    """One line for the log of this process."""
    logging.getLogger("raymem").warning(text)


class Replayed:
    """A step of a GPU: taken eagerly a few times, then captured as a CUDA graph and replayed.

    The eager steps are steps of the training, no rehearsal. Where the capture fails, or the model
    draws from Python's or numpy's generators, which a graph would freeze, all steps are eager.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.taken = step, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.refused = False
        self._side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, pixels: Tensor | None = None) -> None:
        """One step; all that it reads is on the device already."""
        if self.graph is None and not self.refused and self.taken >= WARM_UP:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        elif self.refused:
            self.step()
        else:
            self._warm_up()
        self.taken += 1

    def _warm_up(self) -> None:
        before = _python_draws()
        # Capturing needs what autograd did before to be on a stream of its own.
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self.step()
        torch.cuda.current_stream().wait_stream(self._side)
        if _python_draws() != before:
            self._refuse("the model draws from Python's or numpy's generator")

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does that cannot be captured
            torch.cuda.synchronize()
            self._refuse(first_line(error))
            return
        self.graph = graph

    def _refuse(self, why: str) -> None:
        self.refused = True
        say_once(f"steps are not captured as a CUDA graph, and slower for it: {why}")


def _python_draws() -> tuple[object, ...]:
    state = np.random.get_state()
    return random.getstate(), bytes(state[1]), state[2]  # type: ignore[index]
