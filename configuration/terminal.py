"""The last line of a terminal: what the program is doing, a bar of how far its job is, and when that will be done."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable

from recollect.configuration.console import NOW, LastingStream
from recollect.configuration.waiting import time_last

ERASE = "\r\x1b[2K"
LEAST_BAR, MOST_BAR = 8, 30


def draw_until(ended: threading.Event, *streams: LastingStream) -> None:
    """Draws the line below what `streams` write (the last one gets it), five times a second, until the program has
    `ended`; erases it then."""
    drawn = LastLine(streams)
    while not ended.wait(0.2):
        drawn.draw()
    drawn.erase()


class LastLine:
    """A line that is erased before anything is written to the streams, and drawn again later."""

    def __init__(self, streams: tuple[LastingStream, ...]):
        self._errors, self._write = streams[-1], streams[-1].write
        self._lock = threading.RLock()
        self._shown, self._within_text = "", False
        self._text = LineText(bars="━─" if _prints(streams[-1], "━─") else "#-")
        for stream in streams:
            stream.write = self._erasing(stream.write)  # type: ignore[method-assign,assignment]

    def draw(self) -> None:
        """Draws the line as it is now; not beside a line of text that is still being written."""
        text = self._text.line(time.monotonic(), shutil.get_terminal_size().columns - 1)
        with self._lock:
            if not self._within_text and text != self._shown:
                self._write(ERASE + text)
                self._errors.flush()
                self._shown = text

    def erase(self) -> None:
        """Erases the line where one is."""
        with self._lock:
            if self._shown:
                self._write(ERASE)
                self._errors.flush()
                self._shown = ""

    def _erasing(self, write: Callable[[str], int]) -> Callable[[str], int]:
        def erase_and_write(text: str) -> int:
            with self._lock:
                self.erase()
                self._within_text = not text.endswith("\n") if text else self._within_text
                return write(text)

        return erase_and_write


class LineText:
    """The text of the line; remembers where the job began for this process, from which follows when it ends."""

    def __init__(self, bars: str):
        self._bars = bars
        self._total, self._begun = 0, (0, 0.0)
        self._status, self._asked = "", -1.0

    def line(self, now: float, width: int) -> str:
        """Returns what is being done, in at most `width` characters: without its status where that has no room, and
        without a bar where that has none either."""
        seconds = now - NOW.since
        what = f"{NOW.what}, {duration(seconds)}{time_last()}" if seconds >= 1 else NOW.what
        if NOW.job is None:
            return what[:width]
        done, total, status = NOW.job
        if total != self._total or done < self._begun[0]:
            self._total, self._begun, self._asked = total, (done, now), -1.0
        if now - self._asked > 1:
            self._asked, self._status = now, status()
        ends = f" {min(1.0, done / max(total, 1)):4.0%}{self._left(done, now)}"
        for text in (f"{what}  {self._status}", what):
            room = width - len(text) - len(ends) - 1
            if room >= LEAST_BAR:
                return f"{text} {self._bar(done / max(total, 1), min(MOST_BAR, room))}{ends}"
        return f"{what}{ends}"[:width]

    def _left(self, done: int, now: float) -> str:
        first, begun = self._begun
        if not first < done < self._total:
            return ""
        return f", {duration((now - begun) * (self._total - done) / (done - first))} left"

    def _bar(self, share: float, width: int) -> str:
        done = round(min(1.0, share) * width)
        return self._bars[0] * done + self._bars[1] * (width - done)


def duration(seconds: float) -> str:
    """Returns "5 s", "3 min" or "2 h 10 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _prints(stream: LastingStream, characters: str) -> bool:
    try:
        characters.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
