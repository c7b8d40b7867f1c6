"""Diffusion policies for offline reinforcement learning; mdpt.data, mdpt.models and mdpt.mdpt are its three floors."""

import os
import signal


def main() -> None:
    """The command `mdpt`, which Ctrl-C ends well from the start: what it needs takes a moment to import."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)
    from mdpt.data import ENDS
    from mdpt.mdpt import app

    try:
        app()
    finally:
        for number in ENDS:
            signal.signal(number, signal.SIG_IGN)  # all is done: nothing is left to end but Python


def _leave(number: int, frame: object) -> None:
    os.write(2, b"mdpt: interrupted\n")
    os._exit(128 + number)  # an exception would come out of modules that are half imported as many another
