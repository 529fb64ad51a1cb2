"""What a profiler saw of some steps: kernels by category, launches, copies, waits, how long the card was busy.

``Profile.of`` takes plain events, so that it can be tried without a card; ``_device.profile`` makes them from torch's
profiler. Categories go by the kernels' names: ours by their own, the libraries' by how they call theirs.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

OTHER = "other"
CATEGORIES: dict[str, tuple[str, ...]] = {
    "attention (ours)": (r"^_attention_(fwd|bwd)",),
    "cross-attention (ours)": (r"^_cross_attention_",),
    "residual norm, FFN epilogue (ours)": (r"^_residual_norm_", r"^_bias_act_dropout_", r"^_dropout_"),
    "frozen BN + act (ours)": (r"^_frozen_bn_act_",),
    "AdamW (ours)": (r"^_adamw_",),
    "matching and losses (ours)": (r"^_match_cost_", r"^_assignment_", r"^_set_loss_", r"^_attribute_loss_"),
    "key lists, partial sums, memory": (r"^_key_list_", r"^_sum_partials_", r"^[Mm]emset", r"^[Mm]emcpy"),
    "fused by torch.compile": (r"^triton_(poi|red|per|for)_",),
    "attention (library)": (
        r"flash_(fwd|bwd|fprop|bprop)", r"fmha", r"_sdpa_", r"[aA]ttention_?[kK]ernel", r"cudnn::fusion::",
        r"unpack_cudnn",
    ),
    "convolutions": (
        r"implicit_gemm", r"(fprop|dgrad|wgrad)", r"cudnn", r"\bconv(olution)?\d*d?\b", r"conv_depthwise", r"winograd",
        r"nchwToNhwc", r"nhwcToNchw", r"AddPadding",
    ),
    "matrix products": (
        r"^nvjet_", r"gemm", r"gemv", r"cublas", r"splitKreduce", r"cutlass.*Kernel2?<", r"dot_kernel",
        r"^triton_(mm|tem)",
    ),
    "optimiser (library)": (r"multi_tensor_apply_kernel.*(Adam|LpNorm|FusedOptimizer)",),
    "concatenation": (r"CatArrayBatchedCopy",),
    "max pool": (r"max_pool", r"MaxPool"),
    "softmax and dropout (library)": (r"[sS]oft[mM]ax", r"fused_dropout_kernel", r"masked_scale_kernel"),
    "norms (library)": (r"layer_norm", r"LayerNorm", r"GammaBetaBackward", r"batch_norm", r"group_norm"),
    "casts and copies": (
        r"direct_copy_kernel", r"bfloat16_copy_kernel", r"float16_copy_kernel", r"(half|bfloat16).*copy_kernel",
        r"^copy_device_to_device",
    ),
    "reductions": (r"reduce_kernel", r"^reduction_"),
    "other elementwise": (
        r"elementwise_kernel", r"multi_tensor_apply_kernel", r"distribution_elementwise",
        r"unrolled_elementwise",
    ),
}  # fmt: skip
"""Category -> beginnings or parts of kernels' names; the first category that knows a name has it."""
_RULES = [(category, re.compile("|".join(patterns))) for category, patterns in CATEGORIES.items()]

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel", "cudaGraphLaunch")
"""Beginnings of the host's calls that start work."""
_WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
    "cuCtxSynchronize", "cuEventSynchronize",
)  # fmt: skip
"""The host's calls that wait for the card. ``cudaMemcpyAsync`` is none of them: it waits only where the memory is not
pinned, and then a ``cudaStreamSynchronize`` stands beside it."""
STEP = "benchmark: one step"
"""The range on the host that each step is run in."""


def category(name: str) -> str:
    """The category of a kernel, a copy or a memset by its name; ``OTHER`` where none knows it."""
    return next((found for found, rule in _RULES if rule.search(name)), OTHER)


@dataclass(frozen=True)
class Event:
    """One line of a profiler's trace."""

    name: str
    on_card: bool
    """Whether it ran on the card; else it is a call or a range of the host."""
    start_us: float
    end_us: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one step does, as a mean over the steps that were profiled."""

    launches: float
    """Calls of the host that start work; a graph's replay is one."""
    kernels: float
    """What ran on the card besides copies and memsets."""
    waits: float
    """Calls of the host that wait for the card."""
    copies_to_host: float
    copies_to_device: float
    copies_on_device: float
    busy_ms: float
    """Time in which the card ran anything: what runs beside something else counts once."""
    categories: dict[str, dict[str, float]]
    """Category -> ``ms`` (added up) and ``kernels``; the longest first."""
    by_name: dict[str, dict[str, float]]
    """Kernel -> the same."""

    @classmethod
    def of(cls, events: Sequence[Event], steps: int) -> "Profile":
        """From the events of ``steps`` steps, each within a range of the host called ``STEP``.

        Host calls outside the ranges are the measuring's own and are not counted. ``ValueError`` where the ranges are
        not ``steps``: the trace is not what it should be.
        """
        ranges = [(e.start_us, e.end_us) for e in events if not e.on_card and e.name == STEP]
        if len(ranges) != steps or steps < 1:
            raise ValueError(f"Profile.of: {len(ranges)} ranges {STEP!r} in the trace, {steps} were expected")
        calls: Counter[str] = Counter()
        for event in events:
            if not event.on_card and any(low <= event.start_us < high for low, high in ranges):
                calls[event.name] += 1
        card = [e for e in events if e.on_card]
        kernels = [e for e in card if not e.name.startswith("Mem")]

        def copies(beginning: str) -> float:
            return sum(e.name.startswith(f"Memcpy {beginning}") for e in card) / steps

        return cls(
            launches=sum(n for name, n in calls.items() if name.startswith(_LAUNCHES)) / steps,
            kernels=len(kernels) / steps,
            waits=sum(calls[name] for name in _WAITS) / steps,
            copies_to_host=copies("DtoH"),
            copies_to_device=copies("HtoD"),
            copies_on_device=copies("DtoD"),
            busy_ms=_covered([(e.start_us, e.end_us) for e in card]) * 1e-3 / steps,
            categories=_sums(((category(e.name), e) for e in card), steps),
            by_name=_sums(((e.name, e) for e in card), steps),
        )

    def row(self) -> dict:
        """What a results file keeps: all but the single kernels."""
        found = asdict(self)
        del found["by_name"]
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of the spans."""
    total, end = 0.0, float("-inf")
    for low, high in sorted(spans):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


def _sums(named: Iterable[tuple[str, Event]], steps: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = {}
    for name, event in named:
        sums = found.setdefault(name, [0.0, 0])
        sums[0] += event.end_us - event.start_us
        sums[1] += 1
    return {
        name: {"ms": round(us * 1e-3 / steps, 5), "kernels": round(count / steps, 2)}
        for name, (us, count) in sorted(found.items(), key=lambda item: -item[1][0])
    }
