"""Arrays of records in ``.npy`` files (MMF's imdb format) without running code from them.

Such a file is a pickle, and ``numpy.load(allow_pickle=True)`` runs whatever it names. Here the pickle's instructions
are interpreted by a small machine that can only build None, bool, int, float, str, bytes, list, tuple, dict and set,
and knows six names: numpy's ``ndarray``, ``dtype``, ``_reconstruct`` and ``scalar`` in their spellings, and
``_codecs.encode`` and ``bytes`` (how protocol 2 writes bytes). None of them is called: arrays and scalars are decoded
from their bytes, and only if the sizes they claim are the sizes that are there. An instruction outside the list, or
another name, is refused. Memory therefore stays in proportion to the file; the C unpickler can be made to allocate
gigabytes by a few bytes (memo index, claimed length, ``ndarray`` shape).
"""

import math
import re
import struct
from pathlib import Path

import numpy as np

from unit_fast.data.store.files import describe, open_file
from unit_fast.errors import UserError, printable

NPY_LIMIT = 8 * 2**30
"""Bytes of the largest file that is read."""

_NUMPY_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED = {(module, name) for module in _NUMPY_MODULES[1:] for name in ("_reconstruct", "scalar")}
_ALLOWED |= {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("__builtin__", "bytes")}
_DTYPE = re.compile(r"[biufSU?O]\d{0,9}")


class Refused(Exception):
    """Internal: the stream holds something outside the list."""


class _Name:
    """A global of the pickle that is on the list; never the real object."""

    def __init__(self, module, name):
        self.name = name


class _Dtype:
    def __init__(self, code):
        if not (isinstance(code, str) and _DTYPE.fullmatch(code)):
            raise Refused(f"dtype {printable(repr(code), 40)}")
        self.code = code
        self.order = "<"

    def build(self, state):
        # (version, byte order, ...); further entries describe subarrays and fields, which records do not need
        if not (isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", ">", "|", "=")):
            raise Refused("state of a dtype")
        if any(item is not None for item in state[2:5]):
            raise Refused("a structured dtype")
        self.order = state[1].replace("|", "<").replace("=", "<")

    @property
    def is_object(self):
        return self.code[0] == "O"

    def decode(self, raw, count):
        """``count`` values from ``raw`` bytes as a list."""
        dtype = np.dtype(self.code if self.code[0] in "bS?" else self.order + self.code)
        if not isinstance(raw, bytes) or dtype.itemsize * count != len(raw) or (dtype.itemsize == 0 and count > 1):
            raise Refused("an array whose size is not that of its data")
        return np.frombuffer(raw, dtype).tolist() if len(raw) else [dtype.type().item()] * count


class _Array(list):
    """An ndarray of the pickle, as a (flat) list once its state has come."""

    def build(self, state):
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Dtype)):
            raise Refused("state of an array")
        _, shape, dtype, _, data = state
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise Refused("shape of an array")
        count = math.prod(shape)
        if dtype.is_object:
            if not isinstance(data, list) or len(data) != count:
                raise Refused("an array whose size is not that of its data")
            self[:] = data
        else:
            self[:] = dtype.decode(data, count)


def _call(function, arguments):
    """What REDUCE does, for the names on the list."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise Refused("a call of something that is not on the list")
    if function.name == "_reconstruct" and len(arguments) == 3:
        kind, shape, _ = arguments
        if isinstance(kind, _Name) and kind.name == "ndarray" and shape == (0,):
            return _Array()
        raise Refused(f"an array made with shape {printable(repr(shape), 60)}")
    if function.name == "dtype" and arguments:
        return _Dtype(arguments[0])
    if function.name == "scalar" and len(arguments) == 2 and isinstance(arguments[0], _Dtype):
        dtype, raw = arguments
        if not dtype.is_object:
            return dtype.decode(raw, 1)[0]
    if function.name == "encode" and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
        return arguments[0].encode("latin1")
    if function.name == "bytes" and arguments == ():  # how protocol 2 writes empty bytes
        return b""
    raise Refused(f"a call of {function.name}")


_MARK = object()
_CONSTANTS = {
    0x5D: list, 0x7D: dict, 0x8F: set, 0x29: tuple, 0x4E: lambda: None, 0x88: lambda: True, 0x89: lambda: False,
}  # fmt: skip
"""Instruction -> what makes the value it pushes."""


def _text_or_bytes(raw: bytes) -> str | bytes:
    """A Python 2 string: text where it is text, else bytes (the data of a numpy scalar)."""
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError:
        return raw


_BYTES = {
    0x54: ("i", bytes.decode),  # BINSTRING
    0x55: ("B", _text_or_bytes),  # SHORT_BINSTRING
    0x43: ("B", bytes),  # SHORT_BINBYTES
    0x42: ("I", bytes),  # BINBYTES
    0x8E: ("Q", bytes),  # BINBYTES8
    0x8D: ("Q", bytes.decode),  # BINUNICODE8
}
"""Instruction -> form of the length that precedes its bytes, and what is made of them."""


def loads(data: bytes, start: int = 0) -> object:
    """The value of the pickle in ``data`` from ``start`` on. ``Refused`` for anything outside the list; ``IndexError``,
    ``struct.error``, ``KeyError``, ``ValueError`` or ``TypeError`` for a damaged one."""
    stack, memo, at = [], {}, start
    read_u32 = struct.Struct("<I").unpack_from
    push, pop = stack.append, stack.pop
    end = len(data)

    def take(count):
        nonlocal at
        if count < 0 or at + count > end:
            raise Refused("data beyond the end of the file")
        at += count
        return data[at - count : at]

    def unpack(code):
        (value,) = struct.unpack("<" + code, take(struct.calcsize("<" + code)))
        return value

    def line():
        nonlocal at
        stop = data.find(b"\n", at, at + 300)
        if stop < 0:
            raise Refused("a name without end")
        text = data[at:stop].decode("ascii")
        at = stop + 1
        return text

    def marked():
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise Refused("a mark that is not there")

    def add_name(module, name):
        if (module, name) not in _ALLOWED:
            raise Refused(f"the name {printable(module, 60)}.{printable(name, 60)}")
        push(_Name(module, name))

    def extend_dict(items):
        if not isinstance(stack[-1], dict) or len(items) % 2:
            raise Refused("items of something that is not a dict")
        stack[-1].update(zip(items[::2], items[1::2]))

    def extend_list(items):
        if type(stack[-1]) is not list:
            raise Refused("items of something that is not a list")
        stack[-1].extend(items)

    while True:
        if at >= end:
            raise Refused("the end of the file before the end of the data")
        op = data[at]
        at += 1
        # in the order of how often records use them
        if op == 0x68:  # BINGET
            push(memo[data[at]])
            at += 1
        elif op == 0x6A:  # LONG_BINGET
            push(memo[read_u32(data, at)[0]])
            at += 4
        elif op == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif op == 0x71:  # BINPUT
            memo[data[at]] = stack[-1]
            at += 1
        elif op == 0x72:  # LONG_BINPUT
            memo[read_u32(data, at)[0]] = stack[-1]
            at += 4
        elif op == 0x8C:  # SHORT_BINUNICODE
            stop = at + 1 + data[at]
            push(data[at + 1 : stop].decode("utf-8"))
            at = stop
        elif op == 0x58:  # BINUNICODE
            stop = at + 4 + read_u32(data, at)[0]
            push(data[at + 4 : stop].decode("utf-8"))
            at = stop
        elif op == 0x28:  # MARK
            push(_MARK)
        elif op == 0x65:  # APPENDS
            extend_list(marked())
        elif op == 0x75:  # SETITEMS
            extend_dict(marked())
        elif op in _CONSTANTS:
            push(_CONSTANTS[op]())
        elif op == 0x4A:  # BININT
            push(unpack("i"))
        elif op == 0x4B:  # BININT1
            push(data[at])
            at += 1
        elif op == 0x4D:  # BININT2
            push(unpack("H"))
        elif op == 0x8A:  # LONG1
            push(int.from_bytes(take(unpack("B")), "little", signed=True))
        elif op == 0x47:  # BINFLOAT, the one big-endian number
            push(struct.unpack(">d", take(8))[0])
        elif op == 0x61:  # APPEND
            extend_list([pop()])
        elif op == 0x73:  # SETITEM
            value = pop()
            extend_dict([pop(), value])
        elif op in (0x85, 0x86, 0x87):  # TUPLE1 to TUPLE3
            count = op - 0x84
            items = tuple(stack[-count:])
            if len(items) != count or _MARK in items:
                raise Refused("a tuple without its items")
            del stack[-count:]
            push(items)
        elif op == 0x74:
            push(tuple(marked()))
        elif op in _BYTES:
            code, make = _BYTES[op]
            push(make(take(unpack(code))))
        elif op == 0x90:  # ADDITEMS
            items = marked()
            if not isinstance(stack[-1], set):
                raise Refused("items of something that is not a set")
            stack[-1].update(items)
        elif op == 0x63:  # GLOBAL
            add_name(line(), line())
        elif op == 0x93:  # STACK_GLOBAL
            name, module = pop(), pop()
            add_name(module, name)
        elif op == 0x52:  # REDUCE
            arguments, function = pop(), pop()
            push(_call(function, arguments))
        elif op == 0x62:  # BUILD
            state, target = pop(), stack[-1]
            if not isinstance(target, (_Array, _Dtype)):
                raise Refused("state of an object that is not on the list")
            target.build(state)
        elif op == 0x30:  # POP
            pop()
        elif op == 0x32:  # DUP
            push(stack[-1])
        elif op == 0x80:  # PROTO
            if data[at] > 5:
                raise Refused(f"pickle protocol {data[at]}")
            at += 1
        elif op == 0x95:  # FRAME: only a hint about reading ahead
            at += 8
        elif op == 0x2E:  # STOP
            return pop()
        else:
            raise Refused(f"pickle instruction {op:#04x}")


def read_records(path: str | Path, limit: int = NPY_LIMIT) -> list[dict]:
    """The records of an imdb ``.npy`` file (SPEC 4.1): an array of dicts whose first element may be a header (no
    ``image_id``), which is left out, or one dict with ``metadata`` and ``data``.

    Raises:
        UserError: naming the file: not such a file, damaged, or holding anything but plain data.
    """

    def refuse(what):
        raise UserError(
            f"{printable(path, 400)}: {what}; only .npy files of plain records (MMF imdb) are read, and no code from "
            f"them is run"
        )

    with open_file(path, limit) as file:
        try:
            version = np.lib.format.read_magic(file)
            reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = reader(file)
        except Exception as error:  # the header parser raises whatever literal_eval and tokenize do
            refuse(f"not an .npy file ({describe(error)})")
        if not dtype.hasobject:
            refuse(f"an array of {dtype}, not of records")
        try:
            value = loads(file.read())
        except Refused as error:
            refuse(f"holds {error}")
        except Exception as error:  # a damaged stream can fail at any operation on the values built so far
            refuse(f"damaged ({describe(error)})")
    if isinstance(value, _Array) and shape == () and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and "data" in value:
        value = value["data"]
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        refuse("does not hold a list of records")
    if value and "image_id" not in value[0]:
        value = value[1:]
    return list(value)
