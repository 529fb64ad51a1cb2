"""Standard output and error that never fail: what is printed tells of the work, it must not end it."""

import io
import os
import sys


class Nowhere(io.TextIOBase):
    """A stream that drops what it gets."""

    def write(self, text: str) -> int:
        return len(text)


class Console:
    """A text stream around ``stream``, None: whatever ``sys.stdout`` is at the time.

    What the stream's encoding cannot show is escaped. Once the stream refuses (the reader has gone, the terminal was
    closed, the disk is full), ``lost`` says why and the rest is dropped.
    """

    def __init__(self, stream=None):
        self._own, self._lost = stream, None

    @property
    def stream(self):
        """The stream behind it; None where the process was started without."""
        return sys.stdout if self._own is None else self._own

    @property
    def lost(self) -> str | None:
        """Why nothing is written any more."""
        return self._lost or getattr(self.stream, "lost", None)

    def write(self, text: str) -> int:
        if self.stream is not None and not self._lost:
            try:
                self._write(text)
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self._give_up(error)
        return len(text)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        if self.stream is not None and not self._lost:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._lost = getattr(error, "strerror", None) or str(error)
        try:
            # What the stream still holds would be tried again, and fail, when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError, AttributeError):  # closed, or no file of the system
            pass

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except ValueError:
            return False

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def open_standard_files() -> None:
    """Open descriptors 0 to 2 where the process was started without, on nothing: the next file that is opened would
    get the number, and with it what is printed below Python."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
