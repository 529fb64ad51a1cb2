"""The signals that ask a run to stop."""

import contextlib
import signal


class Interrupted(BaseException):
    """Raised inside a forward pass of an evaluation when the run was asked to stop."""


class Stop:
    """Whether the run was asked to stop: Ctrl-C, SIGTERM or SIGHUP (the terminal was closed, unless ``nohup`` holds it
    off), once. The loop looks between two steps.

    The handler does nothing but set ``requested``. A second Ctrl-C raises ``KeyboardInterrupt`` at once.
    """

    def __init__(self):
        self.requested: str | None = None
        self.before = {}

    def __enter__(self):
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self.before[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: signals are somebody else's affair
            self.before = {}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self.requested = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def interrupting(self, *models):
        """Within the block a forward pass of one of ``models`` raises ``Interrupted`` once a stop was asked for.

        An evaluation can take longer than a scheduler waits.
        """

        def look(*_):
            if self.requested:
                raise Interrupted

        handles = [model.register_forward_pre_hook(look) for model in models]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
