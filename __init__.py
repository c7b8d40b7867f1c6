"""Diffusion policies for offline reinforcement learning; mdpt.data, mdpt.models and mdpt.mdpt are its three floors."""

import os
import signal


def main() -> None:
    """Run the command `mdpt`. Ctrl-C ends it in one line from the first moment on, also while modules are imported."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)
    from mdpt.mdpt import app

    try:
        app()
    finally:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # all is done: a signal now would only disturb Python's own end
                signal.signal(getattr(signal, name), signal.SIG_IGN)


def _leave(number: int, frame: object) -> None:
    os.write(2, b"mdpt: interrupted\n")
    os._exit(128 + number)  # an exception inside a half-imported module would surface as a different error
