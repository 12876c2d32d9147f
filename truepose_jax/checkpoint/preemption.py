"""SIGTERM and SIGINT as a flag that the loop polls, so that it saves before it ends."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """SIGTERM and SIGINT set a flag, so that the loop saves and ends. A second one exits at once with 143.

    `with Preemption() as preemption: ... if preemption.stop(step): save and leave`. Enter it in the main
    thread, after jax.distributed.initialize. With jax.distributed, SIGTERM belongs to JAX, whose service
    makes all processes stop at the same call of `stop`: a handler of ours would hide the signal from it and
    let one process leave alone.
    """

    def __init__(self):
        self.requested = False
        self._distributed = False
        self._interrupted = False
        self._calls = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Preemption installs signal handlers: enter it in the main thread")
        self._distributed = jax.distributed.is_initialized()
        for number in (signal.SIGINT,) if self._distributed else (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def stop(self, step: int) -> bool:
        """Should the run save and end now? Once True, always True.

        Call it every step, and inside evaluation and sampling too: equally often on every process.
        """
        del step  # JAX wants a number that grows with every call, and a step does not inside an evaluation.
        if self._distributed and not self.requested:
            self._calls += 1
            self.requested = bool(multihost_utils.reached_preemption_sync_point(self._calls))
        return self.requested

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        name = signal.Signals(number).name
        if self._interrupted:
            os.write(2, f"\n{name} again: exit at once, nothing saved\n".encode())
            os._exit(143)
        self._interrupted = True
        os.write(2, f"\n{name}: saving, then stopping (once more: exit at once)\n".encode())
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's service tells the others.
        else:
            self.requested = True
