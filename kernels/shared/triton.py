"""Triton as the kernels see it: importable without it, told apart when interpreted, and the block functions they share.

``jit`` is ``triton.jit``. Where Triton is not installed (it exists for Linux only) a kernel is an object that says so
when it is launched, so that references and CPU paths work all the same. ``INTERPRETING`` is fixed at import, as
Triton's own choice is when it decorates: set ``TRITON_INTERPRET=1`` before Python starts.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=object)

INTERPRETING: bool = triton is not None and bool(triton.knobs.runtime.interpret)
"""Kernels run in Python on CPU tensors."""

WHY_NOT = "Triton is not installed: pip install triton (Linux only), or UNIT_FAST_KERNELS=reference"


class _NoKernel:
    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        raise RuntimeError(f"{self.function.__name__}: {WHY_NOT}")


def jit(function=None, **options):
    """``triton.jit``; without Triton, an object that raises when launched."""
    if function is None:
        return lambda f: jit(f, **options)
    return _NoKernel(function) if triton is None else triton.jit(function, **options)


@jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b in fp32 accumulation; fp32 operands exactly (no TF32).

    The interpreter computes bf16 products wrongly, so it gets upcast operands, which is exact; compiled code keeps its
    tensor cores. INTERPRET is ``INTERPRETING``.
    """
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def vector(ptr, column, R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [R,BLOCK] of a vector [C], loaded once a row (from L1) in the layout of the block."""
    everywhere = tl.broadcast_to(column[None, :], [R, BLOCK])
    return tl.load(ptr + everywhere, mask=everywhere < C, other=0.0).to(tl.float32)


def cdiv(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Smallest power of two not below n (at least 1)."""
    return 1 << max(0, (n - 1).bit_length())
