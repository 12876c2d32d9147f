"""SIGTERM and SIGINT as a flag that the loop polls, so that it saves before it ends; or the end at once."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

STOPPED = 143
"""Exit code of a program that was asked to end, and has saved what there was to save."""

LOOK_AGAIN = 0.1
"""Seconds between two looks whether a save that was under way at the signal has ended."""


class Preemption:
    """SIGTERM and SIGINT set a flag, so that the loop saves and ends. A second one ends at once, with STOPPED.

    `with Preemption() as preemption: ... if preemption.stop(step): save and leave`. Enter it in the main thread, after
    jax.distributed.initialize.

    safe_to_exit: is nothing lost if the process ends right now? Asked from the first signal on until the loop has noticed
    it, and once that is True the process ends there and then: a compilation may hold the loop for minutes. A thread
    listens, since Python's own handlers wait for the main thread to come back from XLA.

    With jax.distributed, SIGTERM belongs to JAX, whose service makes all processes stop at the same call of `stop`: a
    handler of ours would hide the signal from it and let one process leave alone. So safe_to_exit is not asked there.
    Afterwards SIGTERM is ours: JAX does not tell which process got the first one, so the second that comes then ends.
    """

    def __init__(self, safe_to_exit: Callable[[], bool] = lambda: False):
        self.safe_to_exit = safe_to_exit
        self.requested = False
        self._noticed = False
        self._distributed = False
        self._calls = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Preemption installs signal handlers: enter it in the main thread")
        self._distributed = jax.distributed.is_initialized()
        listening, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        # The system's handler writes the signal's number there at once, whatever the main thread does.
        self._previous_bell = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, args=(listening,), name="signals", daemon=True)
        self._listener.start()
        for number in (signal.SIGINT,) if self._distributed else (signal.SIGTERM, signal.SIGINT):
            self._take(number)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_bell)
        os.close(self._bell)
        self._listener.join()
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
            if self.requested:
                self._take(signal.SIGTERM)
        self._noticed = self._noticed or self.requested
        return self.requested

    def _take(self, number: int) -> None:
        self._previous[number] = signal.getsignal(number)  # before the handler: _listen heeds what is in here
        signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        """In the main thread, once it runs Python again. What more there is to do, _listen does."""
        del number, frame
        if not self._distributed:
            self.requested = True

    def _listen(self, bell: int) -> None:
        asked: signal.Signals | None = None
        while True:
            waiting = asked is not None and not self._noticed and not self._distributed
            if waiting:
                self._leave_if_nothing_is_lost(asked)
            if not select.select([bell], [], [], LOOK_AGAIN if waiting else None)[0]:
                continue
            numbers = os.read(bell, 64)
            if not numbers:  # closed: __exit__
                os.close(bell)
                return
            for number in numbers:
                if number in self._previous:
                    if asked is not None:
                        _leave(f"{signal.Signals(number).name} again: exit at once")
                    asked = signal.Signals(number)
                    self._answer(asked)

    def _leave_if_nothing_is_lost(self, number: signal.Signals) -> None:
        if self.safe_to_exit():
            _leave(f"{number.name}: nothing unsaved, exit at once; run the same command again to go on")

    def _answer(self, number: signal.Signals) -> None:
        if not self._distributed:
            self._leave_if_nothing_is_lost(number)
        os.write(2, f"\n{number.name}: saving, then stopping (once more: exit at once)\n".encode())
        if not self._distributed:
            self.requested = True
        elif not self._noticed:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's service tells the others.


def _leave(words: str) -> NoReturn:
    """Ends the process from any thread, whatever the others do."""
    os.write(2, f"\n{words}\n".encode())
    os._exit(STOPPED)
