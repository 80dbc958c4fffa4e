"""A step on a GPU as a CUDA graph: recorded once an epoch, then started as a whole.

A distillation step of VBPR is some 400 operations of a few microseconds each, so a GPU waits for the host to start them. A graph starts all of
them by one call. What is recorded are addresses and shapes: the batch of every step is copied to where the recorded step reads it, and a step
must be the same operations every time, without the host looking at any of their results
(:attr:`ckd_fed.backbones.base.Backbone.static_steps`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ckd_fed.training.batches import Packed
from ckd_fed.training.means import Numbers

EAGER = 2  # steps before the recorded one: the first of an epoch may build a graph, the second what is kept of it; libraries and Adam set up


Step = Callable[[Packed], Numbers]


class Recorder(Protocol):
    """What records work on a device and does it again."""

    def run(self, work: Callable[[], Numbers]) -> Numbers:
        """Do it now, where recordings are done."""

    def record(self, work: Callable[[], Numbers]) -> Callable[[], Numbers]:
        """What does the same work on the same memory again; its results are overwritten by the next time. Recording does not do it."""


class CudaRecorder:
    """Records CUDA graphs, on a stream of its own.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], Numbers]) -> Numbers:
        """Do it now, on the stream that graphs are recorded on: what it sets up belongs to that."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                result = work()
            current.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Numbers]) -> Callable[[], Numbers]:
        """A CUDA graph's replay."""
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread of the process, a logger or a second node, may use a GPU meanwhile
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = work()

        def replay() -> Numbers:
            graph.replay()
            return result

        return replay


class Captured:
    """The steps of one epoch: the first ones as they are, the rest as one recording.

    A recording is for one epoch: what a backbone draws or rebuilds in :meth:`Backbone.start_epoch` lies elsewhere in the next.

    Args:
        step: takes one step and leaves nothing behind but moved parameters.
        recorder: of the device.
    """

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self._step = step
        self._recorder = recorder
        self._taken = 0
        self._recorded: tuple[Packed, Callable[[], Numbers]] | None = None  # where the recorded step reads its batch, and what does it again

    def __call__(self, packed: Packed) -> Numbers:
        """Take a step. All of an epoch are of the same sizes.

        Raises:
            RuntimeError: torch cannot record the step.
        """
        self._taken += 1
        if self._taken <= EAGER:
            return self._recorder.run(lambda: self._step(packed))
        if self._recorded is None:
            read = packed.copy()
            self._recorded = read, self._recorder.record(lambda: self._step(read))
        read, replay = self._recorded
        for to, values in zip(read.tensors, packed.tensors, strict=True):
            to.copy_(values)
        return replay().copy()  # the next step overwrites them
