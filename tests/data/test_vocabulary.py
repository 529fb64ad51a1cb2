"""Which vocabulary a run reads its texts with, and that it is kept."""

import dataclasses

import pytest

from tests.data_roots import VOCABULARY, write
from unit_fast.config import RunConfig
from unit_fast.data.vocabulary import with_kept_vocabulary, with_vocabulary
from unit_fast.recipes import recipe

OTHER = [*VOCABULARY, "other"]
BERT = [*VOCABULARY, *"ABCDEF"]


def lines(path, pieces):
    return write(path, "\n".join(pieces) + "\n")


@pytest.fixture
def config(tmp_path) -> RunConfig:
    write(tmp_path / "root/train.csv", "text,label\n" + "".join(f"some words,{i}\n" for i in range(9)))
    asked = recipe("classify")
    return dataclasses.replace(asked, data=dataclasses.replace(asked.data, root=str(tmp_path / "root")))


def size(config: RunConfig) -> int:
    return config.model.text.vocab_size


def test_the_nearest_vocabulary_is_taken(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    made, (told,) = with_vocabulary(config, [tmp_path / "absent"], run)
    assert "word pieces made of 9 training texts" in told
    assert size(made) == len((run / "vocab.txt").read_text().splitlines())
    assert made.data.vocab == str((run / "vocab.txt").resolve())
    _, (told,) = with_vocabulary(dataclasses.replace(config, init_from="weights.safetensors"))
    assert "give their vocabulary with --vocab" in told

    lines(tmp_path / "root/bert/vocab.txt", VOCABULARY)
    found, (told,) = with_vocabulary(config, [tmp_path / "absent"], run)
    assert size(found) == len(VOCABULARY)
    assert found.data.vocab is None
    assert "root/bert/vocab.txt" in told

    other = lines(tmp_path / "other/vocab.txt", OTHER)
    found, _ = with_vocabulary(config, [tmp_path / "absent", other], run)
    assert size(found) == len(OTHER)
    assert (run / "vocab.txt").read_text() == other.read_text()

    given = dataclasses.replace(config.data, vocab=str(lines(tmp_path / "bert.txt", BERT)))
    found, _ = with_vocabulary(dataclasses.replace(config, data=given), [other], run)
    assert size(found) == len(BERT)
    assert found.data.vocab == given.vocab


def test_nothing_is_written_without_a_folder_and_nothing_made_where_the_size_is_given(config, tmp_path):
    made, _ = with_vocabulary(config)
    assert size(made) > 0
    assert made.data.vocab is None
    assert not list(tmp_path.rglob("vocab.txt"))
    assert with_vocabulary(made) == (made, [])
    asked = recipe("mix")
    tasks = {"detect": asked.model.tasks["detect"]}
    boxes = dataclasses.replace(asked, data=config.data, model=dataclasses.replace(asked.model, tasks=tasks))
    assert size(with_vocabulary(boxes)[0]) == 5


def test_a_run_that_was_moved_reads_its_own(config, tmp_path):
    kept = lines(tmp_path / "moved/vocab.txt", OTHER)
    was = dataclasses.replace(config, data=dataclasses.replace(config.data, vocab=str(tmp_path / "gone/vocab.txt")))
    assert with_kept_vocabulary(was, kept).data.vocab == str(kept)
    assert with_kept_vocabulary(config, kept).data.vocab == str(kept)
    assert with_kept_vocabulary(was, None) == was
    lines(tmp_path / "root/bert/vocab.txt", VOCABULARY)
    assert with_kept_vocabulary(config, kept) == config
    there = dataclasses.replace(config.data, vocab=str(lines(tmp_path / "bert.txt", BERT)))
    assert with_kept_vocabulary(dataclasses.replace(config, data=there), kept).data == there
