"""One provider in a process of its own, told what to do line by line."""

import json
import os
import sys
import time

import torch

from benchmarks.data.processes import cpu_seconds
from benchmarks.data.providers import Opened, Spec
from benchmarks.runner.timing import synchronize
from unit_fast.batch import Batch


class Server:
    """Does what ``bench_data`` asks for; each method's result is the answer, a dict for JSON."""

    opened: Opened | None = None

    def open(self, **spec) -> dict:
        """Open a provider (``Spec``), after closing the one before."""
        self.close()
        self.opened = Opened(Spec(**spec))
        return {"who": self.opened.describe()}

    def run(self, settle: int, count: int) -> dict:
        """Read ``settle`` batches, then ``count`` that are timed. CPU seconds are those of the whole process tree."""
        opened = self.opened
        opened.take(settle)
        checked, cpu, begun = opened.checked, cpu_seconds(os.getpid()), time.perf_counter()
        images = opened.take(count)
        seconds = time.perf_counter() - begun
        cpu = cpu_seconds(os.getpid()) - cpu
        found = opened.checked
        return {
            "seconds": seconds, "images": images, "cpu_seconds": cpu, "checked": found and found - checked,
        }  # fmt: skip

    def first(self, count: int, **spec) -> dict:
        """Open a provider and read ``count`` batches at once: nothing is left out of the time but the annotations."""
        self.open(**spec)
        begun = time.monotonic() - self.opened.seconds
        images = self.opened.take(count)
        return {"seconds": time.monotonic() - begun, "images": images, "checked": self.opened.checked}

    def save(self, count: int, path: str) -> dict:
        """The next ``count`` batches to a file."""
        batches = [{name: x.cpu().clone() for name, x in next(self.opened.batches).items()} for _ in range(count)]
        torch.save(batches, path)
        return {"batches": count}

    def train(self, settle: int, count: int) -> dict:
        """Real updates on the batches: how long the loop waits for them, the device being idle by then."""
        from benchmarks.step.problems import mmf_config
        from benchmarks.step.updates import Training

        opened = self.opened
        training = Training(opened.dataset.task.name, mmf_config(opened.spec.quick), opened.device)

        def update(batch: dict) -> None:
            training.eager_update([Batch(task=training.task, **batch)])

        for _ in range(settle):
            update(next(opened.batches))
        waited, images, begun = 0.0, 0, time.perf_counter()
        for _ in range(count):
            synchronize(opened.device)
            asked = time.perf_counter()
            batch = next(opened.batches)
            waited += time.perf_counter() - asked
            images += len(batch["image"])
            update(batch)
        synchronize(opened.device)
        return {"seconds": time.perf_counter() - begun, "waited": waited, "images": images}

    def close(self) -> dict:
        """End the provider's workers; what it found out about images is written."""
        if self.opened is not None:
            self.opened.close()
            self.opened = None
        return {}


def main() -> None:
    """Answer requests (a JSON object a line: ``do``, and arguments) on the standard streams until they end."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed
    cores = int(sys.argv[1])
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[:cores])
    torch.set_num_threads(min(cores, len(allowed)))
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(getattr(server, request.pop("do"))(**request)) + "\n")
        answers.flush()
    server.close()


if __name__ == "__main__":
    main()
