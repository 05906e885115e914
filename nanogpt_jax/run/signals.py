"""SIGINT and SIGTERM: the first asks a run to save and stop, the second ends it at once. No JAX."""

import contextlib
import os
import signal
import socket
import threading
import time

NUMBERS = (signal.SIGINT, signal.SIGTERM)
SAME_S = 0.5  # within it a signal is the same again: to the whole group, and passed on by a wrapper


class StopSignals:
    """Hears both signals while it is entered, in place of what heard them before.

    A thread hears them too, since Python runs no handler as long as the main thread compiles, which
    may take minutes: until there is something to save, the first signal ends the process at once.
    """

    def __init__(self):
        self.number = 0  # of the first signal that came; 0: none yet
        self.may_save = False  # whether the first is left to the main thread

    def __enter__(self) -> "StopSignals":
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._handlers = [signal.signal(number, self._note) for number in NUMBERS]
        self._wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in zip(NUMBERS, self._handlers, strict=True):
            signal.signal(number, handler)
        self._told.close()
        self._thread.join()
        self._heard.close()

    def _note(self, number: int, frame) -> None:
        del frame
        self.number = self.number or number

    def _hear(self) -> None:
        n_signals, last, last_s = 0, 0, 0.0
        while number := int.from_bytes(self._heard.recv(1)):  # empty, so 0, when it is closed
            if number not in NUMBERS:  # another one, whose handler is not ours
                continue
            now_s = time.monotonic()
            if number == last and now_s - last_s < SAME_S:
                continue
            n_signals, last, last_s = n_signals + 1, number, now_s
            name = signal.Signals(number).name
            if self.may_save and n_signals == 1:
                line = f"\n{name}: saving, then stopping; a second one ends at once\n"
                _tell(line)
                continue
            state = "without saving" if self.may_save else "there is nothing to save"
            _tell(f"\n{name}: ended at once, {state}\n")
            os._exit(128 + number)


def _tell(line: str) -> None:
    # Not print: that may be what the signal interrupted, and cannot be entered twice.
    with contextlib.suppress(OSError):  # whoever read it may have got the signal too
        os.write(2, line.encode())
