"""What the NVIDIA driver says when `nvidia-smi` asks it. Imports no torch."""

from __future__ import annotations

import subprocess

SECONDS = 30.0  # how long it may take; on some machines it wakes eight GPUs first


def nvidia_smi(*arguments: str) -> str | None:
    """What `nvidia-smi` prints; None if it is missing, fails, or hangs for longer than SECONDS."""
    try:
        child = subprocess.Popen(
            ["nvidia-smi", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
    except OSError:
        return None
    try:
        text, _ = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        # Not waited for: inside a driver that hangs, not even SIGKILL ends it.
        child.kill()
        return None
    return text if child.returncode == 0 else None
