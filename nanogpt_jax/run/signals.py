"""SIGINT, SIGTERM, SIGHUP: the first asks a run to save and stop, the second ends it at once.

No JAX. After nohup SIGHUP stays ignored.
"""

import contextlib
import os
import signal
import socket
import threading
import time

NUMBERS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
SAME_S = 0.5  # a signal repeated within it is the same one, sent to the group and by a wrapper


class StopSignals:
    """Handles these signals while it is entered.

    A thread listens too, since Python runs no handler while the main thread compiles, which may
    take minutes: until there is something to save, the first signal ends the process at once.
    """

    def __init__(self):
        self.number = 0  # of the first signal received; 0: none yet
        self.may_save = False  # the first signal is left to the main thread, which saves

    def __enter__(self) -> "StopSignals":
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]  # of a lost one it says no
        heard = NUMBERS
        if signal.getsignal(NUMBERS[-1]) == signal.SIG_IGN:  # by nohup
            heard = NUMBERS[:2]
        self._handlers = {number: signal.signal(number, self._note) for number in heard}
        self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._sender.close()
        self._thread.join()
        self._receiver.close()

    def _note(self, number: int, frame) -> None:
        self.number = self.number or number
        if signal.Signals(number).name == "SIGHUP":  # the terminal may be gone: nothing is shown
            for fd in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

    def _listen(self) -> None:
        n_signals, last, last_s = 0, 0, 0.0
        while number := int.from_bytes(self._receiver.recv(1)):  # empty, so 0, once it is closed
            now_s = time.monotonic()
            is_repeated = number == last and now_s - last_s < SAME_S
            if number not in NUMBERS or is_repeated:
                continue
            n_signals, last, last_s = n_signals + 1, number, now_s
            name = signal.Signals(number).name
            if self.may_save and n_signals == 1:
                _write(f"\n{name}: saving, then stopping; a second one ends at once\n")
                continue
            state = "without saving" if self.may_save else "there is nothing to save"
            _write(f"\n{name}: ended at once, {state}\n")
            os._exit(128 + number)


def _write(line: str) -> None:
    # Not print: the signal may have interrupted it, and it cannot be entered twice.
    with contextlib.suppress(OSError):  # whoever read it may have got the signal too
        os.write(2, line.encode())
