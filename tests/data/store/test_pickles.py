"""Arrays of records: nothing runs code or eats memory."""

import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data_roots import write
from unit_fast.data.store import pickles
from unit_fast.errors import UserError

RECORDS = [
    {
        "image_id": np.int64(9), "image_name": "COCO_train2014_000000000009", "question_id": 9000,
        "question_str": "is it é?", "answers": ["yes"] * 9 + ["no"], "score": np.float32(0.5), "flag": np.bool_(True),
        "box": np.arange(4.0), "words": np.array(["a", "bc"]), "nested": {"t": (1, (2,), None)}, "big": 2**40,
        "negative": -5, "bytes": b"x", "empty": np.zeros(0, dtype=np.int32),
    },
    {"image_id": 25, "answers": []},
]  # fmt: skip


def plain(value):
    """``value`` with numpy's types turned into Python's."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


@pytest.mark.parametrize("header", [[], [{"dataset": "vqa2", "version": 1}]])
def test_records_equal_numpys_own_reading(tmp_path, header):
    path = tmp_path / "imdb.npy"
    np.save(path, np.array(header + RECORDS, dtype=object), allow_pickle=True)
    assert pickles.read_records(path) == [plain(record) for record in RECORDS]


def test_metadata_and_data(tmp_path):
    path = tmp_path / "imdb.npy"
    np.save(path, np.array({"metadata": {"x": 1}, "data": RECORDS}, dtype=object), allow_pickle=True)
    assert pickles.read_records(path) == [plain(record) for record in RECORDS]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("spelling", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_both_spellings_and_all_protocols(tmp_path, protocol, spelling):
    dumped = pickle.dumps(np.array(RECORDS, dtype=object), protocol=protocol)
    current = b"numpy._core.multiarray" if b"numpy._core" in dumped else b"numpy.core.multiarray"
    new = spelling.encode()
    if protocol == 4:  # names are length-prefixed there
        dumped = dumped.replace(bytes([len(current)]) + current, bytes([len(new)]) + new)
    dumped = dumped.replace(current, new)
    assert list(pickles.loads(dumped)) == [plain(record) for record in RECORDS]


def npy(path, payload: bytes, dtype="|O", shape="(1,)") -> str:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return write(path, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + payload)


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_an_evil_file_is_refused_and_nothing_runs(tmp_path, protocol):
    canary = tmp_path / "canary"
    array = np.empty(1, dtype=object)
    array[0] = Evil(canary)
    path = npy(tmp_path / "evil.npy", pickle.dumps(array, protocol=protocol))
    with pytest.raises(UserError, match="evil.npy"):
        pickles.read_records(path)
    assert not canary.exists()
    # armed: numpy's reader does run it
    np.load(path, allow_pickle=True)
    assert canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nndarray\n(I1\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"cnumpy\nload\n.",
        b"c_codecs\nlookup\n.",
        b"c" + b"a" * 1000 + b"\nx\n.",
        b"(ibuiltins\neval\n.",
        b"P1\n.",
        b"\x82\x01.",
        b"\x80\x09.",
    ],
)
def test_anything_off_the_list_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="bad.npy"):
        pickles.read_records(npy(tmp_path / "bad.npy", text))


BIG = 2**34
_RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
_ARRAY = _RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
_OBJECT = b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb"


def long1(value):
    raw = value.to_bytes(8, "little")
    return b"\x8a\x08" + raw


@pytest.mark.parametrize(
    "payload",
    [
        _RECONSTRUCT + b"cnumpy\nndarray\n" + long1(BIG) + b"\x85U\x01b\x87R.",
        _ARRAY + b"(K\x01" + long1(BIG) + b"\x85" + _OBJECT + b"\x89]tb.",
        _ARRAY + b"(K\x01" + long1(BIG) + b"\x85" + b"cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R" + b"\x89C\x00tb.",
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x0b\x00\x00\x00U2000000000K\x00K\x01\x87RC\x01x\x86R.",
        b"X\xff\xff\xff\x7fabc.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
    ],
)
def test_bombs_are_refused_without_memory(tmp_path, payload):
    path = npy(tmp_path / "bomb.npy", payload)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="bomb.npy"):
            pickles.read_records(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_a_large_memo_index_takes_no_memory(tmp_path):
    """The C unpickler allocates a table of 2**32 pointers for it."""
    tracemalloc.start()
    try:
        assert pickles.read_records(npy(tmp_path / "memo.npy", b"]r\xff\xff\xff\x7f.")) == []
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_files_that_are_no_records(tmp_path):
    np.save(tmp_path / "numbers.npy", np.arange(5))
    np.save(tmp_path / "text.npy", np.array(["a", 1, None], dtype=object))
    write(tmp_path / "short.npy", b"\x93NUMPY\x01")
    write(tmp_path / "none.npy", b"")
    for name in ("numbers", "text", "short", "none"):
        with pytest.raises(UserError, match=f"{name}.npy"):
            pickles.read_records(tmp_path / f"{name}.npy")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_give_a_value_or_our_error(tmp_path, data):
    whole = pickle.dumps(np.array(RECORDS, dtype=object), protocol=data.draw(st.sampled_from([2, 4])))
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    path = npy(tmp_path / "fuzz.npy", bytes(raw))
    try:
        assert isinstance(pickles.read_records(path), list)
    except UserError as error:
        assert "fuzz.npy" in str(error)  # noqa: PT017 - either outcome is right
