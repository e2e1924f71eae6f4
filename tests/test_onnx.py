"""ONNX: exported ops, backbones and networks run in onnxruntime with PyTorch's numbers, in graphs of bounded size."""

import numpy as np
import pytest
import timm
import torch

import vssm  # noqa: F401
from vssm.networks import UMambaBot
from vssm.ops import causal_conv1d, selective_scan

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def exported(module, inputs, path):
    """The graph's number of nodes, and what onnxruntime computes for `inputs`."""
    with torch.no_grad():
        program = torch.onnx.export(module.eval(), inputs, dynamo=True, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    return len(program.model.graph), session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))


class Scan(torch.nn.Module):
    def forward(self, u, delta, A, B, C, D, z, bias):
        return selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, return_last_state=True)


def test_the_scan_keeps_its_numbers_and_its_graph_at_any_length(tmp_path):
    sizes = []
    for length in (20, 700):
        rng = torch.Generator().manual_seed(0)
        shapes = [
            (2, 4, length),
            (2, 4, length),
            (4, 3),
            (2, 2, 3, length),
            (2, 2, 3, length),
            (4,),
            (2, 4, length),
            (4,),
        ]
        inputs = [torch.randn(shape, generator=rng) for shape in shapes]
        inputs[2] = -inputs[2].exp()
        nodes, results = exported(Scan(), tuple(inputs), tmp_path / "scan.onnx")
        for got, want in zip(results, Scan()(*inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)
        sizes.append(nodes)
    assert sizes[0] == sizes[1] < 100


class Conv(torch.nn.Module):
    def forward(self, x, weight, bias):
        return causal_conv1d(x, weight, bias, activation="silu")


def test_the_causal_convolution_keeps_its_numbers(tmp_path):
    inputs = torch.randn(2, 3, 9), torch.randn(3, 4), torch.randn(3)
    _, (got,) = exported(Conv(), inputs, tmp_path / "conv.onnx")
    torch.testing.assert_close(torch.from_numpy(got), Conv()(*inputs))


@pytest.mark.parametrize("kind", ["vmamba", "umamba"])
def test_a_model_gives_the_same_output(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "vmamba":
        model, x = (
            timm.create_model("vmamba_tiny", depths=(1, 1), dims=(8, 16), num_classes=5),
            torch.randn(1, 3, 48, 64),
        )
    else:
        stages = dict(features=(4, 8), strides=(1, 2), kernel_sizes=(3, 3), num_blocks=(1, 1), num_decoder_blocks=(1,))
        model, x = UMambaBot(2, 1, 3, **stages), torch.randn(1, 1, 16, 16)
    _, (got,) = exported(model, (x,), tmp_path / "model.onnx")
    with torch.no_grad():
        want = model(x).numpy()
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)
