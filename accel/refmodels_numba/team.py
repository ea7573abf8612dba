"""Threads that run a program together. Not Numba's: its default layer aborts when two Python threads call at once."""

import os
import threading
from queue import SimpleQueue
from typing import Any

import numpy as np

from refmodels.op import Array
from refmodels_numba import native
from refmodels_numba.packing import address

Job = tuple[Array, Array, int]


def default_threads() -> int:
    """OMP_NUM_THREADS or NUMBA_NUM_THREADS if one is set to a number, else the processors that this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        value = os.environ.get(variable, "").split(",")[0].strip()
        if value.isdigit() and int(value) > 0:
            return min(int(value), available)
    return available


class Team:
    """The calling thread and `threads` - 1 workers.

    Several Python threads may call at once: a worker takes one job after another, and a caller whom nobody joins does all of
    its job alone. The GIL is released while a program runs.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._own = threading.local()
        self._start = threading.Lock()
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # threads do not survive a fork

    def _reset(self) -> None:
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._workers = 0

    def run(self, program: Array, scratch: int, *, alone: bool = False) -> None:
        """Run the instructions of `program`, each thread with `scratch` bytes of memory of its own."""
        job = program, np.zeros(len(program) + 1, np.int64), scratch
        if not alone and self.threads > 1:
            self._summon()
            for _ in range(self.threads - 1):
                self._jobs.put(job)
        self._execute(job)

    def _execute(self, job: Job) -> None:
        program, counters, scratch = job
        memory = getattr(self._own, "memory", None)
        if memory is None or memory.nbytes < scratch + 64:
            memory = self._own.memory = np.empty(scratch + 64, np.uint8)
        start = address(memory)
        native.execute(address(program), len(program), address(counters), start + -start % 64)

    def _summon(self) -> None:
        if self._workers < self.threads - 1:
            with self._start:
                while self._workers < self.threads - 1:
                    threading.Thread(target=self._work, args=(self._jobs,), name="refmodels_numba", daemon=True).start()
                    self._workers += 1

    def _work(self, jobs: "SimpleQueue[Any]") -> None:
        while True:
            self._execute(jobs.get())
