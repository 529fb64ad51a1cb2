"""Categories of what runs on a card by the kernels' names: ours by their own, libraries' by how they call theirs."""

import re

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


def category(name: str) -> str:
    """The category of a kernel, a copy or a memset by its name; ``OTHER`` where none knows it."""
    return next((found for found, rule in _RULES if rule.search(name)), OTHER)
