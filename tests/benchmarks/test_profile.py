"""What is made of a profiler's trace: categories of kernels, launches, waits, copies, busy time; on made-up events."""

import contextlib

import pytest
import torch

from benchmarks.runner import kernels
from benchmarks.runner.capture import captured_rounds
from benchmarks.runner.profile import STEP, Profile, events_of, profile
from benchmarks.runner.timing import back_to_back
from tests.benchmarks.common import TWO_STEPS, host

AT = "void at::native::"
VECTOR, ELEMENT = f"{AT}vectorized_elementwise_kernel<4, at::native::", f"{AT}elementwise_kernel<128, 2, at::native::"
MULTI = f"{AT}(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
NAMES = {
    "attention (ours)": ["_attention_fwd_kernel", "_attention_bwd_q_kernel", "_attention_bwd_kv_kernel"],
    "cross-attention (ours)": [
        "_cross_attention_fwd_kernel", "_cross_attention_bwd_kernel", "_cross_attention_join_kernel",
    ],
    "residual norm, FFN epilogue (ours)": [
        "_residual_norm_fwd_kernel", "_residual_norm_bwd_kernel", "_bias_act_dropout_fwd_kernel", "_dropout_kernel",
    ],
    "frozen BN + act (ours)": ["_frozen_bn_act_fwd_kernel", "_frozen_bn_act_bwd_kernel"],
    "AdamW (ours)": ["_adamw_norms_kernel", "_adamw_decide_kernel", "_adamw_update_kernel"],
    "matching and losses (ours)": [
        "_match_cost_kernel", "_assignment_kernel", "_set_loss_fwd_kernel", "_attribute_loss_bwd_kernel",
    ],
    "key lists, partial sums, memory": [
        "_key_list_kernel", "_sum_partials_kernel", "Memset (Device)", "Memcpy DtoD (Device -> Device)",
        "Memcpy HtoD (Pageable -> Device)", "memset32", "memcpy32_post",
    ],
    "fused by torch.compile": ["triton_per_fused_native_layer_norm_3", "triton_poi_fused_0", "triton_red_fused_9"],
    "attention (library)": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o<true>(void const*, void const*, void*)",
        "at::cuda::philox::unpack_cudnn(at::PhiloxCudaState, long*, long*)",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<32, 128, 128, 4> >(pytorch_flash::Params)",
    ],
    "convolutions": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_kernel__5x_cudnn",
        "sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize64x64x64_kernel__5x_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8>()",
        "void cask_plugin__5x_cudnn::xmma__5x_cudnn::init_device_workspace_kernel<implicit_gemm::wgrad_indexed>()",
        "void nhwcAddPaddingKernel<__nv_bfloat16, __nv_bfloat16, float, true>(int, int)",
        "void cudnn::cnn::reduce_wgrad_nchw_helper<float, __nv_bfloat16>(void*, void const*, float, int, int)",
    ],
    "matrix products": [
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasLt::cublasSplitKParams<float>)",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64_64x3_tn_align2>(Params)",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "void gemv2T_kernel_val<int, float>()",
    ],
    "optimiser (library)": [
        f"{MULTI}FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float>>",
        f"{MULTI}TensorListMetadata<1>, at::native::LpNormFunctor<float, (at::native::NormType)1, float, 1, 1, 0> >",
    ],
    "concatenation": [f"{AT}(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned int, 3>"],
    "max pool": [f"{AT}(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16, int>(c10::BFloat16 const*, int)"],
    "softmax and dropout (library)": [
        f"{AT}(anonymous namespace)::cunn_SoftMaxForwardReg<float, float, float>()",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 7, false, false>(float*)",
        f"{AT}(anonymous namespace)::fused_dropout_kernel_vec<c10::BFloat16, float, unsigned int, 1, 8, bool>()",
    ],
    "norms (library)": [
        f"{AT}(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>(int, float, float const*)",
        f"{AT}(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 32u, 32u>()",
    ],
    "casts and copies": [
        f"{VECTOR}bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::{{lambda(float)#1}}, std::array<char*, 2ul> >()",
        f"{AT}unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{{lambda()#3}}>",
    ],
    "reductions": [
        f"{AT}reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, at::native::func_wrapper_t<c10::BFloat16>> >()",
        "reduction_prod_kernel",
    ],
    "other elementwise": [
        f"{VECTOR}CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul> >(int)",
        f"{ELEMENT}gpu_kernel_impl_nocast<at::native::BinaryFunctor<float, float, float, MulFunctor<float> > >()",
        f"{MULTI}TensorListMetadata<3>, BinaryOpListAlphaFunctor<float, 3, 2, 2>, std::multiplies<float>, float>",
        f"{AT}(anonymous namespace)::distribution_elementwise_grid_stride_kernel<unsigned long, 2>",
    ],
    "other": [
        f"{AT}tensor_kernel_scan_outer_dim<float, unsigned int, std::plus<float> >(float*, float const*)",
        f"{AT}(anonymous namespace)::upsample_nearest2d_out_frame<float>(float const*, float*)",
        f"{AT}vectorized_gather_kernel<16, long>(char*, char*, long*, int)", "a_kernel_that_nobody_knows",
    ],
}  # fmt: skip
"""Category -> names as profilers give them, the long ones cut."""


@pytest.mark.parametrize("category", NAMES)
def test_kernels_go_to_their_category(category):
    assert {name: kernels.category(name) for name in NAMES[category]} == dict.fromkeys(NAMES[category], category)


def test_every_category_is_tried_here():
    assert set(NAMES) == {*kernels.CATEGORIES, kernels.OTHER}


def test_a_profile_of_made_up_events():
    found = Profile.of(TWO_STEPS, 2)
    assert (found.launches, found.kernels, found.waits) == (2.0, 1.5, 0.5)
    assert (found.copies_to_host, found.copies_to_device, found.copies_on_device) == (0.5, 0.5, 0.0)
    assert found.busy_ms == pytest.approx((1500 + 1000 + 100 + 200) / 2 / 1000)
    assert list(found.categories) == ["AdamW (ours)", "matrix products", "key lists, partial sums, memory"]
    assert found.categories["AdamW (ours)"] == {"ms": 1.0, "kernels": 1.0}
    assert found.categories["key lists, partial sums, memory"] == {"ms": 0.15, "kernels": 1.5}
    assert found.by_name["nvjet_sm90_tst_64x64"] == {"ms": 0.5, "kernels": 0.5}
    assert "by_name" not in found.row()
    assert found.row()["busy_ms"] == 1.4


def test_a_copy_that_does_not_wait_is_no_wait():
    """``cudaMemcpyAsync`` begins as ``cudaMemcpy`` does."""
    events = [host(STEP, 0, 10), host("cudaMemcpyAsync", 1), host("cudaMemcpy", 2)]
    assert Profile.of(events, 1).waits == 1


def test_a_trace_without_its_steps_is_refused():
    with pytest.raises(ValueError, match="2 ranges .* 3 were expected"):
        Profile.of(TWO_STEPS, 3)


class Traced:
    """As torch's profiler events."""

    def __init__(self, name, on_card, annotation=False):
        kind = torch.autograd.DeviceType
        self.name, self.device_type = name, kind.CUDA if on_card else kind.CPU
        self.is_user_annotation = annotation
        self.time_range = torch.autograd.profiler_util.Interval(1.0, 3.0)


def test_ranges_on_the_cards_line_are_no_work():
    """An optimiser's step is drawn around its kernels there, which would count twice."""
    name = "Optimizer.step#AdamW.step"
    found = events_of(
        [
            Traced(name, False, True),
            Traced(name, True),
            Traced(STEP, False, True),
            Traced(STEP, True, True),
            Traced("k", True),
        ]
    )
    assert [(e.name, e.on_card) for e in found] == [(name, False), (STEP, False), ("k", True)]
    assert (found[2].start_us, found[2].end_us) == (1.0, 3.0)


def test_a_step_on_a_cpu_has_no_kernels():
    x = torch.randn(64, 64)
    calls = []
    found = profile(lambda: calls.append(x @ x), torch.device("cpu"), steps=3)
    assert len(calls) == 4  # one before
    assert (found.kernels, found.launches, found.busy_ms, found.categories) == (0, 0, 0, {})


def test_rounds_back_to_back_take_about_their_time():
    calls = []
    times = back_to_back(lambda: calls.append(None), torch.device("cpu"), rounds=3, warmup=2, least_ms=0.01)
    assert len(times) == 3
    assert all(t > 0 for t in times)
    assert len(calls) >= 2 + 1 + 3


def test_a_cpu_captures_nothing_and_says_so():
    class Provider:
        def step(self, marks):
            raise AssertionError("nothing is run")

    rounds, why = captured_rounds({"ours": Provider()}, torch.device("cpu"), 3, lambda: None)
    assert rounds == {}
    assert why == {"ours": "graphs need a CUDA device, this is cpu"}


@pytest.mark.gpu
def test_replays_are_timed_by_phase_and_waits_are_refused():
    device = torch.device("cuda")
    x = torch.randn(512, 512, device=device)

    class Fine:
        def step(self, marks):
            y = x @ x
            marks("first")
            (y @ y).sum()
            marks("second")

    class Waits:
        def step(self, marks):
            (x @ x).sum().item()

    rounds, why = captured_rounds({"fine": Fine(), "waits": Waits()}, device, 3, lambda: None)
    assert [set(r) for r in rounds["fine"]] == [{"first", "second", "total"}] * 3
    assert all(r["first"] > 0 and r["total"] > r["first"] for r in rounds["fine"])
    assert "waits for the card" in why["waits"]
    torch.randn(3, device=device)  # the generator is not left in a capture
    found = profile(lambda: Waits().step(None), device)
    assert found.kernels >= 2
    assert found.waits >= 1
    assert found.copies_to_host == 1


@pytest.fixture
def stand_in(monkeypatch):
    """What ``Captured`` asks of CUDA, on a CPU: a replay moves the clock on by one for each event in the graph."""
    clock, inside, made, modes = [0.0], [], [], []

    class StandInEvent:
        def __init__(self, enable_timing=False, external=False):
            assert enable_timing
            assert external == bool(inside)  # an event of a graph is recorded anew by each replay
            made.append(self)

        def record(self):
            clock[0] += 1
            self.at = clock[0]

        def elapsed_time(self, other):
            return other.at - self.at

    class StandInGraph:
        def replay(self):
            for event in made:
                event.record()

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(graph, stream):
        inside.append(graph)
        yield
        inside.clear()

    @contextlib.contextmanager
    def on(stream):
        yield

    changes = {"Event": StandInEvent, "CUDAGraph": StandInGraph, "Stream": Stream, "graph": graph, "stream": on}
    changes |= {"current_stream": Stream, "synchronize": lambda *device: None, "get_sync_debug_mode": lambda: 0}
    changes |= {"set_sync_debug_mode": modes.append}
    for name, value in changes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return modes


def test_captured_steps_take_turns_and_tell_their_phases(stand_in):
    class Fine:
        def step(self, marks):
            marks("first")
            marks.skip()
            marks("second")

    class Plain:
        def step(self, marks):
            pass

    class Waits:
        def step(self, marks):
            if stand_in[-1] == "error":  # as CUDA does in that mode
                raise RuntimeError("called a synchronizing CUDA operation\nmore")

    flushed = []
    providers = {"fine": Fine(), "plain": Plain()}
    device = torch.device("cuda")
    rounds, why = captured_rounds(providers, device, 2, lambda: flushed.append(None))
    assert rounds["fine"] == [{"first": 1.0, "second": 1.0, "total": 2.0}] * 2
    assert rounds["plain"] == [{"total": 1.0}] * 2
    assert why == {}
    assert len(flushed) == 4
    assert stand_in == ["error", 0, "error", 0]  # put back
    rounds, why = captured_rounds({"waits": Waits()}, device, 2, lambda: None)
    assert rounds == {}
    assert why == {"waits": "it waits for the card (called a synchronizing CUDA operation)"}
    assert stand_in[-1] == 0
