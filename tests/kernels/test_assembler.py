"""Launches are recorded as Triton makes them, compiled in children, and their machine code is counted right."""

import subprocess
import sys
import time

import pytest
import torch
from unit_fast_kernels.assembly import assemble as _assemble
from unit_fast_kernels.assembly import bounds
from unit_fast_kernels.assembly import record as _record
from unit_fast_kernels.assembly.worker import loops
from unit_fast_kernels.shared import tuned as _tuned
from unit_fast_kernels.shared.cards import CARDS
from unit_fast_kernels.shared.triton import triton

from tests import planted_kernels
from tests.planted_kernels import launch_scale, needs_compiler

# ------------------------------------------------------------------------------------------------------------ record


@needs_compiler
def test_a_launch_is_recorded():
    (launch,) = _record.record(lambda: launch_scale(1008, warps=2), "a100")
    assert launch.kernel == "tests.planted_kernels:scale"
    assert launch.signature == {
        "x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32", "factor": "fp32", "BLOCK": "constexpr"
    }  # fmt: skip
    assert launch.constexprs == {"BLOCK": 256}
    assert launch.aligned == ("x_ptr", "y_ptr", "n")
    assert launch.options == {"num_warps": 2}
    assert launch.grid == (4, 1, 1)


@needs_compiler
@pytest.mark.parametrize(
    ("size", "offset", "aligned", "constants"),
    [
        (1000, 0, ("x_ptr", "y_ptr"), {}),
        (1008, 3, ("y_ptr", "n"), {}),
        (1008, 8, ("x_ptr", "y_ptr", "n"), {}),
        (1, 0, ("x_ptr", "y_ptr"), {"n": 1}),
    ],
)
def test_specialised_by_alignment_and_by_one(size, offset, aligned, constants):
    (launch,) = _record.record(lambda: launch_scale(size, offset), "a100")
    assert launch.aligned == aligned
    assert launch.constexprs == {"BLOCK": 256, **constants}


@needs_compiler
@pytest.mark.parametrize(
    ("size", "offset", "n", "factor"),
    [(1000, 0, 1000, 0.5), (512, 1, 1, 2.5), (64, 8, 2**31, 1.0), (64, 4, 48, None), (64, 0, -16, True)],
)
def test_recorded_as_triton_itself_specialises(monkeypatch, size, offset, n, factor):
    """What Triton's own ``run`` hands to its compiler for real tensors, here without a card to launch on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    handed = []

    class Device:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 80, 32))

    def arguments(device):
        x = torch.empty(size + offset, dtype=torch.float16, device=device)[offset:]
        return x, torch.empty_like(x), n, factor

    kernel = planted_kernels.scale
    monkeypatch.setattr(driver, "_active", Device)
    monkeypatch.setattr(kernel, "_do_compile", lambda *given: handed.append(given))
    kernel.device_caches.clear()
    kernel[(1,)](*arguments("cpu"), BLOCK=64, num_warps=2, num_stages=1)
    kernel.device_caches.clear()
    (_, signature, _, constexprs, options, attributes, _) = handed[0]

    (launch,) = _record.record(lambda: kernel[(1,)](*arguments("cuda:0"), BLOCK=64, num_warps=2, num_stages=1), "a100")
    names = kernel.arg_names
    assert launch.signature == signature
    assert launch.constexprs == {names[path[0]]: value for path, value in constexprs.items()}
    assert launch.aligned == tuple(names[path[0]] for path, value in attributes.items() if value)
    assert (options.num_warps, options.num_stages) == (2, 1)
    assert launch.options == {"num_warps": 2, "num_stages": 1}


@needs_compiler
@pytest.mark.parametrize("card", _tuned.CARDS)
def test_recorded_with_the_parameters_of_the_card(card):
    seen = []
    _record.record(lambda: seen.append(_tuned.card(torch.device("cuda:0"))), card)
    assert seen == [card]


@needs_compiler
def test_recording_leaves_triton_as_it_was():
    from triton.runtime.jit import JITFunction

    before = JITFunction.run
    with pytest.raises(ZeroDivisionError):
        _record.record(lambda: 1 / 0, "a100")
    assert JITFunction.run is before


# ---------------------------------------------------------------------------------------------------------- assemble


@needs_compiler
def test_a_small_kernel_and_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (launch,) = _record.record(launch_scale, "a100")
    told = []
    figures = _assemble.assemble(launch, "sm_80", progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 1), (1, 1)]
    assert 8 <= figures.registers <= 40
    assert (figures.spill_bytes, figures.stack_bytes, figures.shared_bytes) == (0, 0, 0)
    assert figures.occupancy == 1.0
    assert figures.ptx_bytes > 500
    assert figures.instructions["EXIT"] >= 1
    assert figures.loops == ()
    (kept,) = (tmp_path / "unit_fast" / "assembly").iterdir()
    monkeypatch.setattr(_assemble, "_Worker", None)  # nothing may be compiled again
    assert _assemble.assemble(launch, "sm_80") == figures
    kept.write_text(kept.read_text()[:50])  # a file cut off is as good as none
    with pytest.raises(TypeError):
        _assemble.assemble(launch, "sm_80")


@needs_compiler
def test_one_binary_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launches = [
        launch for size in (1000, 1001, 1008) for launch in _record.record(lambda n=size: launch_scale(n), "a100")
    ]
    assert len(_assemble.assemble_all([(launch, "sm_80") for launch in launches])) == 2
    assert len(list((tmp_path / "unit_fast" / "assembly").iterdir())) == 2


@needs_compiler
def test_a_key_depends_on_everything(monkeypatch):
    def key(arch="sm_80", **arguments):
        (launch,) = _record.record(lambda: launch_scale(**arguments), "a100")
        return launch.key(arch)

    keys = [key(), key("sm_90"), key(size=1008), key(offset=1), key(warps=2), key(dtype=torch.float32)]
    for function, old, new in ((planted_kernels.scale, "other=0.0", "other=1.0"), (planted_kernels.product, "*", "+")):
        assert old in function.src
        monkeypatch.setattr(function, "_src", function.src.replace(old, new))
        keys.append(key())
    monkeypatch.setattr(triton, "__version__", "another version")
    keys.append(key())
    assert len(set(keys)) == len(keys)


@needs_compiler
def test_a_key_depends_on_global_values_and_not_on_lines(monkeypatch):
    from unit_fast_kernels.shared.philox import philox  # it uses none but Triton's functions

    before = _record.source_of(philox)
    monkeypatch.setattr(philox, "starting_line_number", philox.starting_line_number + 7)
    assert _record.source_of(philox) == before
    source = philox.src
    monkeypatch.setattr(philox, "_src", source.replace("tl.load(seed_ptr)", "tl.load(seed_ptr + PLANTED)"))
    found = []
    for value in (1, 2):
        monkeypatch.setitem(philox.__globals__, "PLANTED", triton.language.constexpr(value))
        found.append(_record.source_of(philox))
    assert len({before, *found}) == 3


@needs_compiler
def test_a_kernel_that_does_not_compile_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (launch,) = _record.record(lambda: planted_kernels.wrong[(1,)](torch.empty(8, device="cuda:0"), BLOCK=8), "h100")
    said = r"(?s)^wrong for sm_90 \(; BLOCK=8\) does not compile: .*Loop-carried variable total"
    with pytest.raises(_record.AssemblyError, match=said):
        _assemble.assemble(launch, "sm_90")
    (fine,) = _record.record(launch_scale, "h100")
    failed, told = {}, []
    found = _assemble.assemble_all(
        [(launch, "sm_90"), (fine, "sm_90")], failed=failed, progress=lambda *given: told.append(given)
    )
    assert list(found) == [fine.key("sm_90")]
    assert list(failed) == [launch.key("sm_90")]
    assert told == [(0, 2), (1, 2), (2, 2)]


@needs_compiler
def test_a_kernel_that_takes_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (launch,) = _record.record(launch_scale, "a100")
    with pytest.raises(_record.AssemblyError, match=r"^scale for sm_80 .*did not compile within 0.01 s of work"):
        _assemble.assemble(launch, "sm_80", limit_seconds=0.01)
    assert not (tmp_path / "unit_fast").exists()


@needs_compiler
def test_time_is_the_work_of_a_process_and_its_children():
    """Waiting is not work: on a busy machine a kernel is not refused for the others' sake."""
    work = "import time; time.sleep(1.0); t = time.process_time()\nwhile time.process_time() < t + 0.5: 1"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {work!r}]).wait()"
    for source in (work + "\ninput()", parent + "; input()"):
        with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE) as child:
            end = time.monotonic() + 60
            while _assemble._processor_seconds(child.pid) < 0.5 and time.monotonic() < end:
                time.sleep(0.05)
            assert 0.5 <= _assemble._processor_seconds(child.pid) < 1.5
            child.communicate(b"\n")
    assert _assemble._processor_seconds(child.pid) == 0.0


def test_why_nothing_can_be_assembled(monkeypatch):
    monkeypatch.setattr(_record, "INTERPRETING", True)
    if triton is not None:
        with pytest.raises(_record.AssemblyError, match="TRITON_INTERPRET is set"):
            _record.record(lambda: None, "a100")
    monkeypatch.setattr(_record, "triton", None)
    with pytest.raises(_record.AssemblyError, match="Triton is not installed"):
        _assemble.assemble_all([])


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "resident"),
    [  # as NVIDIA's occupancy calculator has them
        ("sm_80", 32, 0, 4, 64),
        ("sm_80", 33, 0, 4, 48),
        ("sm_80", 168, 21 * 1024, 4, 12),
        ("sm_80", 182, 20 * 1024, 4, 8),
        ("sm_80", 255, 0, 4, 8),
        ("sm_80", 255, 0, 16, 0),
        ("sm_80", 64, 0, 1, 32),
        ("sm_80", 32, 81 * 1024, 4, 8),
        ("sm_80", 32, 82 * 1024, 4, 4),
        ("sm_80", 32, 163 * 1024, 8, 8),
        ("sm_80", 32, 163 * 1024 + 1, 8, 0),
        ("sm_90", 124, 41 * 1024, 8, 16),
        ("sm_90", 172, 37 * 1024, 4, 8),
        ("sm_90", 32, 227 * 1024, 8, 8),
    ],
)
def test_occupancy(arch, registers, shared, warps, resident):
    assert _assemble.resident_warps(arch, registers, shared, warps) == resident


# ------------------------------------------------------------------------------------------------------------ counting

SASS = """
.text.k:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/             @!UP0 MUFU.EX2 R3, R3 ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
.L_x_3:
        /*0080*/                   FFMA R3, R3, R3, R3 ;
        /*0090*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
        /*00c0*/                   NOP;
"""


def test_loops_of_a_disassembly():
    whole, inner = loops(SASS)
    assert sum(whole.values()) == 11
    assert inner == [{"HMMA.16816.F32.BF16": 1, "LDS": 1, "BRA": 1}, {"FFMA": 1, "BRA": 1}]
    assert bounds.hot_loop(inner, whole) == inner[0]
    assert bounds.hot_loop(inner[1:], inner[1]) == inner[1]
    assert bounds.hot_loop([], whole) == whole
    assert loops("") == ({}, [])


def test_instructions_by_pipe():
    found = bounds.by_pipe({"HMMA.16816.F32": 2, "MUFU.EX2": 3, "FMUL": 5, "LOP3.LUT": 7, "IMAD.WIDE.U32": 11,
                             "LDSM.16.M88.4": 13, "BRA": 17, "HSET2.GEU.AND": 19})  # fmt: skip
    assert found == {"tensor": 2, "mufu": 3, "fp32": 5, "alu": 7, "imad": 11, "shared": 13, "other": 17, "fp16": 19}


def test_bounds_are_those_of_the_prototypes():
    """Attention with head 32 over 4200 tokens: the row "B, tile list" of sm_80, counted per score, and its bounds."""
    a100, scores = CARDS["a100"], 8 * 4200**2
    counted = {
        "HMMA.16816": 1.0,
        "MUFU": 1.03,
        "FADD": 2.34,
        "FMNMX": 1.12,
        "IMAD.WIDE": 1.56,
        "LOP3": 3.5,
        "IMAD": 0.4,
    }
    busy = {
        pipe: cycles * scores / 32 / a100.cycles_per_us for pipe, cycles in bounds.busy_cycles(counted, a100).items()
    }
    assert busy == pytest.approx({"fma": 62, "alu": 67, "mufu": 60, "tensor": 58}, abs=0.7)
    assert bounds.pipes_us(counted, scores / 32, a100) == pytest.approx(247, abs=2)
    assert bounds.issue_us(12.4 * scores / 32, a100) == pytest.approx(90, abs=0.5)
    assert bounds.issue_us(11.7 * scores / 32, CARDS["h200"]) == pytest.approx(53.5, abs=0.5)
    assert bounds.roofline_us(2.039e6, 1, "bfloat16", a100) == pytest.approx(1.0)
    assert bounds.roofline_us(1, 312e6, "float16", a100) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("opcode", "card", "cycles"),
    [
        ("HMMA.16816.F32.BF16", "a100", 8), ("HMMA.1688.F32", "a100", 4), ("HMMA.1688.F32.TF32", "a100", 8),
        ("HMMA.16816.F32", "h100", 4), ("HGMMA.64x64x16.F32.BF16", "h100", 32), ("HGMMA.64x128x16.F32", "h200", 64),
        ("HGMMA.64x32x8.F32.TF32", "h200", 16),
    ],
)  # fmt: skip
def test_cycles_of_tensor_instructions(opcode, card, cycles):
    assert bounds.busy_cycles({opcode: 1}, CARDS[card])["tensor"] == cycles


def test_an_unknown_tensor_instruction_is_not_counted_as_nothing():
    with pytest.raises(ValueError, match="unknown tensor instruction HMMA.FOO"):
        bounds.busy_cycles({"HMMA.FOO": 1}, CARDS["a100"])
