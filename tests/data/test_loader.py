"""Batches: the same whoever reads them, unreadable images replaced by rule, no hang."""

import collections
import dataclasses
import os
import signal
import time

import numpy as np
import pytest
import torch

from tests.data.image_roots import content, steps_of
from tests.small_runs import ALL, make_world, small_config
from unit_fast.config import RunConfig
from unit_fast.data import BadImage
from unit_fast.data.bad_images import BadImages
from unit_fast.data.fetch import MOST_TRIES, Step
from unit_fast.data.loader import Loader
from unit_fast.data.sampler import Request
from unit_fast.errors import UserError
from unit_fast.tasks import get_task

COCO, SST2 = "detection_coco", "glue_sst2"


class Made:
    """A data set whose samples say which visit made them."""

    def __init__(self, name, size, bad=(), slow=None):
        self.task, self.size, self.bad, self.slow = get_task(name), size, set(bad), slow

    def __len__(self):
        return self.size

    def get(self, index, key):
        if index in self.bad:
            raise BadImage(f"/images/{index}.jpg", "cut short")
        if self.slow is not None:
            time.sleep(self.slow)
        sample = {"sample_id": index}
        if not self.task.has_image:
            sample["label"] = index % 2
        else:
            sample |= {"image": torch.full((3, 8, 8), float(key % 1000)), "orig_size": (8, 8), "image_id": index}
            sample |= {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
        if self.task.has_text:
            ids = torch.arange(3 + index % 3)
            sample |= {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
        return sample


def config(**changes) -> RunConfig:
    data = {"engine": "torchvision"} | changes.pop("data", {})
    base = RunConfig(seed=1, batch_per_process=3, ratios={COCO: 0.5, SST2: 0.5}, **changes)
    return dataclasses.replace(base, data=dataclasses.replace(base.data, **data))


def sets(**changes):
    return {COCO: Made(COCO, 10, **changes), SST2: Made(SST2, 7)}


def read(datasets, config, start=0, stop=12, counts=None):
    with Loader(datasets, config, start, stop, counts or {}) as loader:
        return list(loader)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_batches_with_any_number_of_workers(workers):
    alone = read(sets(bad=[4]), config(accumulate=2))
    found = read(sets(bad=[4]), config(accumulate=2, data={"workers": workers}))
    assert content(found) == content(alone)
    assert [step.bad for step in found] == [step.bad for step in alone]
    assert any(step.bad for step in alone), "armed"


def test_workers_read_the_same_pixels_and_words_of_every_task(tmp_path):
    root = make_world(tmp_path / "world")
    found = []
    for workers in (0, 2):
        settings = small_config(root, *ALL, data={"workers": workers})
        found.append(content(steps_of(settings, stop=60)))
    assert found[0] == found[1]
    assert len({task for task, *_ in found[0]}) == 8


def test_a_resumed_loader_goes_on_where_the_optimiser_was():
    whole = read(sets(), config())
    counts = collections.Counter()
    for step in whole[:7]:
        counts[step.task] += step.request.samples
    assert content(read(sets(), config(), 7, 12, counts)) == content(whole[7:])


def test_every_sample_is_read_once_a_pass():
    steps = read(sets(), config(), stop=40)
    ids = [i for s in steps if s.task == COCO for b in s.batches for i in b.sample_ids]
    assert sorted(ids[:10]) == sorted(ids[10:20]) == list(range(10))
    assert ids[:10] != ids[10:20]


def test_accumulation_gives_batches_of_one_task():
    for step in read(sets(), config(accumulate=3)):
        assert [b.task for b in step.batches] == [step.task] * 3
        assert [len(b) for b in step.batches] == [3] * 3


def test_text_is_padded_to_the_batch_or_to_the_full_length():
    settings = config()
    short = {b.input_ids.shape[1] for s in read(sets(), settings) if s.task == SST2 for b in s.batches}
    assert max(short) <= 5
    full = dataclasses.replace(settings, data=dataclasses.replace(settings.data, pad_text=True))
    assert {b.input_ids.shape[1] for s in read(sets(), full) if s.task == SST2 for b in s.batches} == {128}


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_random_numbers_alone(workers):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    read(sets(), config(data={"workers": workers}))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bad_image_is_replaced_and_the_rest_is_unchanged():
    good, bad = read(sets(), config(), stop=20), read(sets(bad=[4]), config(), stop=20)
    replaced = 0
    for a, b in zip(good, bad):
        for x, y in zip(a.batches, b.batches):
            for i, j in zip(x.sample_ids, y.sample_ids):
                assert j != 4 or a.task == SST2
                if a.task == COCO and i == 4:
                    replaced += 1
                else:
                    assert i == j
    assert replaced > 0
    assert sum(len(s.bad) for s in bad) >= replaced
    assert all(s.images_read == 0 for s in bad if s.task == SST2)


def test_a_path_is_reported_once_and_counted_each_time():
    book = BadImages(max_share=1.0)
    messages = []
    steps = read(sets(bad=[4, 6]), config(), stop=30)
    for step in steps:
        messages += book.add(step)
    assert len(messages) == 2
    assert all("/images/" in m and "coco" in m for m in messages)
    assert book.by_task.total() == sum(len(s.bad) for s in steps) > 2
    assert book.state() == {"read": sum(s.images_read for s in steps), "by_task": {COCO: book.by_task[COCO]}}


def test_too_large_a_share_fails_with_share_count_and_paths():
    book = BadImages(max_share=0.01)
    steps = read(sets(bad=[4, 6]), config(), stop=30)
    with pytest.raises(UserError, match=r"[6-9] of \d+ images read .* share of 0.01 .*/images/.*--data.max-bad-share"):
        collections.deque(map(book.add, steps))


def test_a_root_with_just_the_share_allowed_is_read_to_the_end_and_one_with_twice_as_much_is_not():
    rng = np.random.default_rng(0)

    def ends(share, reads=40_000):
        book = BadImages(max_share=0.01)
        for number, bad in enumerate(rng.random(reads) < share):
            found = [(f"/images/{number}.jpg", "cut short")] if bad else []
            try:
                book.add(Step(Request(step=number, task=COCO, micro=()), [], images_read=1, bad=found))
            except UserError:
                return number
        return None

    # Four deviations: of 1 in 30,000 looks at an even chance more than allowed, and looks follow each other closely.
    assert [ends(0.01) for _ in range(20)].count(None) >= 19
    # 0.01 n > 4 (0.01 n) ** 0.5 from 1600 images on; by 4000 it is beyond doubt.
    assert all(stop is not None and stop < 4000 for stop in (ends(0.02) for _ in range(20)))


def test_one_bad_image_among_the_first_hundred_is_no_share_yet():
    book, steps = BadImages(max_share=0.01), read(sets(bad=[4]), config(), stop=30)
    first = next(s for s in steps if s.bad)
    assert book.add(first)
    with pytest.raises(UserError, match="max-bad-share"):
        BadImages(max_share=0.0).add(first)


def test_a_data_set_without_any_readable_image_is_given_up():
    with pytest.raises(UserError, match=f"detection_coco: {MOST_TRIES} images in a row"):
        read(sets(bad=range(10)), config())


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_of_the_data_reach_the_user_in_one_line(workers):
    class Refused(Made):
        def get(self, index, key):
            raise UserError("annotations.json: box 7 has negative width")

    with pytest.raises(UserError, match="^annotations.json: box 7 has negative width$"):
        read({SST2: Refused(SST2, 5)}, RunConfig(data=config(data={"workers": workers}).data))


def test_an_empty_data_set_is_refused_by_name():
    with pytest.raises(UserError, match="glue_sst2.*no samples"):
        read({SST2: Made(SST2, 0)}, RunConfig())


@pytest.mark.parametrize("where", ["in the loader", "in the step"])
def test_a_killed_worker_is_an_error_that_names_the_data_set(where):
    begun = time.monotonic()
    datasets = {SST2: Made(SST2, 50, slow=0.02)}
    settings = RunConfig(data=config(data={"workers": 1}).data)

    def run():
        with Loader(datasets, settings, 0, 10_000, {}) as loader:
            next(loader)
            (worker,) = loader.reader.processes
            os.kill(worker.pid, signal.SIGKILL)
            if where == "in the step":
                time.sleep(5)
            for _ in loader:
                pass

    with pytest.raises(UserError, match=r"a loader process died; being read: glue_sst2, step \d+ .*--data.workers"):
        run()
    assert time.monotonic() - begun < 30


def test_closing_ends_the_workers():
    with Loader({SST2: Made(SST2, 50)}, RunConfig(data=config(data={"workers": 2}).data), 0, 1000, {}) as loader:
        next(loader)
        workers = list(loader.reader.processes)
        assert all(w.is_alive() for w in workers)
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_workers_outlive_a_signal_to_the_process_group():
    """Ctrl-C reaches them too; the training process must be able to save first."""
    with Loader({SST2: Made(SST2, 50)}, RunConfig(data=config(data={"workers": 1}).data), 0, 60, {}) as loader:
        next(loader)
        (worker,) = loader.reader.processes
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
        assert len(list(loader)) == 59
