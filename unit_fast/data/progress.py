"""A bar on the terminal for work that takes long."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, shown: bool, *, of_bytes: bool = False, stderr: bool = False
) -> Iterator[Callable[[int], None]]:
    """A function that is told how much more is done; without ``shown`` it draws nothing."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*(columns if of_bytes else ()), console=Console(stderr=stderr), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
