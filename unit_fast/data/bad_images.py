"""How many images were unreadable, and whether that is more than a run bears; what else is odd about images."""

import collections

from unit_fast.data.fetch import Step
from unit_fast.errors import UserError, printable


class BadImages:
    """Counts unreadable images and stops the run when they are certainly more than a share of those read."""

    JUDGED_FROM = 100
    """So many images are taken as read when fewer were: one bad image in the first twenty is no share yet."""

    def __init__(self, max_share: float, read: int = 0, by_task: dict[str, int] | None = None):
        self.max_share, self.read, self.by_task = max_share, read, collections.Counter(by_task or {})
        self.paths: dict[str, str] = {}
        self._turned_told = False

    def add(self, step: Step) -> list[str]:
        """Count ``step``. Returns one message for each path not met before. ``UserError`` above the share."""
        self.read += step.images_read
        self.by_task[step.task] += len(step.bad)
        new = {path: message for path, message in step.bad if path not in self.paths}
        self.paths.update(new)
        count = self.by_task.total()
        if count > self.tolerated():
            first = "; ".join(printable(message) for message in list(self.paths.values())[:3])
            raise UserError(
                f"{count} of {self.read} images read could not be decoded, more than the share of {self.max_share:g} "
                f"allowed (first: {first}). Repair them (`unit-fast data check ROOT --decode` lists them all) or raise "
                "--data.max-bad-share"
            )
        return [f"{printable(message)}; replaced by another sample of {step.task}" for message in new.values()]

    def told(self, step: Step) -> list[str]:
        """Count ``step``; the lines to log of it."""
        lines = [f"unreadable image: {message}" for message in self.add(step)]
        return lines + list(filter(None, [self.turned(step)]))

    def turned(self, step: Step) -> str:
        """What to say when ``step`` is the first with an image that viewers turn; empty otherwise."""
        if self._turned_told or not step.turned:
            return ""
        self._turned_told = True
        return (
            f"{printable(step.turned[0], 400)}: its EXIF orientation says that viewers turn it. Training takes images "
            "as they are stored, which the boxes of the published data sets refer to; predict turns them. Where boxes "
            "were drawn on the image as viewers show it, store the images upright"
        )

    def tolerated(self) -> float:
        """Bad images among those read that ``max_share`` explains: so many are expected, and four deviations more.

        Images come at random: of a root with just that share bad, every second stretch has more.
        """
        expected = self.max_share * max(self.read, self.JUDGED_FROM)
        return expected + 4 * expected**0.5

    def state(self) -> dict:
        return {"read": self.read, "by_task": {k: v for k, v in self.by_task.items() if v}}
