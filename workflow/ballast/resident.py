"""Memory that processes hold, as limits count it: in MB, 10^6 bytes. Imports no torch.

Anonymous and shared memory count. Pages of files do not: the kernel drops them when it needs room,
and a checkpoint that is mapped while it is loaded would count twice.
"""

from __future__ import annotations

import contextlib
import re

import psutil

from ballast.orphans import marked, seldom

COUNTED = re.compile(rb"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.M)


def held_mb(process: int) -> float:
    """Memory that a process holds, MB; all that is resident where the system tells no parts.

    Raises psutil.Error if there is no such process.
    """
    found: list[bytes] = []
    with contextlib.suppress(OSError), open(f"/proc/{process}/status", "rb") as stream:
        found = COUNTED.findall(stream.read())
    if found:
        return sum(map(int, found)) * 1024 / 1e6
    return psutil.Process(process).memory_info().rss / 1e6


class Family:
    """A process and its descendants, also those that left it, which bear a mark.

    Who belongs to it is found out every few seconds, as that reads all of /proc.
    """

    def __init__(self, process: int, mark: str) -> None:
        self.process, self.mark = process, mark
        self.members = {process}
        self._look = seldom(self._find)

    def held_mb(self) -> float:
        """Memory that all of them hold, MB."""
        self._look()
        total = 0.0
        for member in self.members:
            with contextlib.suppress(psutil.Error):
                total += held_mb(member)
        return total

    def _find(self) -> None:
        found = {self.process} | marked(self.mark)
        with contextlib.suppress(psutil.Error):
            # Also those that dropped their environment, and the mark with it.
            found |= {c.pid for c in psutil.Process(self.process).children(recursive=True)}
        self.members = found
