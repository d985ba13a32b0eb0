"""Progress of a cell: a bar with loss and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from tqdm import tqdm

from ballast.escape import one_line

LINE_EVERY = 10.0  # seconds between lines of a log
PIPE = "BALLAST_PROGRESS"  # file descriptor to which a supervised cell tells its steps
SLOTS = 64
FAULT = "fault: "


class Progress:
    """Shows the steps of one cell on standard error, and tells them to a supervisor."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.started = self.shown = time.monotonic()
        self.first: int | None = None
        self.bar: tqdm | None = None
        # Its own, whatever a method does with the process's.
        self.stream = _copy_of_stderr()
        pipe = os.environ.get(PIPE)
        self.pipe = int(pipe) if pipe else None
        self._tell("began\n")

    def step(self, step: int, total: int, loss: float) -> None:
        """One optimiser step done, with its loss."""
        self._tell(f"{step} {total} {loss}\n")
        if self.pipe is None and self.stream.isatty():
            if self.bar is None:
                self.bar = new_bar(self.label, total, step - 1, 0)
            move_bar(self.bar, step, loss)
            return
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = step - 1, now
        if now - self.shown >= LINE_EVERY or step == total:
            self.shown = now
            rate = (now - self.started) / max(1, step - self.first - 1)
            left = rate * (total - step)
            self.note(f"step {step}/{total}, loss {loss:.4f}, {left:.0f} s left")

    def note(self, text: str) -> None:
        """A line about the cell; lost where the log's disk is full."""
        with contextlib.suppress(OSError):
            print(f"{self.label}: {text}", file=self.stream, flush=True)

    def fault(self, text: str) -> None:
        """Why the cell has no result, in a line that the supervisor shows, too."""
        text = one_line(text)
        self.note(text)
        # Short enough that a pipe takes it as a whole.
        self._tell(f"{FAULT}{text[:900]}\n")

    def _tell(self, text: str) -> None:
        if self.pipe is not None:
            with contextlib.suppress(OSError):
                os.write(self.pipe, text.encode())


def _copy_of_stderr() -> IO[str]:
    try:
        return os.fdopen(os.dup(sys.stderr.fileno()), "w")
    except (AttributeError, OSError, ValueError):  # a notebook's has no descriptor
        return sys.stderr


def new_bar(label: str, total: int, initial: int, position: int) -> tqdm:
    """A bar that shows whatever the environment says about the bars of libraries."""
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit="step",
        position=position,
        leave=False,
        disable=False,
        dynamic_ncols=True,
    )


def move_bar(bar: tqdm, step: int, loss: float) -> None:
    """Set a bar to a step and its loss; close it at the end."""
    bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    bar.update(step - bar.n)
    if step >= bar.total:
        bar.close()


class Watcher:
    """The supervisor's side: draws the bar of a child on a line that no other cell uses."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: tqdm | None = None
        self.slot: IO[str] | None = None
        self.position = 0
        self.began, self.said = False, ""
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        # A child that outpaces a stopped supervisor must not wait for the pipe.
        os.set_blocking(self.write, False)
        self.shown = sys.stderr.isatty()

    def look(self) -> None:
        """Move the bar to what the child last said."""
        try:
            text = os.read(self.read, 1 << 20).decode()
        except BlockingIOError:
            return
        self.began = self.began or bool(text)
        said = [line for line in text.splitlines() if line.startswith(FAULT)]
        self.said = said[-1].removeprefix(FAULT) if said else self.said
        lines = [line.split() for line in text.splitlines() if not line.startswith(FAULT)]
        complete = [line for line in lines if len(line) == 3]
        if not (complete and self.shown):
            return
        step, total, loss = complete[-1]
        if self.bar is None:
            self._take_slot()
            self.bar = new_bar(self.label, int(total), int(step) - 1, self.position)
        move_bar(self.bar, int(step), float(loss))

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.close()
        if self.slot is not None:
            self.slot.close()
        os.close(self.read)
        os.close(self.write)

    def _take_slot(self) -> None:
        """The first line of the terminal that no cell of this user holds.

        The top one where that cannot be told: another's folder, or a disk that takes no file.
        """
        folder = Path(tempfile.gettempdir()) / f"ballast-{os.getuid()}"
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            for position in range(SLOTS):
                slot = (folder / f"bar{position}").open("w")
                try:
                    fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    slot.close()
                    continue
                self.slot, self.position = slot, position
                return
