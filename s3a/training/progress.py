"""How far a loop is: a bar where stderr is a terminal, and in a log a line every few minutes."""

import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

FIRST_LINE, NEXT_LINES = 10, 180  # seconds: soon how fast it is, and then a log of a week in a few hundred kilobytes


class ProgressDisplay:
    """Shows how many steps of a loop are done. A context, which ends the bar.

    Args:
        total: steps of the loop.
        done: those that are done already.
        unit: what a step is called.
        show: whether to show anything, as on one of several processes.
    """

    def __init__(self, total: int, *, done: int = 0, unit: str = "step", show: bool = True) -> None:
        self.total, self.done, self.unit = total, done, unit
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.writes_lines = show and sys.stderr is not None and not terminal
        disable = not (show and terminal)
        self.bar = tqdm(total=total, initial=done, unit=unit, smoothing=0.05, leave=False, disable=disable)
        self.started, self.first = time.monotonic(), done
        self.next_line = self.started + FIRST_LINE

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.bar.close()

    def advance(self, place: str, words: str) -> None:
        """Counts a step.

        Args:
            place: where in the loop it is, such as "epoch 2/28".
            words: what else is known, such as the loss.
        """
        self.done += 1
        self.bar.set_description(place, refresh=False)
        self.bar.set_postfix_str(words, refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.writes_lines and now >= self.next_line:
            self.next_line = now + NEXT_LINES
            left = (self.total - self.done) * (now - self.started) / (self.done - self.first)
            line = f"{place}, {self.unit} {self.done} of {self.total}: {words}, {format_duration(left)} left"
            print(line, file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3 h 5 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 24:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
