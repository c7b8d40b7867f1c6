"""Diffusion policies for offline reinforcement learning; mdpt.data, mdpt.models and mdpt.mdpt are its three floors."""

import sys


def main() -> None:
    """The command `mdpt`, which Ctrl-C ends well from the start: what it needs takes a moment to import."""
    try:
        from mdpt.mdpt import app

        app()
    except KeyboardInterrupt:
        print("mdpt: interrupted", file=sys.stderr)
        sys.exit(130)
