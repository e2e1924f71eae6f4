"""The gradients of a layer against those of the ops' definitions in float64."""

import torch
from tolerances import relative_rms

from vssm.ops import use_reference


def assert_reference_gradients(layer: torch.nn.Module, x: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Fails unless every parameter of `layer`, an x -> x of the same shape, gets the reference gradient; not all 0."""
    weight = torch.randn_like(x)
    (layer(x) * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.double().zero_grad()
    with use_reference():
        (layer(x.double()) * weight).sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.abs().max() > 0, name
        assert relative_rms(gradients[name], p.grad) < tolerance, name
