"""What signals do to a command while there is nothing to save; without imports that take time."""

import atexit
import os
import signal
import threading

RESUME_STATUS = 75  # as in s3a.support.errors, which takes seconds to import
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


def end_at_signals() -> None:
    """Makes signals end this process at once and silently, with status 75, wherever no run is under way to be saved.

    That is until a run begins, and again when it is done. It takes a thread: a handler in Python would have to wait for
    a library that is being loaded, or for other processes that are to be connected and never come.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while os.read(reader, 1)[0] not in SIGNALS:
            pass
        os._exit(RESUME_STATUS)

    threading.Thread(target=watch, daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, lambda *_: None)  # without a handler nothing is written to the pipe
    signal.set_wakeup_fd(writer)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    # Python puts back what signals do by default before a process is gone; by then the status is decided.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])
