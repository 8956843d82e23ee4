"""What a person sees: the text on standard output, as it comes, and the seconds that are spoken on standard error."""

from __future__ import annotations

import sys

SHOWN_CHARACTERS = 2000
"""Of the end of a text, above the bar."""


class Display:
    """Text and a bar. On a terminal that shows both, the text is above the bar while it comes; elsewhere it is written
    at once, and there is no bar without a terminal.

    Args:
        speaks: whether there is a bar at all.
    """

    def __init__(self, speaks: bool) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._text, self._live = "", None
        if speaks and console.is_terminal:
            self._bar = Progress(
                TextColumn("spoken"), BarColumn(), TextColumn("{task.completed:.1f} s in"), TimeElapsedColumn()
            )
            self._task = self._bar.add_task("spoken", total=None)
            self._live = Live(
                self._bar, console=console, transient=True, redirect_stdout=False, vertical_overflow="visible"
            )
            self._live.start()
        self._above = self._live is not None and sys.stdout.isatty()  # else two would write over each other

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        """End the text with a line end, and remove the bar."""
        if self._live is not None:
            self._live.stop()
        sys.stdout.write((self._text if self._above else "") + "\n")
        sys.stdout.flush()

    def add(self, text: str) -> None:
        """Show more text."""
        if self._live is None or not self._above:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        from rich.console import Group
        from rich.text import Text

        self._text += text
        self._live.update(Group(Text(self._text[-SHOWN_CHARACTERS:]), self._bar))

    def spoken(self, seconds: float) -> None:
        """Move the bar to so many seconds of speech in all."""
        if self._live is not None:
            self._bar.update(self._task, completed=seconds)
