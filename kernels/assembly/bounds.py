"""What a card could do at best: bounds by memory, arithmetic and instructions, from a kernel's counted work.

``roofline_us``: bytes over bandwidth or FLOPs over the arithmetic peak, whichever is longer. ``issue_us``: every
scheduler issues one instruction a cycle. ``pipes_us``: the time that the fused-multiply-add, integer, special-function
and tensor pipes are busy, added up; published attention kernels land at 0.7 to 1.0 of this sum, not at the issue bound.
Nothing here was measured on a card.
"""

import re
from collections.abc import Mapping

from unit_fast_kernels.shared.cards import Card

PIPES = ("tensor", "mufu", "fp32", "fp16", "alu", "imad", "shared", "other")
"""Tensor cores; special functions and conversions; FP32 adds and products; packed half arithmetic; integer, logic,
compare and select; integer products; shared memory; everything else (global memory, branches, uniform registers)."""

_PIPE = {
    name: pipe
    for pipe, names in {
        "tensor": "HMMA HGMMA IMMA DMMA",
        "mufu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
        "fp32": "FADD FMUL FFMA",
        "fp16": "HADD2 HMUL2 HFMA2 HSET2 HSETP2",
        "alu": "LOP3 PLOP3 IADD3 VIADD LEA SHF SHL SHR SEL FSEL ISETP FSETP FSET IMNMX VIMNMX FMNMX PRMT F2FP I2FP "
        "BMSK SGXT IABS MOV P2R R2P VABSDIFF",
        "imad": "IMAD IDP",
        "shared": "LDS LDSM STS STSM SHFL ATOMS",
    }.items()
    for name in names.split()
}


def pipe_of(opcode: str) -> str:
    """The one of ``PIPES`` that an opcode with its modifiers goes to."""
    return _PIPE.get(opcode.partition(".")[0], "other")


def by_pipe(instructions: Mapping[str, float]) -> dict[str, float]:
    """Instructions by opcode -> by pipe, every one of ``PIPES``."""
    found = dict.fromkeys(PIPES, 0)
    for opcode, count in instructions.items():
        found[pipe_of(opcode)] += count
    return found


def _tensor_fmas(opcode: str) -> float:
    """Multiply-adds at bf16 rate that one scheduler's share of a tensor instruction does (TF32 counts twice)."""
    if group := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = (int(x) for x in group.groups())
        count = m * n * k / 4  # four warps, each on its scheduler
    elif single := re.match(r"HMMA\.(16816|1688|1684)", opcode):
        count = 16 * 8 * int(single[1][3:] if single[1] != "16816" else 16)
    else:
        raise ValueError(f"unknown tensor instruction {opcode}")
    return count * 2 if "TF32" in opcode else count


def busy_cycles(instructions: Mapping[str, float], card: Card) -> dict[str, float]:
    """Cycles that instructions by opcode (of one warp) keep the four arithmetic pipes of one scheduler busy."""
    count = by_pipe(instructions)
    tensor = sum(n * _tensor_fmas(opcode) for opcode, n in instructions.items() if pipe_of(opcode) == "tensor")
    return {
        "fma": count["fp32"] * card.fp32_cycles + count["imad"] * 2 + count["fp16"],
        "alu": count["alu"] * 2,
        "mufu": count["mufu"] * 8,
        "tensor": tensor / card.tensor_fmas,
    }


def hot_loop(loops, instructions: Mapping[str, int]) -> Mapping[str, int]:
    """The innermost loop with the most tensor instructions (FP32 multiply-adds where there are none, as in exact fp32
    products), the shorter of equals; the whole kernel where no loop has either."""

    def work(loop, pipe):
        return by_pipe(loop)[pipe]

    for pipe in ("tensor", "fp32"):
        if any(work(loop, pipe) for loop in loops):
            return max(loops, key=lambda loop: (work(loop, pipe), -sum(loop.values())))
        if work(instructions, pipe):
            return instructions
    return instructions


def roofline_us(n_bytes: float, flops: float, dtype: str, card: Card) -> float:
    """Microseconds below which no kernel with this traffic and arithmetic gets."""
    return 1e6 * max(n_bytes / card.bandwidth, flops / card.flops[dtype])


def issue_us(warp_instructions: float, card: Card) -> float:
    """Microseconds to issue that many instructions of warps, evenly over all schedulers."""
    return warp_instructions / card.cycles_per_us


def pipes_us(instructions: Mapping[str, float], times: float, card: Card) -> float:
    """Microseconds that the pipes need for ``times`` executions of a warp's instructions by opcode, added up."""
    return sum(busy_cycles(instructions, card).values()) * times / card.cycles_per_us
