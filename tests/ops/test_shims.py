"""Import names of other packages backed by vssm: what they compute, and that they hide no installed package."""

import importlib
import subprocess
import sys

import pytest
import torch
from tolerances import relative_rms

from vssm.layers.mamba import Mamba
from vssm.ops import causal_conv1d, install_shims, selective_scan, ssd

NAMES = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex")


@pytest.fixture
def shims(monkeypatch):
    """The shims, for the duration of a test."""
    for name in [n for n in sys.modules if n.split(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)
    if any(importlib.util.find_spec(name) for name in NAMES):
        pytest.skip("one of the packages itself is installed")
    before = set(sys.modules)
    yield install_shims()
    for name in set(sys.modules) - before:
        if name.split(".")[0] in NAMES:
            del sys.modules[name]


def inputs(groups=2):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    return {
        "u": normal(2, 6, 21),
        "delta": normal(2, 6, 21),
        "A": -normal(6, 3).exp(),
        "B": normal(2, groups, 3, 21),
        "C": normal(2, groups, 3, 21),
        "D": normal(6),
        "delta_bias": normal(6),
    }


def gradients(function, tensors, cotangent):
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    return torch.autograd.grad(function(**leaves), list(leaves.values()), cotangent)


def test_importing_vssm_installs_nothing():
    code = f"import sys, vssm; assert not set({NAMES!r}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_the_packages_can_be_imported(shims):
    for name in shims:
        importlib.import_module(name)
    from mamba_ssm import Mamba as shimmed
    from mamba_ssm.modules.mamba_simple import Mamba as same
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    assert shimmed is same is Mamba and selective_scan_fn is selective_scan
    with pytest.raises(ImportError):
        from mamba_ssm import Mamba3  # noqa: F401


def test_a_second_call_changes_nothing(shims):
    module = sys.modules["mamba_ssm"]
    assert install_shims() == shims and sys.modules["mamba_ssm"] is module


def test_an_installed_package_is_not_hidden(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "selective_scan_cuda_oflex.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="selective_scan_cuda_oflex is installed"):
        install_shims()
    assert "mamba_ssm" not in sys.modules


@pytest.mark.parametrize("module,extra", [("selective_scan_cuda_oflex", (1, True)), ("selective_scan_cuda_core", (1,))])
def test_vmambas_kernels_give_the_scan_and_its_gradients(shims, module, extra):
    kernels, x = importlib.import_module(module), inputs()
    want = selective_scan(**x, delta_softplus=True)
    out, saved, *_ = kernels.fwd(*x.values(), True, *extra)
    assert torch.equal(out, want)
    got = kernels.bwd(*x.values(), torch.ones_like(out), saved, True, 1)
    expected = gradients(lambda **leaves: selective_scan(**leaves, delta_softplus=True), x, torch.ones_like(out))
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)


def test_oflex_returns_float32_for_half_precision(shims):
    import selective_scan_cuda_oflex

    x = {name: t.bfloat16() if name in ("u", "delta", "B", "C") else t for name, t in inputs().items()}
    assert selective_scan_cuda_oflex.fwd(*x.values(), True, 1, True)[0].dtype == torch.float32
    assert selective_scan_cuda_oflex.fwd(*x.values(), True, 1, False)[0].dtype == torch.bfloat16


def test_mamba_ssms_kernel_gives_the_gated_scan_the_last_state_and_all_gradients(shims):
    import selective_scan_cuda

    x, z = inputs(1), torch.randn(2, 6, 21)
    *first, bias = x.values()
    want, state = selective_scan(**x, z=z, delta_softplus=True, return_last_state=True)
    out, saved, gated = selective_scan_cuda.fwd(*first, z, bias, True)
    assert relative_rms(gated, want) < 1e-6
    # How mamba_ssm reads the last state.
    assert torch.equal(saved[:, :, -1, 1::2], state)
    place, ones = torch.empty(2, 12, 21)[:, 6:], torch.ones_like(out)
    *got, dz, again = selective_scan_cuda.bwd(*first, z, bias, ones, saved, out, place, True, True)
    assert dz is place and torch.equal(again, gated)
    expected = gradients(lambda **leaves: selective_scan(**leaves, delta_softplus=True), x | {"z": z}, ones)
    for one, two in zip([*got, dz], expected, strict=True):
        assert relative_rms(one, two) < 1e-6


def test_mamba_inner_is_the_mixer_between_its_projections(shims):
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    torch.manual_seed(0)
    mixer, x = Mamba(8), torch.randn(2, 11, 8)
    got = mamba_inner_fn(
        (mixer.in_proj.weight @ x.mT),
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.out_proj.weight,
        None,
        -mixer.A_log.exp(),
        D=mixer.D,
        delta_bias=mixer.dt_proj.bias,
    )
    torch.testing.assert_close(got, mixer(x))


def test_the_convolution_takes_what_it_can_and_refuses_the_rest(shims):
    from causal_conv1d import causal_conv1d_fn

    x, weight = torch.randn(2, 3, 9), torch.randn(3, 4)
    assert torch.equal(causal_conv1d_fn(x, weight, activation="silu"), causal_conv1d(x, weight, activation="silu"))
    with pytest.raises(ValueError, match="has no seq_idx; leave it out"):
        causal_conv1d_fn(x, weight, seq_idx=torch.zeros(2, 9))


def test_mamba_2s_scan_takes_its_arguments_by_place_and_name(shims):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B = torch.randn(1, 20, 2, 4), torch.rand(1, 20, 2), -torch.rand(2), torch.randn(1, 20, 1, 3)
    out, states = mamba_chunk_scan_combined(x, dt, A, B, B, 8, D=torch.ones(2), z=x, return_final_states=True)
    want = ssd(x, dt, A, B, B, 8, torch.ones(2), x, return_final_states=True)
    assert torch.equal(out, want[0]) and torch.equal(states, want[1])
