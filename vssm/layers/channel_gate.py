"""A weight per channel from the whole map.

Letters: B batch, C channels, H height, W width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelGate(nn.Module):
    """Squeeze and excitation (arXiv 1709.01507) without biases: map (B, H, W, C) times one weight per channel."""

    def __init__(self, dim: int, reduction: int = 8):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // reduction, bias=False)
        self.fc2 = nn.Linear(dim // reduction, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))).sigmoid()
