"""The Triton kernels against the float64 definitions, on a GPU where there is one, else interpreted on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import require

from vssm.ops import backends, gpu, selective_scan, use_portable

OPS = ("selective_scan", "causal_conv1d", "cross_selective_scan", "local_bidirectional_scan", "ssd")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _call(name, *args, **kwargs):
    return getattr(importlib.import_module("triton_cases"), name)(*args, **kwargs)


@pytest.fixture(scope="module")
def check():
    """check(name, ...) runs that function of tests/triton_cases.py where kernels can run, and raises what it raises."""
    if importlib.util.find_spec("triton") is None:
        require("triton", "Triton is not installed; pip install triton")
    if torch.cuda.is_available():
        yield _call
        return
    with (
        pytest.MonkeyPatch.context() as environment,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
    ):
        environment.setenv("TRITON_INTERPRET", "1")
        process.submit(int).result()
        environment.undo()
        try:
            process.submit(_call, "check_interpreter").result()
        except Exception as error:
            require("triton", f"its interpreter fails on this NumPy ({error}); update Triton or take NumPy < 2.4")
        yield lambda *args, **kwargs: process.submit(_call, *args, **kwargs).result()


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scan_agrees_with_the_definition_in_every_dtype(check, dtype, cut):
    check("check_scan", (1, 4, 37, 3, 2), dtype, cut)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize(
    "shape",  # batch, channels, length, states, groups
    [(1, 4, 1, 2, 1), (2, 3, 18, 16, 1), (1, 40, 5, 1, 1), (1, 2, 3, 20, 2), (1, 1, 33, 1, 1), (1, 6, 64, 4, 1)],
    ids=str,
)
def test_scan_agrees_with_the_definition_for_every_shape(check, shape, cut):
    check("check_scan", shape, cut=cut)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids="-".join)
def test_optional_inputs_of_the_scan_can_be_left_out(check, absent, softplus):
    check("check_scan", (1, 2, 6, 2, 1), absent=absent, softplus=softplus)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "segments"])
def test_the_last_state_needs_no_gradient(check, cut):
    check("check_scan", (1, 2, 34, 1, 1), cut=cut, last_state_gradient=False)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "segments"])
def test_the_scan_gives_the_same_bits_every_time(check, cut):
    check("check_scan_repeats_bit_by_bit", cut)


def test_an_item_does_not_depend_on_its_batch(check):
    check("check_scan_item_does_not_depend_on_its_batch")


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(check):
    check("check_scan_of_an_empty_batch")


def test_float64_goes_to_the_portable_form(check):
    check("check_scan_leaves_float64_to_the_portable_form")


@pytest.mark.parametrize("window", [2, 16])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_local_scan_agrees_with_the_definition_in_every_dtype(check, dtype, cut, window):
    check("check_local_scan", (1, 4, 37, 3, 2), window, dtype, cut)


@pytest.mark.parametrize(
    "shape,window",  # batch, channels, length, states, groups
    [
        ((1, 4, 1, 2, 1), 16),
        ((2, 3, 18, 16, 1), 4),
        ((1, 40, 5, 1, 1), 8),
        ((1, 2, 3, 20, 2), 4),
        ((1, 1, 50, 65, 1), 16),
        ((1, 6, 64, 4, 1), 1),
    ],
    ids=str,
)
def test_local_scan_agrees_with_the_definition_for_every_shape(check, shape, window):
    check("check_local_scan", shape, window)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids="-".join)
def test_optional_inputs_of_the_local_scan_can_be_left_out(check, absent, softplus):
    check("check_local_scan", (1, 2, 10, 2, 1), 8, absent=absent, softplus=softplus)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "segments"])
def test_the_local_scan_gives_the_same_bits_every_time(check, cut):
    check("check_local_scan_repeats_bit_by_bit", cut)


def test_a_window_of_one_step_makes_the_local_scan_the_selective_scan(check):
    check("check_local_scan_with_one_step_a_window_is_the_scan")


def test_the_local_scan_of_an_empty_batch_has_zero_gradients(check):
    check("check_local_scan_of_an_empty_batch")


@pytest.mark.parametrize("window,dtype", [(6, torch.float32), (32, torch.float32), (8, torch.float64)], ids=str)
def test_other_windows_and_float64_go_to_the_portable_form(check, window, dtype):
    check("check_local_scan_leaves_other_windows_to_the_portable_form", window, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_local_scan_is_finite_for_extreme_steps_and_decays(check, dtype):
    check("check_local_scan_is_finite_for_extreme_steps_and_decays", dtype)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("segments", [1, 4, 11])
def test_the_carry_over_segments_agrees_with_a_loop(check, segments, reverse, first):
    check("check_carry", segments, reverse, first)


def test_neighbouring_channels_may_share_their_decay(check):
    check("check_carry", 5, False, True, sharing=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mamba_2_agrees_with_the_definition_in_every_dtype(check, dtype):
    check("check_ssd", (1, 37, 4, 5, 2, 3), dtype)


@pytest.mark.parametrize(
    "shape",  # batch, length, heads, channels of a head, groups, states
    [
        (1, 1, 4, 2, 1, 2),
        (3, 2, 1, 1, 1, 1),
        (1, 70, 3, 2, 3, 4),
        (2, 130, 2, 3, 1, 2),
        (1, 17, 1, 66, 1, 3),
        (1, 5, 2, 2, 1, 35),
    ],
    ids=str,
)
def test_mamba_2_agrees_with_the_definition_for_every_shape(check, shape):
    check("check_ssd", shape)


@pytest.mark.parametrize("programs", [1, 2])
def test_heads_of_a_group_may_share_a_program(check, programs):
    check("check_ssd", (1, 20, 3, 3, 1, 2), programs=programs)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(
    "absent",
    [("D",), ("z",), ("dt_bias",), ("initial_states",), ("D", "z", "dt_bias", "initial_states")],
    ids="-".join,
)
def test_optional_inputs_of_mamba_2_can_be_left_out(check, absent, softplus):
    check("check_ssd", (1, 19, 2, 3, 1, 2), absent=absent, softplus=softplus)


def test_skip_weights_of_mamba_2_can_be_one_per_channel(check):
    check("check_ssd", (1, 19, 2, 3, 1, 2), wide_D=True)


def test_the_final_states_need_no_gradient(check):
    check("check_ssd_without_gradient_of_the_final_states")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_step_sizes_of_mamba_2_can_be_wider_than_the_sequences(check, dtype):
    check("check_ssd_takes_wider_step_sizes", dtype)


def test_limits_cut_step_sizes_and_their_gradients(check):
    check("check_ssd_limits_step_sizes")


def test_strong_decay_and_long_memory_stay_exact(check):
    check("check_ssd_with_strong_decay_and_long_memory")


def test_short_memory_after_a_huge_step_stays_exact(check):
    check("check_ssd_after_huge_steps")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_mamba_2_is_finite_for_extreme_steps_and_decays(check, dtype):
    check("check_ssd_is_finite_for_extreme_steps_and_decays", dtype)


def test_mamba_2_gives_the_same_bits_every_time(check):
    check("check_ssd_repeats_bit_by_bit")


def test_an_item_of_mamba_2_does_not_depend_on_its_batch(check):
    check("check_ssd_of_an_item_does_not_depend_on_its_batch")


def test_mamba_2_of_an_empty_batch_has_zero_gradients(check):
    check("check_ssd_of_an_empty_batch")


def test_float64_and_mixed_dtypes_of_mamba_2_go_to_the_portable_form(check):
    check("check_ssd_leaves_other_dtypes_to_the_portable_form")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU rounds by itself")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_mamba_2_are_exact_enough_on_matrix_units(check, dtype):
    check("check_ssd_with_products_rounded_as_matrix_units_round", dtype)


@pytest.mark.parametrize("op", ["local_bidirectional_scan", "ssd"])
def test_non_contiguous_inputs_give_the_same_numbers(check, op):
    check("check_non_contiguous_inputs_give_the_same_numbers", op)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution_agrees_with_the_definition_in_every_dtype(check, dtype, silu):
    check("check_conv", (2, 6, 37, 4), dtype, silu)


@pytest.mark.parametrize(
    "shape",  # batch, channels, length, taps
    [(1, 1, 1, 4), (2, 33, 2, 3), (1, 5, 129, 1), (1, 3, 600, 7), (1, 2, 4500, 2), (1, 3, 16, 9)],
    ids=str,
)
def test_convolution_agrees_with_the_definition_for_every_shape(check, shape):
    check("check_conv", shape)


def test_convolution_needs_no_bias(check):
    check("check_conv", (2, 20, 45, 4), bias=False)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_weights_of_the_convolution_may_be_half_precision(check, dtype):
    check("check_conv", (1, 3, 20, 4), dtype, weight_dtype=dtype)


def test_the_convolution_gives_the_same_bits_every_time(check):
    check("check_conv_repeats_bit_by_bit")


def test_an_empty_batch_is_convolved_to_nothing_with_zero_gradients(check):
    check("check_conv_of_an_empty_batch")


WAYS = ("together", "apart", "segments")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scan_along_routes_agrees_with_the_definition_in_every_dtype(check, dtype, way):
    check("check_cross", (1, 35, 3, 2, 37, 1, 2), way, dtype)


@pytest.mark.parametrize("way", ["together", "segments"])
@pytest.mark.parametrize(
    "shape",  # batch, positions, channels, routes, steps, states, rank
    [
        (2, 1, 1, 1, 1, 1, 1),
        (1, 40, 2, 1, 33, 3, 2),
        (2, 6, 33, 3, 6, 1, 1),
        (1, 5, 2, 2, 4, 16, 3),
        (1, 5, 2, 1, 5, 20, 40),
    ],
    ids=str,
)
def test_scan_along_routes_agrees_with_the_definition_for_every_shape(check, shape, way):
    check("check_cross", shape, way)


@pytest.mark.parametrize("states,way", [(1, "apart"), (2, "segments")])
def test_routes_may_have_channels_of_their_own(check, states, way):
    check("check_cross", (1, 34, 3, 2, 35, states, 2), way, own=True)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("absent", [("D",), ("delta_bias",), ("D", "delta_bias")], ids="-".join)
def test_optional_inputs_of_the_scan_along_routes_can_be_left_out(check, absent, softplus):
    check("check_cross", (1, 6, 2, 2, 7, 1, 1), absent=absent, softplus=softplus)


@pytest.mark.parametrize("way", WAYS)
def test_the_scan_along_routes_gives_the_same_bits_every_time(check, way):
    check("check_cross_repeats_bit_by_bit", way)


def test_any_number_that_is_no_position_is_padding(check):
    check("check_cross_takes_any_number_that_is_no_position_for_padding")


def test_routes_of_an_empty_batch_give_empty_output_and_zero_gradients(check):
    check("check_cross_of_an_empty_batch")


def test_routes_in_float64_or_of_high_rank_go_to_the_portable_form(check):
    check("check_cross_leaves_what_is_too_large_to_the_portable_form")


@pytest.mark.parametrize("op", OPS)
def test_the_dispatcher_takes_what_the_kernels_return(check, op):
    check("check_the_dispatcher_takes_what_the_kernels_return", op)


@pytest.fixture
def with_gpu(monkeypatch):
    """`vssm info` then looks at a GPU, whether there is one or not."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    return lambda reason: monkeypatch.setattr(gpu, "reason", reason)


@pytest.mark.parametrize("op", OPS)
def test_info_names_the_kernel_of_a_gpu_or_why_there_is_none(with_gpu, op):
    with_gpu("")
    assert backends.Backend(op, "cuda", "triton", "") in backends.status()
    with_gpu("a reason")
    assert backends.Backend(op, "cuda", "portable", "a reason") in backends.status()


def test_without_triton_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in gpu._find()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA or ROCm device" in gpu._find()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_ops_on_a_gpu_run_the_kernels_unless_switched_off(monkeypatch):
    import triton

    launched, run = [], triton.JITFunction.run

    def count(kernel, *args, **kwargs):
        launched.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(triton.JITFunction, "run", count)
    u, weights = torch.randn(1, 4, 20, device="cuda", requires_grad=True), torch.randn(1, 2, 20, device="cuda")
    arguments = u, u, -torch.ones(4, 2, device="cuda"), weights, weights
    selective_scan(*arguments).sum().backward()
    assert launched == ["scan_kernel", "backward_kernel"]
    with use_portable():
        selective_scan(*arguments).sum().backward()
    assert len(launched) == 2
