"""Images decoded ahead in threads against the reference: the same steps, whatever the images and whatever happens."""

import concurrent.futures
import dataclasses
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.image_roots import (
    SMALL,
    assert_same,
    config_for,
    encoded,
    graphs,
    needs_dali,
    opened,
    photo_config,
    photo_root,
    photograph,
    photographs,
    steps_of,
    threaded,
    with_data,
)  # fmt: skip
from tests.data_roots import REAL, needs_real
from tests.small_runs import log_of, make_world, rows, small_config, state_hash
from unit_fast.config import to_json
from unit_fast.data.images import decoded_steps as reader_module
from unit_fast.data.images.checked import CheckedImages, Facts
from unit_fast.data.images.dali import DecodeFailed
from unit_fast.data.images.decode import stamp
from unit_fast.data.images.decoded_steps import TorchvisionDecoder
from unit_fast.data.loader import Loader
from unit_fast.run.train import train


@needs_real
@graphs
def test_real_samples_of_every_image_task(graph):
    config = config_for(REAL, "coco", "vg", "vqa2", "snli_ve", "qqp", data={"engine": "torchvision"})
    reference = steps_of(config)
    assert len({s.task for s in reference}) == 5
    assert_same(threaded(config, 12, graph), reference)


@graphs
def test_generated_samples_of_every_task(tmp_path, graph):
    config = small_config(make_world(tmp_path / "world"), "coco", "vg", "vqa2", "snli_ve", "qnli", accumulate=2)
    reference = steps_of(config, stop=40)
    assert len({s.task for s in reference}) == 5
    assert_same(threaded(config, 40, graph), reference)


def odd_images() -> dict[str, bytes]:
    """What data sets hold besides colour JPEGs."""
    image = photograph(60, 80, 1)
    grey16 = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16)) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "grey.jpg": encoded(image.convert("L")),
        "cmyk.jpg": encoded(image.convert("CMYK")),
        "turned.jpg": encoded(image, exif=exif),
        "progressive.jpg": encoded(image, progressive=True),
        "444.jpg": encoded(image, subsampling=0),
        "16bit.png": encoded(grey16, "PNG"),
        "palette.png": encoded(image.quantize(16), "PNG", transparency=3),
        "alpha.png": encoded(image.convert("RGBA"), "PNG"),
        "rgb.png": encoded(image, "PNG"),
        "bits.png": encoded(image.convert("1"), "PNG"),
        "png_called.jpg": encoded(image, "PNG"),
    }


@graphs
def test_odd_images_are_read_as_the_reference_reads_them(tmp_path, graph):
    images = odd_images()
    config = photo_config(tmp_path, images)
    reference = steps_of(config)
    assert not any(s.bad for s in reference)
    assert {i for s in reference for b in s.batches for i in b.sample_ids} == set(range(1, len(images) + 1))
    assert_same(threaded(config, 12, graph), reference)


@graphs
def test_faulty_images_are_replaced_by_the_reference_rule(damaged, graph):
    config = config_for(damaged, "coco", data={**SMALL, "engine": "torchvision"})
    reference = steps_of(config, stop=100)
    assert len({path for s in reference for path, _ in s.bad}) == 10
    assert_same(threaded(config, 100, graph), reference)
    assert_same(threaded(config, 100, graph), reference)  # with DALI from what was found out before


@needs_dali
def test_training_goes_through_a_faulty_root_and_names_each_path_once(damaged, tmp_path):
    config = small_config(make_world(tmp_path / "world"), "coco", steps=100)
    data = dataclasses.replace(config.data, root=str(damaged), engine="dali", max_bad_share=0.2)
    run = train(dataclasses.replace(config, data=data), tmp_path / "run", progress="none")
    assert run.status == "finished"
    bad = json.loads((run.folder / "summary.json").read_text())["bad_images"]
    lines = [line for line in log_of(run.folder).splitlines() if "unreadable image" in line]
    assert len(lines) == 10
    assert len({line.split("unreadable image: ")[1].split(":")[0] for line in lines}) == 10
    assert bad["by_task"]["detection_coco"] >= 10
    log = log_of(run.folder)
    assert "decoded by dali" in log
    assert re.search(r"wait \d+% \|.* loader [\d.e+]+ images/s", log)
    assert re.search(r"loader: 200 images at [\d.e+]+ a second; padding coco \d+%", log)
    for row in rows(run.folder):
        assert row["loader_images_per_s"] > 0
        assert 0 <= row["padding"] < 0.6
        assert 0 <= row["data_wait"] <= 1


def trust(config, *names, plain=True):
    """Make the record say that these images are fine."""
    checked = CheckedImages(Path(os.environ["XDG_CACHE_HOME"]) / "unit_fast", config.data.max_pixels)
    folder = Path(config.data.root) / "coco/images/train2017"
    for name in names:
        checked._remember(str(folder / name), Facts(stamp(folder / name), 60, 80, plain))
    checked.close()


HALF = encoded(photograph(60, 80, 5))
HALF = HALF[:600] + bytes(len(HALF) - 600)


@needs_dali
@pytest.mark.parametrize(
    ("changed", "bad", "line"),
    [
        ({"5.jpg": HALF, "7.jpg": b"x" * 500}, {"5.jpg", "7.jpg"}, "7.jpg"),
        ({"5.jpg": encoded(photograph(80, 60, 5))}, {"5.jpg"}, "5.jpg: changed after it was checked"),
    ],
    ids=["unreadable", "of another size than its annotation says"],
)
def test_an_image_that_changed_behind_the_records_back_costs_one_pipeline(tmp_path, caplog, changed, bad, line):
    """Same path, size and time."""
    config = photo_config(tmp_path, photographs(12) | changed)
    reference = steps_of(config, stop=20)
    assert {Path(path).name for s in reference for path, _ in s.bad} == bad
    trust(config, *changed)
    with caplog.at_level(logging.WARNING, "unit_fast.data"):
        assert_same(steps_of(with_data(config, engine="dali"), stop=20), reference)
    assert caplog.text.count(line) == 1


@needs_dali
def test_an_image_only_pillow_can_decode_is_left_to_it(tmp_path, caplog, monkeypatch):
    images = photographs(8)
    config = photo_config(tmp_path, images)
    reference = steps_of(config, stop=12)
    spoiled = Path(config.data.root) / "coco/images/train2017/3.jpg"
    real = reader_module.read_bytes
    monkeypatch.setattr(reader_module, "read_bytes", lambda path: b"?" if path == spoiled else real(path))
    with caplog.at_level(logging.WARNING, "unit_fast.data"):
        assert_same(steps_of(with_data(config, engine="dali"), stop=12), reference)
    assert caplog.text.count("Pillow can and does") == 1


@needs_dali
def test_a_pipeline_that_fails_without_an_offender_is_an_error(tmp_path, monkeypatch):
    config = photo_config(tmp_path, photographs(1), "dali", batch=1)

    def failing(self):
        raise reader_module.DecodeFailed("out of luck")

    monkeypatch.setattr(reader_module.Pipeline, "take", failing)
    monkeypatch.setattr(reader_module.DecodedSteps, "_decodes", lambda self, path: True)
    with pytest.raises(RuntimeError, match="decodes each image of the batches alone"):
        steps_of(config)


@needs_dali
def test_images_that_vanish_while_training_are_replaced(tmp_path):
    images = photographs(12)
    config = photo_config(tmp_path, images, "dali")
    steps_of(config, stop=3)
    (tmp_path / "root/coco/images/train2017/4.jpg").unlink()
    steps = steps_of(config, stop=12)
    assert {Path(path).name for s in steps for path, _ in s.bad} == {"4.jpg"}
    assert all("no such file" in message for s in steps for _, message in s.bad)


@pytest.mark.parametrize("content", [b"?", b"", encoded(photograph(60, 80, 0))[:700]])
def test_torchvisions_decoder_says_what_it_cannot_decode(content):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        decoder = TorchvisionDecoder(pool)
        decoder.feed([content], [None])
        with pytest.raises(DecodeFailed):
            decoder.take()


READ = """
    import hashlib, json, sys
    from unit_fast.config import load_config
    from tests.data.image_roots import opened
    from unit_fast.data.loader import Loader
    config, start, stop, out = load_config(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    counts = json.loads(sys.argv[5])
    with open(out, "a") as file, Loader(opened(config), config, start, stop, counts) as loader:
        for step in loader:
            digest = hashlib.sha256()
            for batch in step.batches:
                for name, value in sorted(batch.tensors().items()):
                    digest.update(value.contiguous().numpy().tobytes())
            row = [step.request.step, step.task, step.request.samples, [b.sample_ids for b in step.batches]]
            file.write(json.dumps([*row, digest.hexdigest()]) + "\\n")
            file.flush()
"""


def reading(config, path, start, stop, counts):
    settings = path.with_suffix(".config.json")
    settings.write_text(to_json(config))
    command = [sys.executable, "-c", textwrap.dedent(READ), settings, str(start), str(stop), path, json.dumps(counts)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[3], env=os.environ | {"OMP_NUM_THREADS": "1"})


def rows_of(path):
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@needs_dali
def test_a_thousand_batches_across_kills_and_resumes(damaged, tmp_path, tmp_path_factory):
    """Ids and pixels are those of an uninterrupted reading, also where the record of images was empty the first time
    and full the second."""
    world = make_world(tmp_path / "world")
    config = small_config(world, "coco", "vqa2", "sst2", data={"engine": "dali"})
    paths = config.data.paths | {
        "coco.train_annotations": str(damaged / "coco/annotations/instances_train2017.json"),
        "coco.train_images": str(damaged / "coco/images/train2017"),
    }
    config = with_data(config, paths=paths, max_bad_share=0.2)
    assert reading(config, tmp_path / "whole", 0, 1000, {}).wait(300) == 0
    whole = rows_of(tmp_path / "whole")
    assert len(whole) == 1000
    parts = tmp_path / "parts"
    for wanted in (150, 600, 1000):
        done = rows_of(parts)
        parts.write_text("".join(json.dumps(row) + "\n" for row in done))  # a line cut short by the kill goes
        counts = Counter()
        for _, task, samples, *_ in done:
            counts[task] += samples
        process = reading(config, parts, len(done), 1000, counts)
        while process.poll() is None and (wanted == 1000 or len(rows_of(parts)) < wanted):
            time.sleep(0.02)
        if wanted < 1000:
            process.send_signal(signal.SIGKILL)
        process.wait()
    assert rows_of(parts) == whole


@needs_dali
def test_a_resumed_run_ends_in_the_same_state(tmp_path, one_thread):
    config = small_config(make_world(tmp_path / "world"), data={"engine": "dali"})
    train(config, tmp_path / "whole", progress="none")
    train(config, tmp_path / "parts", progress="none", stop_at=9)
    train(config, tmp_path / "parts", "auto", progress="none")
    assert state_hash(tmp_path / "parts") == state_hash(tmp_path / "whole")


@needs_dali
def test_reading_leaves_the_random_numbers_and_threads_alone(tmp_path):
    config = small_config(make_world(tmp_path / "world"), "coco", data={"engine": "dali"})
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    steps_of(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@needs_dali
def test_a_loader_left_early_ends_its_threads(tmp_path):
    config = small_config(make_world(tmp_path / "world"), "coco", "vqa2", data={"engine": "dali"})
    before = threading.active_count()
    for _ in range(3):
        with Loader(opened(config), config, 0, 10_000, {}) as loader:
            next(loader)
    assert threading.active_count() <= before


@needs_dali
def test_memory_stays_bounded(tmp_path):
    """10,000 samples: the process does not grow after the first thousand."""
    images = {f"{i:03d}.jpg": encoded(photograph(60, 80, i % 9)) for i in range(100)}
    config = with_data(photo_config(tmp_path, images, "dali", batch=10), workers=2)
    sizes = []
    with Loader(opened(config), config, 0, 1000, {}) as loader:
        for number, _ in enumerate(loader):
            if number in (100, 999):
                sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert sizes[1] - sizes[0] < 40 * 2**20


@needs_dali
def test_grouping_reads_the_same_samples_in_each_pass_and_pads_less(tmp_path):
    rng = np.random.default_rng(0)
    folder = photo_root(tmp_path / "root", {f"{i:03d}.jpg": b"" for i in range(64)})
    annotations = folder / "coco/annotations/instances_train2017.json"
    content = json.loads(annotations.read_text())
    for record in content["images"]:
        height, width = [int(side) for side in rng.integers(60, 120, 2)]
        record |= {"height": height, "width": width}
        (folder / "coco/images/train2017" / record["file_name"]).write_bytes(encoded(photograph(height, width, 1)))
    annotations.write_text(json.dumps(content))
    plain = config_for(folder, "coco", data={**SMALL, "max_side": 128, "engine": "dali", "group": 1})
    grouped = with_data(plain, group=4)
    a, b = steps_of(plain, stop=48), steps_of(grouped, stop=48)

    def ids(steps):
        return [i for s in steps for batch in s.batches for i in batch.sample_ids]

    assert ids(a) != ids(b)
    for begin in range(0, 192, 64):  # three passes
        assert sorted(ids(b)[begin : begin + 64]) == list(range(1, 65))
    for begin in range(0, 192, 16):  # a stretch of 4 batches of 4
        assert sorted(ids(a)[begin : begin + 16]) == sorted(ids(b)[begin : begin + 16])
    shares = [np.mean([s.real for s in steps]) for steps in (a, b)]
    assert shares[1] > shares[0] + 0.05
    resumed = steps_of(grouped, 21, 48, {"detection_coco": 21 * 4})
    assert ids(resumed) == ids(b)[21 * 4 :]


def test_texts_are_grouped_by_length(tmp_path):
    config = small_config(make_world(tmp_path / "world"), "qqp", batch_per_process=8, data={"group": 1})
    shares = [np.mean([s.real for s in steps_of(with_data(config, group=group), stop=40)]) for group in (1, 8)]
    assert shares[1] > shares[0]


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_the_reference(tmp_path):
    """Decoded on the CPU, placed on the GPU, on a stream of their own."""
    config = small_config(make_world(tmp_path / "world"), "coco", "vg", "vqa2", "snli_ve", "qnli")
    reference = steps_of(config, stop=60)
    with Loader(opened(config), config, 0, 60, {}, device=torch.device("cuda")) as loader:
        for step, expected in zip(loader, reference, strict=True):
            assert all(value.is_cuda for batch in step.batches for value in batch.tensors().values())
            step.batches = [batch.to("cpu") for batch in step.batches]
            torch.cuda.synchronize()
            assert_same([step], [expected])
