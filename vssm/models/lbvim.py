"""LBVim: Vim with one locally bi-directional scan per block, whose direction alternates (LBMamba, arXiv 2506.15976).

Code of the paper: https://github.com/cvlab-stonybrook/LBMamba, no licence stated for code or weights. Nothing here is
taken from it.

The code reverses the sequence after every block; here every second block does so around its mixer, and what lies
between keeps the order of the patches.

Letters: B batch, C channels, N patches in row-major order.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_tf_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..checkpoint import remap
from ..layers.initialise import init_linear
from ..layers.mamba import Mamba
from ..ops import local_bidirectional_scan
from . import vim
from .isotropic import Isotropic, build_isotropic, isotropic_cfg


# These two are nodes of a traced graph, as Mamba is.
@register_notrace_module
class LocalMamba(Mamba):
    """Mamba whose scan looks ahead within windows (section 3.2). Sequences (B, N, d_model) -> the same shape.

    Args:
        d_model: channels C.
        d_state: states per inner channel.
        window: steps per window, counted in the direction of the scan; None: by the length of the sequence, see
            `vssm.ops.local_bidirectional_scan`.
        backwards: walk the sequence from its end.
    """

    def __init__(self, d_model: int, d_state: int = 16, window: int | None = None, backwards: bool = False):
        super().__init__(d_model, d_state)
        self.window = window
        self.backwards = backwards

    def recurrence(self, *args: Tensor, **options: object) -> Tensor:
        return local_bidirectional_scan(*args, window=self.window, **options)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1)).flip(1) if self.backwards else super().forward(x)


@register_notrace_module
class AttentionPool(nn.Module):
    """Attention of one learned query to all tokens (B, N, C), then LayerNorm -> (B, C). No projection of the query."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim)
        trunc_normal_tf_(self.latent, std=dim**-0.5)
        init_linear(self.kv)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(y) for y in (self.latent.to(x.dtype).expand(len(x), -1, -1), *self.kv(x).chunk(2, -1)))
        return self.norm(F.scaled_dot_product_attention(q, k, v).flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class LBVim(Isotropic):
    """LBVim backbone and classifier.

    Args:
        embed_dim: channels.
        depth: blocks.
        d_state: states per inner channel of the scans.
        window: tokens per window of the scans; None: 4 up to 128 tokens, 8 up to 256, 16 above, as in the code.
        pool_heads: heads of the attention that pools the patches if `global_pool` is "map".
        global_pool: as in `Isotropic`.
        settings: the other arguments of `Isotropic`.
    """

    def __init__(
        self,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        window: int | None = None,
        pool_heads: int = 6,
        global_pool: str = "avg",
        **settings: object,
    ):
        mixers = [LocalMamba(embed_dim, d_state, window, backwards=i % 2 == 1) for i in range(depth)]
        pool = AttentionPool(embed_dim, pool_heads) if global_pool == "map" else None
        super().__init__(mixers, embed_dim, global_pool=global_pool, attn_pool=pool, **settings)

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay); positional embeddings of another square grid are resampled."""
        return self.fit_positions(remap(state_dict, OFFICIAL_NAMES))


OFFICIAL_NAMES = [
    *vim.OFFICIAL_NAMES,
    (r"^head\.0\.post_norm\.", "attn_pool.norm."),
    (r"^head\.0\.", "attn_pool."),
    (r"^head\.1\.", "head.fc."),
]


def _cfg() -> dict:
    return isotropic_cfg(
        "",
        license="none stated",
        paper_ids="arXiv:2506.15976",
        paper_name="LBMamba: Locally Bi-directional Mamba",
        origin_url="https://github.com/cvlab-stonybrook/LBMamba",
        notes=("https://github.com/cvlab-stonybrook/LBMamba/releases/tag/v1.0",),
    )


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _cfg() for name in ("lbvim_tiny", "lbvim_300", "lbvim_small", "lbvim_528")}
)


@register_model
def lbvim_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """LBVim-Ti."""
    args = {"embed_dim": 192, "drop_path_rate": 0.05}
    return build_isotropic(LBVim, "lbvim_tiny", pretrained, **{**args, **kwargs})


@register_model
def lbvim_300(pretrained: bool = False, **kwargs) -> nn.Module:
    """LBVim of width 300."""
    args = {"embed_dim": 300, "drop_path_rate": 0.05}
    return build_isotropic(LBVim, "lbvim_300", pretrained, **{**args, **kwargs})


@register_model
def lbvim_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """LBVim-S."""
    args = {"embed_dim": 384, "drop_path_rate": 0.05}
    return build_isotropic(LBVim, "lbvim_small", pretrained, **{**args, **kwargs})


@register_model
def lbvim_528(pretrained: bool = False, **kwargs) -> nn.Module:
    """LBVim of width 528, with attention pooling."""
    args = {"embed_dim": 528, "global_pool": "map", "drop_path_rate": 0.05}
    return build_isotropic(LBVim, "lbvim_528", pretrained, **{**args, **kwargs})
