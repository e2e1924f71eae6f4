"""VCMamba's mixer: what moved where, and the scans written out step by step."""

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn

from vssm.layers.routes import SnakeRoutes
from vssm.layers.snake_mamba import SnakeMamba, moves

START, RIGHT, LEFT, UP, DOWN = range(5)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (
            (2, 3),
            [
                [START, RIGHT, RIGHT, DOWN, LEFT, LEFT],
                [START, RIGHT, RIGHT, UP, LEFT, LEFT],
                [START, DOWN, RIGHT, UP, RIGHT, DOWN],
                [START, UP, LEFT, DOWN, LEFT, UP],
            ],
        ),
        ((2, 1), [[START, DOWN], [START, UP], [START, DOWN], [START, UP]]),
        ((1, 2), [[START, RIGHT], [START, LEFT], [START, RIGHT], [START, LEFT]]),
        ((1, 1), [[START]] * 4),
    ],
)
def test_moves_say_how_a_snake_reached_each_step(size, wanted):
    assert moves(SnakeRoutes().table(size), size[1]).tolist() == wanted


def written_out(layer: SnakeMamba, x: torch.Tensor) -> torch.Tensor:
    """Sum over the snakes (B, D, H, W) of the recurrence, one step after the other."""
    size = x.shape[2:]
    rows = layer.x_proj(x.flatten(2).transpose(1, 2))
    rank, states = layer.dt_rank, layer.d_state
    dt = F.softplus(layer.dt_proj(rows[..., :rank]) + layer.dt_proj.bias)
    A, flat, total = -layer.A_log.exp(), x.flatten(2), torch.zeros_like(x.flatten(2))
    orders = SnakeRoutes().table(size)
    for order, how in zip(orders.tolist(), moves(orders, size[1]).tolist(), strict=True):
        h = x.new_zeros(x.shape[0], x.shape[1], states)
        for step, position in enumerate(order):
            u = flat[:, :, position]
            B = rows[:, step, rank : rank + states] + layer.direction_Bs[how[step]]
            C = rows[:, step, rank + states :]
            h = torch.exp(dt[:, step, :, None] * A) * h + dt[:, step, :, None] * B[:, None] * u[..., None]
            total[:, :, position] += (h * C[:, None]).sum(-1) + layer.D * u
    return total.view(x.shape)


@pytest.mark.parametrize("size", [(3, 4), (1, 5), (4, 1)])
def test_the_input_follows_the_snakes_while_dt_b_and_c_stay_in_row_major_order(size):
    torch.manual_seed(0)
    layer = SnakeMamba(8, d_state=3).double().eval()
    nn.init.normal_(layer.dt_proj.bias)
    nn.init.normal_(layer.direction_Bs)
    nn.init.normal_(layer.D)
    seen = []
    layer.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].permute(0, 3, 1, 2)))
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    out = layer(x)
    inner = F.silu(layer.conv(layer.in_conv(x)))
    torch.testing.assert_close(seen[0], written_out(layer, inner))
    normed = layer.norm(seen[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(out, layer.out_conv(normed.relu()))


def test_the_recurrence_starts_like_mambas_and_is_not_decayed():
    layer = SnakeMamba(16)
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17.0).expand(32, 16))
    assert torch.equal(layer.D, torch.ones(32))
    assert 0.01 < layer.direction_Bs.std() < 0.03
    kept, decayed = param_groups_weight_decay(layer, 0.05, no_weight_decay_list=layer.exempt_from_decay)
    assert any(p is layer.A_log for p in kept["params"]) and any(p is layer.direction_Bs for p in decayed["params"])
