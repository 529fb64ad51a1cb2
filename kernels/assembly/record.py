"""What a launcher launches, without a card: kernels, types, constants and grid, as Triton specialises them.

``record`` runs a launcher on fake CUDA tensors and keeps every launch as Triton's own ``run`` would specialise it:
types, constants, which integers and pointers are divisible by 16. So what ``assemble`` compiles is the binary that
runs.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from unit_fast_kernels.assembly import worker
from unit_fast_kernels.shared import tuned
from unit_fast_kernels.shared.triton import INTERPRETING, WHY_NOT, triton


class AssemblyError(RuntimeError):
    """A kernel did not compile, or not in time; the message names kernel, architecture and launch."""


def require() -> None:
    """``AssemblyError`` with the remedy where kernels cannot be assembled."""
    if triton is None:
        raise AssemblyError(WHY_NOT)
    if INTERPRETING:
        raise AssemblyError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel, specialised as Triton specialises it."""

    kernel: str
    """``module:function``."""
    source: str
    """Hash of the kernel's source and of the functions it calls."""
    signature: Mapping[str, str]
    """Argument -> ``*bf16``, ``i32``, ``fp32``, ``constexpr`` ..."""
    constexprs: Mapping[str, object]
    """Constants, and the integers that are 1 and pointers that are None; a dtype is {"dtype": name}."""
    aligned: tuple[str, ...]
    """Arguments known to be divisible by 16."""
    options: Mapping[str, object]
    """``num_warps``, ``num_stages`` ... as the launcher gave them."""
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's function without its module."""
        return self.kernel.partition(":")[2]

    @property
    def warps(self) -> int:
        """Warps in a block."""
        return int(self.options.get("num_warps", 4))

    @property
    def programs(self) -> int:
        """Blocks of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def job(self, arch: str) -> dict:
        """What the child process gets: everything that the binary depends on, but for the source."""
        return {
            "kernel": self.kernel, "arch": int(arch.removeprefix("sm_")), "signature": dict(self.signature),
            "constexprs": dict(self.constexprs), "aligned": list(self.aligned), "options": dict(self.options),
        }  # fmt: skip

    def key(self, arch: str) -> str:
        """Hash of everything that the binary and its figures depend on."""
        parts = [self.job(arch), self.source, triton.__version__, _taker()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _taker() -> str:
    """The source of the child process: another one may take other figures."""
    return Path(worker.__file__).read_text(encoding="utf-8")


def _plain(value):
    if isinstance(value, triton.language.constexpr):
        value = value.value
    if isinstance(value, triton.language.dtype):
        return {"dtype": value.name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a constant of a kernel is a {type(value).__name__}; it must be a number, string or dtype")


class _Pointer:
    """A fake tensor as Triton's specialisation looks at it; allocations are aligned to more than 16 bytes."""

    def __init__(self, tensor):
        self.dtype, self._offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


def source_of(function) -> str:
    """Hash of a kernel's source, of the functions of ours that it calls, and of the global values they use.

    Triton's own ``cache_key`` depends on line numbers too, so that a word more in a module's docstring would compile
    all of its kernels again.
    """
    from triton.runtime.jit import JITCallable

    texts: dict[str, str] = {}
    waiting = [function]
    while waiting:
        here = waiting.pop()
        name = f"{here.__module__}.{here.__qualname__}"
        if name in texts:
            continue
        texts[name] = here.src
        scope = here.get_capture_scope()
        for node in ast.walk(here.parse()):
            if isinstance(node, ast.Name):
                value = scope.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = getattr(scope.get(node.value.id), node.attr, None)
            else:
                continue
            if isinstance(value, JITCallable):
                if not value.__module__.startswith("triton."):  # those change with Triton's version
                    waiting.append(value)
            elif isinstance(value, bool | int | float | str | triton.language.constexpr):
                texts[f"{name}: {ast.unparse(node)}"] = repr(value)
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _launch(function, arguments, grid, keywords) -> Launch:
    """The launch ``function[grid](*arguments, **keywords)``, through the code that Triton specialises with."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 80, 32))
    binder = create_function_from_signature(function.signature, function.params, backend)
    pointers = [_Pointer(x) if isinstance(x, torch.Tensor) else x for x in arguments]
    named = {k: _Pointer(x) if isinstance(x, torch.Tensor) else x for k, x in keywords.items()}
    bound, specialization, _ = binder(*pointers, **named)
    given = {k: v for k, v in keywords.items() if k not in bound}
    _, signature, constexprs, attributes = function._pack_args(backend, dict(given), bound, specialization, None)
    if any(len(path) != 1 for path in (*constexprs, *attributes)):
        raise TypeError(f"{function.__name__}: a kernel takes no tuples as arguments")
    names = [p.name for p in function.params]
    grid = grid(bound) if callable(grid) else tuple(grid)
    return Launch(
        kernel=f"{function.__module__}:{function.__name__}",
        source=source_of(function),
        signature=signature,
        constexprs={names[path[0]]: _plain(value) for path, value in constexprs.items()},
        aligned=tuple(names[path[0]] for path, value in attributes.items() if value),
        options={k: _plain(v) for k, v in given.items()},
        grid=(*grid, 1, 1)[:3],
    )


def record(function: Callable[[], object], card: str, into: list[Launch] | None = None) -> list[Launch]:
    """The launches that ``function()`` makes, with the launch parameters of ``card``; nothing runs on a device.

    ``function`` makes its tensors itself, on ``cuda:0``: they are fake within the call. The launches are appended to
    ``into``, as they come, and returned.
    """
    require()
    from triton.runtime.jit import JITFunction

    launches = [] if into is None else into

    def run(self, *arguments, grid, warmup, **keywords):
        launches.append(_launch(self, arguments, grid, keywords))

    original = JITFunction.run
    JITFunction.run = run
    try:
        with tuned.assume(card), FakeTensorMode():
            function()
    finally:
        JITFunction.run = original
    return launches
