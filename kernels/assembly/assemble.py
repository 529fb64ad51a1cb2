"""Kernels without a card: the binary of a recorded launch for sm_80 and sm_90, and what it takes.

Registers and stack come from ``cuobjdump``, spilled bytes from the ``ptxas`` run that made the binary, shared memory
from Triton's metadata (``cuobjdump`` does not see dynamic shared memory), instructions from ``nvdisasm``; all of these
tools are in Triton's wheel. Compiling happens in child processes with a time limit and is cached by the source of the
kernel and everything else the binary depends on.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from unit_fast_kernels.assembly.record import AssemblyError, Launch, require

ARCHITECTURES = {"sm_80": ("a100",), "sm_90": ("h100", "h200")}
"""Architecture -> the cards whose launch parameters are assembled for it."""
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that one block may use."""
_SHARED_TOTAL = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}
MAX_WARPS = 64
LIMIT_SECONDS = 60.0
"""Processor time that compiling one kernel may take; on a busy machine it may wait ``_PATIENCE`` times as long."""
_PATIENCE = 10


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """The binary of one launch."""

    arch: str
    warps: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    ptx_bytes: int
    instructions: Mapping[str, int]
    """Opcode -> how many the whole kernel has."""
    loops: tuple[Mapping[str, int], ...]
    """The same of each innermost loop."""

    @property
    def resident_warps(self) -> int:
        """Warps that fit on a multiprocessor at once, of 64; 0 where not even one block does."""
        return resident_warps(self.arch, self.registers, self.shared_bytes, self.warps)

    @property
    def occupancy(self) -> float:
        """``resident_warps`` as a share of 64."""
        return self.resident_warps / MAX_WARPS


def resident_warps(arch: str, registers: int, shared_bytes: int, warps: int) -> int:
    """Warps of a multiprocessor that blocks of ``warps`` warps fill: 65536 registers in four parts, given out in 256 a
    warp, shared memory in 128 bytes with 1 KiB a block for the system, at most 32 blocks and 64 warps."""
    if shared_bytes > SHARED_LIMIT[arch]:
        return 0
    a_warp = -(-32 * registers // 256) * 256
    by_registers = 4 * (16384 // a_warp) // warps if a_warp else MAX_WARPS
    by_shared = _SHARED_TOTAL[arch] // (-(-shared_bytes // 128) * 128 + 1024)
    return warps * min(by_registers, by_shared, MAX_WARPS // warps, 32)


def cache_folder() -> Path:
    """Where assembled figures are kept: ``unit_fast/assembly`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "unit_fast" / "assembly"


def _processor_seconds(pid: int) -> float:
    """Processor time that a process and its children took, running ones included; 0 of one that has gone."""
    process = Path(f"/proc/{pid}")
    try:
        # After the name, which may hold anything: utime, stime, cutime and cstime are fields 14 to 17.
        fields = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    children: list[str] = []
    with contextlib.suppress(OSError):  # it may end now, or the kernel not list children: they count when they end
        for task in (process / "task").iterdir():
            children += (task / "children").read_text(encoding="utf-8").split()
    own = sum(int(x) for x in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    return own + sum(_processor_seconds(int(child)) for child in children)


class _Worker:
    """A child process that compiles one launch after the other."""

    def __init__(self, folder: str):
        # Variables that change what the compiler does would give other binaries than a clean environment.
        prefixes = ("TRITON_", "MLIR_", "LLVM_", "DISABLE_", "PTXAS_", "NVPTX_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
        environment |= {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        environment |= {"TRITON_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "unit_fast_kernels.assembly.worker"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True, start_new_session=True,
        )  # fmt: skip

    def answer(self, job: dict, limit: float) -> dict | None:
        """The worker's answer, None when it did not come within ``limit`` seconds of work or the worker died."""
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        begun, waited = _processor_seconds(self.process.pid), time.monotonic()
        while not select.select([self.process.stdout], [], [], min(1.0, limit))[0]:
            worked = _processor_seconds(self.process.pid) - begun
            if worked > limit or time.monotonic() - waited > _PATIENCE * limit:
                return None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def kill(self) -> int | None:
        """End the process and what it started; its exit status where it had ended by itself."""
        status = self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        return status


def _told(launch: Launch, arch: str) -> str:
    constants = ", ".join(f"{k}={v}" for k, v in launch.constexprs.items())
    options = ", ".join(f"{k}={v}" for k, v in launch.options.items())
    return f"{launch.name} for {arch} ({options}; {constants})"


def assemble_all(
    wanted: Iterable[tuple[Launch, str]],
    *,
    workers: int | None = None,
    limit_seconds: float = LIMIT_SECONDS,
    progress: Callable[[int, int], None] | None = None,
    failed: dict[str, AssemblyError] | None = None,
    triton_cache: str | None = None,
) -> dict[str, Assembled]:
    """Assemble every (launch, architecture); what is not cached is compiled in parallel. Keyed by ``Launch.key(arch)``.

    ``progress(done, all)`` counts different binaries. ``AssemblyError`` for the first that cannot be made, or, with
    ``failed``, an entry there for each. What is compiled is left in the folder ``triton_cache``, if it is given.
    """
    require()
    jobs = {launch.key(arch): (launch, arch) for launch, arch in wanted}
    found: dict[str, dict] = {key: figures for key in jobs if (figures := _cached(key)) is not None}
    missing = {key: job for key, job in jobs.items() if key not in found}
    tell = progress or (lambda done, total: None)
    tell(len(found), len(jobs))
    if missing:
        count = workers or max(2, min(8, len(os.sched_getaffinity(0))))
        for key, answer in _compile(missing, count, limit_seconds, triton_cache):
            if isinstance(answer, AssemblyError):
                if failed is None:
                    raise answer
                failed[key] = answer
            else:
                found[key] = answer
            tell(len(found) + len(failed or ()), len(jobs))
    return {
        key: Assembled(arch=arch, warps=launch.warps, **{**found[key], "loops": tuple(found[key]["loops"])})
        for key, (launch, arch) in jobs.items()
        if key in found
    }


def _compile(
    missing: Mapping[str, tuple[Launch, str]], workers: int, limit_seconds: float, triton_cache: str | None
) -> Iterator[tuple[str, dict | AssemblyError]]:
    """(key, figures or what went wrong) of each, as they come."""
    started: list[_Worker] = []
    idle: SimpleQueue[_Worker | None] = SimpleQueue()

    def one(key: str, launch: Launch, arch: str) -> tuple[str, dict | AssemblyError]:
        worker = idle.get()
        if worker is None:
            worker = _Worker(folder)
            started.append(worker)
        answer = worker.answer(launch.job(arch), limit_seconds)
        if answer is None:
            status = worker.kill()
            idle.put(None)
            why = (
                f"did not compile within {limit_seconds:g} s of work"
                if status is None
                else f"ended its compiler ({status})"
            )
            return key, AssemblyError(f"{_told(launch, arch)} {why}")
        idle.put(worker)
        if "error" in answer:
            return key, AssemblyError(f"{_told(launch, arch)} does not compile: {answer['error']}")
        _keep(key, answer)
        return key, answer

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = triton_cache or temporary
        count = min(len(missing), workers)
        for _ in range(count):
            idle.put(None)
        pool = ThreadPoolExecutor(count)
        try:
            for done in as_completed([pool.submit(one, key, *job) for key, job in missing.items()]):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in list(started):
                worker.kill()
            pool.shutdown()


def assemble(launch: Launch, arch: str, **options) -> Assembled:
    """``assemble_all`` for one."""
    return assemble_all([(launch, arch)], **options)[launch.key(arch)]


def _cached(key: str) -> dict | None:
    try:
        return json.loads((cache_folder() / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut off by a crash: compile again
        return None


def _keep(key: str, figures: dict) -> None:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".new", delete=False, encoding="utf-8") as file:
            json.dump(figures, file)
        os.replace(file.name, folder / f"{key}.json")
    except OSError:  # a read-only home: the next run compiles again
        return
