"""Vim, Vision Mamba: bidirectional Mamba on a sequence of patches with a class token in its middle (arXiv 2401.09417).

Code of the paper: https://github.com/hustvl/Vim, Apache-2.0 licence; it states no other for the weights, linked below.
Nothing here is taken from it.

The code's block hands its mixer's output to the next block, which adds it to the residual stream; that is a common
residual block, with stochastic depth growing linearly from 0 in the first block, and so it is written here. Kept from
the code: the backward scan's step sizes start from a bias of 0, the forward scan's log-uniformly. Not kept: resampling
of positional embeddings that takes the first for the class token's, which stands in the middle.
"""

from collections.abc import Mapping

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..checkpoint import remap
from ..layers.multi_mamba import MultiMamba, stack_official
from ..layers.routes import BidirectionalRoutes
from .isotropic import Isotropic, build_isotropic, isotropic_cfg


class Vim(Isotropic):
    """Vim backbone and classifier.

    Args:
        embed_dim: channels.
        depth: blocks.
        d_state: states per inner channel of the scans.
        class_token: put a learned token into the middle of the sequence (models for dense prediction have none).
        global_pool: as in `Isotropic`.
        settings: the other arguments of `Isotropic`.
    """

    def __init__(
        self,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        class_token: bool = True,
        global_pool: str = "token",
        **settings: object,
    ):
        routes = BidirectionalRoutes()
        mixers = [MultiMamba(embed_dim, routes, d_state, mean=True) for _ in range(depth)]
        super().__init__(mixers, embed_dim, class_token=class_token, global_pool=global_pool, **settings)
        with torch.no_grad():
            for mixer in mixers:
                mixer.scan.dt_projs_bias[1:].zero_()

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay); positional embeddings of another square grid are resampled."""
        return self.fit_positions(stack_official(remap(state_dict, OFFICIAL_NAMES), ("", "_b")))


OFFICIAL_NAMES = [
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^layers\.", "blocks."),
    (r"^norm_f\.", "norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def _cfg(size: str, file: str = "") -> dict:
    page = f"https://huggingface.co/hustvl/Vim-{size}-midclstok"
    return isotropic_cfg(
        f"{page}/resolve/main/{file}" if file else "",
        license="apache-2.0",
        paper_ids="arXiv:2401.09417",
        paper_name="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        origin_url="https://github.com/hustvl/Vim",
        notes=(page,),
    )


# `ft`: the model with overlapping patches, fine-tuned from the weights of the other.
default_cfgs = generate_default_cfgs(
    {
        "vim_tiny.in1k": _cfg("tiny", "vim_t_midclstok_76p1acc.pth"),
        "vim_small.in1k": _cfg("small", "vim_s_midclstok_80p5acc.pth"),
        "vim_base.in1k": _cfg("base"),
        "vim_tiny_stride8.ft_in1k": _cfg("tiny", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small_stride8.ft_in1k": _cfg("small", "vim_s_midclstok_ft_81p6acc.pth"),
    }
)


@register_model
def vim_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """Vim-Ti."""
    args = {"embed_dim": 192}
    return build_isotropic(Vim, "vim_tiny", pretrained, **{**args, **kwargs})


@register_model
def vim_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """Vim-S."""
    args = {"embed_dim": 384, "drop_path_rate": 0.05}
    return build_isotropic(Vim, "vim_small", pretrained, **{**args, **kwargs})


@register_model
def vim_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """Vim-B; the paper's code does not state its stochastic depth."""
    args = {"embed_dim": 768}
    return build_isotropic(Vim, "vim_base", pretrained, **{**args, **kwargs})


@register_model
def vim_tiny_stride8(pretrained: bool = False, **kwargs) -> nn.Module:
    """Vim-Ti+: patches of 16 x 16 pixels every 8 pixels."""
    args = {"embed_dim": 192, "stride": 8}
    return build_isotropic(Vim, "vim_tiny_stride8", pretrained, **{**args, **kwargs})


@register_model
def vim_small_stride8(pretrained: bool = False, **kwargs) -> nn.Module:
    """Vim-S+: patches of 16 x 16 pixels every 8 pixels."""
    args = {"embed_dim": 384, "stride": 8}
    return build_isotropic(Vim, "vim_small_stride8", pretrained, **{**args, **kwargs})
