"""Which task a step trains and which samples it reads: pure functions of the seed and counters (SPEC 5.1).

Nothing here has a state to restore: a checkpoint holds the step and, for each data set, the number of samples the
optimiser has consumed; everything else follows. Ratios go by name and every pass over a data set has its own
permutation, which depends on the seed (SPEC quirks 22 to 24 are thereby absent).
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from unit_fast.errors import UserError, nearest


@dataclass(frozen=True)
class Visit:
    """One sample of one pass: ``index`` into the data set, and ``key``, the seed of this visit's augmentation."""

    index: int
    pass_: int
    key: int


def _hash(*parts) -> bytes:
    """16 bytes that depend on every part, the same on every machine and in every version."""
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()


def _word(*parts) -> int:
    return int.from_bytes(_hash(*parts)[:8], "little")


def seed_of(seed: int, purpose: str) -> int:
    """A seed (63 bits) for ``purpose`` that follows from the run's."""
    return _word(seed, purpose) >> 1


def normalised(ratios: dict[str, float], tasks) -> dict[str, float]:
    """Sampling probability of each of ``tasks``, in sorted order, from ``ratios`` by name.

    A task without a ratio, a ratio for an unknown task, negative or all-zero ratios are a ``UserError``. With no ratios
    at all every task is equally likely.
    """
    tasks = sorted(tasks)
    if not tasks:
        raise UserError("no task to train: name at least one with --tasks")
    if not ratios:
        return {name: 1 / len(tasks) for name in tasks}
    for name in tasks:
        if name not in ratios:
            raise UserError(f"ratios: none for {name!r}; {nearest(name, ratios)}. Give each trained task one")
        if not 0 <= ratios[name] < float("inf"):
            raise UserError(f"ratios.{name}: {ratios[name]} is not a probability; give a number of at least 0")
    total = sum(ratios[name] for name in tasks)
    if total <= 0:
        raise UserError(f"ratios: all of {', '.join(tasks)} are 0; give one of them a positive ratio")
    return {name: ratios[name] / total for name in tasks}


def task_of_step(seed: int, step: int, ratios: dict[str, float]) -> str:
    """The task that ``step`` trains: a function of the seed, the step and the ratios, whatever the order of the names.

    ``ratios`` are renormalised. The same on every process.
    """
    names = sorted(ratios)
    total = sum(ratios[name] for name in names)
    left = _word(seed, "task", step) / 2**64 * total
    for name in names:
        left -= ratios[name]
        if left < 0:
            return name
    return [name for name in names if ratios[name] > 0][-1]  # rounding of the sum


@functools.lru_cache(maxsize=32)
def order(seed: int, dataset: str, pass_: int, n: int) -> np.ndarray:
    """Permutation [n] int64 in which pass number ``pass_`` reads a data set of ``n`` samples. Do not write to it."""
    # Sorting raw Philox words: their stream is guaranteed for good, that of numpy's shuffles is not (NEP 19).
    key = int.from_bytes(_hash(seed, "order", dataset, pass_), "little")
    words = np.random.Philox(key=key).random_raw(n)
    permutation = np.argsort(words, kind="stable")
    permutation.setflags(write=False)
    return permutation


def augmentation_key(seed: int, dataset: str, pass_: int, index: int) -> int:
    """Seed (63 bits) of the random choices for sample ``index`` in pass ``pass_``."""
    return _word(seed, "augment", dataset, pass_, index) >> 1


def visits(seed: int, dataset: str, n: int, start: int, count: int) -> list[Visit]:
    """The ``count`` samples that follow the first ``start`` ones ever read from a data set of ``n`` samples.

    A batch may begin in one pass and end in a later one, so none is left out, also where the data set is smaller than
    the batch. An empty data set is a ``UserError``.
    """
    if n <= 0:
        raise UserError(f"{dataset}: the training split has no samples; check its files with `unit-fast data check`")
    found = []
    for position in range(start, start + count):
        pass_, place = divmod(position, n)
        index = int(order(seed, dataset, pass_, n)[place])
        found.append(Visit(index, pass_, augmentation_key(seed, dataset, pass_, index)))
    return found


class Grouped:
    """``visits``, rearranged inside each stretch of ``batch * group`` samples so that batches are of one size.

    A stretch holds the same visits as without, those of one pass before those of the next: every sample is still read
    once a pass, and what stands at a position does not depend on how one got there. The visits of a pass are sorted by
    ``size`` (equal ones at random) and cut into batches, which are read in random order.
    """

    def __init__(self, seed: int, dataset: str, n: int, size: Callable[[int, int], tuple]):
        """size: (index, key of the visit) -> what is sorted by."""
        self.seed, self.dataset, self.n, self.size = seed, dataset, n, size
        self._latest: tuple = (None, ())

    def visits(self, start: int, count: int, batch: int, group: int) -> list[Visit]:
        """The ``count`` samples from position ``start`` on; both should be multiples of ``batch``."""
        stretch = batch * group
        found: list[Visit] = []
        for begin in range(start // stretch * stretch, start + count, stretch):
            low, high = max(start, begin) - begin, min(start + count, begin + stretch) - begin
            found += self._arranged(begin, batch, group)[low:high]
        return found

    def _arranged(self, begin: int, batch: int, group: int) -> list[Visit]:
        key = begin, batch, group
        if self._latest[0] != key:
            out: list[Visit] = []
            drawn = visits(self.seed, self.dataset, self.n, begin, batch * group)
            for _, same_pass in itertools.groupby(drawn, key=lambda visit: visit.pass_):
                by_size = sorted(same_pass, key=lambda v: (self.size(v.index, v.key), self._chance("equal", v)))
                # A batch may begin in one pass and end in the next; what is left beside it is cut into whole batches.
                lead = min(-len(out) % batch, len(by_size))
                whole = lead + (len(by_size) - lead) // batch * batch
                batches = [by_size[i : i + batch] for i in range(lead, whole, batch)]
                batches.sort(key=lambda members: self._chance("batch", members[0]))
                out += by_size[:lead] + [v for members in batches for v in members] + by_size[whole:]
            self._latest = key, out
        return self._latest[1]

    def _chance(self, purpose: str, visit: Visit) -> int:
        return _word(self.seed, purpose, self.dataset, visit.pass_, visit.index)


def substitute(seed: int, dataset: str, n: int, visit: Visit, attempt: int) -> Visit:
    """The sample to read instead of an unreadable one, on the ``attempt``-th (1, 2, ...) try.

    Any sample of the same data set may be drawn (neighbours often share an image). The cursor does not move: what
    follows is read as if nothing had happened.
    """
    index = _word(seed, "substitute", dataset, visit.pass_, visit.index, attempt) % n
    return Visit(index, visit.pass_, augmentation_key(seed, dataset, visit.pass_, index))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one step of one process reads: ``accumulate`` lists of visits, one a forward pass."""

    step: int
    task: str
    micro: tuple[tuple[Visit, ...], ...]
    processes: int = 1
    """Processes that share the step, each with visits of its own."""

    @property
    def samples(self) -> int:
        """Samples of the step, of all processes."""
        return self.processes * sum(map(len, self.micro))


def requests(
    config,
    sizes: dict[str, int],
    start: int,
    counts: dict[str, int],
    stop: int,
    *,
    shapes: dict[str, Callable[[int, int], tuple]] | None = None,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Request]:
    """What steps ``start`` to ``stop`` - 1 read.

    Args:
        sizes: samples of each trained data set.
        counts: samples of each already consumed at ``start``, by all processes together.
        shapes: data set -> what its visits are sorted by, see ``Grouped``, where ``config.data.group`` is above 1; data
            sets that are not in it are read as drawn.
        rank: which process of ``processes`` this is; all of them together read each sample once a pass. Without
            grouping a step of theirs is one of a single process with their whole batch.
    """
    ratios = normalised(config.ratios, sizes)
    counts = {name: counts.get(name, 0) for name in sizes}
    by_size = {name: Grouped(config.seed, name, sizes[name], size) for name, size in (shapes or {}).items()}
    for step in range(start, stop):
        task = task_of_step(config.seed, step, ratios)
        batch = config.batch_of(task)
        share = batch * processes
        first = counts[task]
        counts[task] += share * config.accumulate
        micro = []
        for k in range(config.accumulate):
            begin = first + k * share + rank * batch
            if task in by_size and config.data.group > 1 and batch > 1:
                read = by_size[task].visits(begin, batch, batch, config.data.group * processes)
            else:
                read = visits(config.seed, task, sizes[task], begin, batch)
            micro.append(tuple(read))
        yield Request(step=step, task=task, micro=tuple(micro), processes=processes)
