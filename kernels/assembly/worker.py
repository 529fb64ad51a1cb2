"""The child process of ``assemble``: compiles kernels for a card that need not exist, and takes the binaries apart.

One JSON object a line on standard input, one answer a line on standard output. A process of its own, because some
kernels keep the compiler busy for minutes, and because it must not run under ``TRITON_INTERPRET``.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
_LABEL = re.compile(r"^(\.\w+):")
_TARGET = re.compile(r"`\((\.\w+)\)")


def loops(sass: str) -> tuple[Counter, list[Counter]]:
    """What ``nvdisasm`` printed -> instructions by opcode: of the whole kernel, and of each innermost loop.

    A loop is what stands between a backward branch and its target; one that holds another is not innermost.
    """
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append((instruction[2], instruction[3]))
    ranges = set()
    for number, (opcode, operands) in enumerate(code):
        target = _TARGET.search(operands) if opcode.startswith("BRA") else None
        start = labels.get(target[1]) if target else None
        if start == number:  # the endless loop behind the last instruction
            code = code[:number]
            break
        if start is not None and start < number:
            ranges.add((start, number + 1))
    inner = [a for a in sorted(ranges) if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in ranges)]
    return Counter(opcode for opcode, _ in code), [Counter(opcode for opcode, _ in code[a:b]) for a, b in inner]


def _tool(tool, *arguments: str) -> str:
    return subprocess.run([tool.path, *arguments], capture_output=True, text=True, check=True).stdout


def _only(pattern: str, text: str) -> list[int]:
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise ValueError(f"expected one match of {pattern!r} in what the tool printed:\n{text}")
    return [int(x) for x in ([found[0]] if isinstance(found[0], str) else found[0])]


def compiled(job: dict) -> dict:
    """Compile one launch; registers, stack, spills, shared memory and instructions of its binary."""
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = job["kernel"].partition(":")
    function = getattr(importlib.import_module(module), name)
    constexprs = {k: tl.dtype(v["dtype"]) if isinstance(v, dict) else v for k, v in job["constexprs"].items()}
    attributes = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in job["aligned"]}
    source = ASTSource(function, job["signature"], constexprs, attributes)
    knobs.nvidia.dump_ptxas_log = True  # the very run of ptxas that made the binary
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        kernel = triton.compile(source, target=GPUTarget("cuda", job["arch"], 32), options=job["options"])
    (spilled,) = _only(r"(\d+) bytes spill stores", said.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        registers, stack = _only(
            r"REG:(\d+) STACK:(\d+)", _tool(knobs.nvidia.cuobjdump, "--dump-resource-usage", str(cubin))
        )
        whole, inner = loops(_tool(knobs.nvidia.nvdisasm, "-c", str(cubin)))
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spill_bytes": spilled,
        "shared_bytes": kernel.metadata.shared,
        "ptx_bytes": len(kernel.asm["ptx"]),
        "instructions": dict(whole),
        "loops": [dict(loop) for loop in inner],
    }


def main() -> None:
    """Answer jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a compiler prints must not come between the answers
    for line in sys.stdin:
        try:
            answer = compiled(json.loads(line))
        except Exception as error:  # the parent raises it with the name of the kernel
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
