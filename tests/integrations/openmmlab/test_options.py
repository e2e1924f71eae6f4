"""What a configuration may ask of VSSMBackbone beside its maps: freezing, checkpointing, weights, rates by layer."""

import math
import os
import pickle
from itertools import pairwise

import packages  # noqa: F401  skips without OpenMMLab
import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from vssm.integrations.openmmlab import VSSMBackbone

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
VIM = {"embed_dim": 16, "depth": 3, "img_size": 64}


def small(name="vmamba_tiny", **options):
    torch.manual_seed(0)
    return VSSMBackbone(name, **{**SMALL, **options})


class Detector(nn.Module):
    """A backbone and a head."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(32, 3)


def groups_of(model, **paramwise):
    wrapper = build_optim_wrapper(
        model,
        {
            "constructor": "VSSMLayerDecayConstructor",
            "paramwise_cfg": paramwise,
            "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05},
        },
    )
    groups = wrapper.optimizer.param_groups
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_every_parameter_has_a_rate_by_its_layer():
    model = Detector(small(out_norm=True))
    groups = groups_of(model, layer_decay=0.5)
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates["head.weight"] == rates["backbone.outnorm0.weight"] == pytest.approx(1e-3)
    stem = rates["backbone.model.stem.conv1.weight"]
    stages = [next(rates[n] for n in rates if n.startswith(f"backbone.model.stages.{i}.blocks")) for i in range(4)]
    order = [stem, *stages, 1e-3]
    assert order == sorted(order) and len(set(order)) == 6
    # neighbouring layers differ by the ratio, stages by a power of it
    assert all(math.log2(high / low).is_integer() for low, high in pairwise(order))


def test_without_layer_decay_all_have_the_same_rate():
    assert {group["lr"] for group in groups_of(Detector(small())).values()} == {1e-3}


def test_what_the_model_exempts_does_not_decay():
    model = Detector(small())
    for name, group in groups_of(model, layer_decay=0.9).items():
        flat = dict(model.named_parameters())[name].ndim <= 1
        exempt = flat or name.rpartition(".")[2] in ("A_logs", "Ds", "dt_projs_bias")
        assert group["weight_decay"] == (0.0 if exempt else 0.05), name


@pytest.mark.parametrize("stages", [-1, 0, 1, 3])
def test_frozen_stages_stay_frozen_in_training(stages):
    backbone = small(frozen_stages=stages, drop_path_rate=0.5).train()
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    expected = {
        name
        for name, _ in backbone.named_parameters()
        if (stages >= 0 and name.startswith("model.stem."))
        or any(name.startswith(f"model.stages.{i}.") for i in range(max(stages, 0)))
    }
    assert frozen == expected
    assert [stage.training for stage in backbone.model.stages] == [i >= stages for i in range(4)]
    assert backbone.model.stem.training == (stages < 0)
    sum(level.sum() for level in backbone(torch.randn(1, 3, 64, 64))).backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is None} == expected


def test_vims_first_blocks_can_be_frozen():
    backbone = VSSMBackbone("vim_tiny", out_indices=(2,), frozen_stages=2, **VIM).train()
    assert [any(p.requires_grad for p in block.parameters()) for block in backbone.model.blocks] == [False, False, True]
    assert not backbone.model.pos_embed.requires_grad


def test_batch_norms_keep_their_statistics_with_norm_eval():
    for norm_eval in (True, False):
        backbone = small("efficientvmamba_tiny", norm_eval=norm_eval).train()
        norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [norm.running_mean.clone() for norm in norms]
        backbone(torch.randn(2, 3, 64, 64))
        same = [torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True)]
        assert norms and (all(same) if norm_eval else not any(same))


@pytest.mark.parametrize(("name", "options"), [("vmamba_tiny", {}), ("vim_tiny", {"out_indices": (0, 2), **VIM})])
def test_recomputed_blocks_give_the_same_gradients(name, options):
    found = []
    x = torch.randn(1, 3, 64, 64)
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = VSSMBackbone(name, with_cp=with_cp, **(options or SMALL)).train()
        levels = backbone(x)
        sum(level.square().mean() for level in levels).backward()
        found.append([*levels, *(p.grad for p in backbone.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("wrapper", "prefix"), [("", ""), ("backbone.", "backbone."), ("backbone.", "backbone")])
def test_init_cfg_reads_files_of_classifiers_and_detectors(tmp_path, wrapper, prefix):
    source = timm.create_model("vmamba_tiny", num_classes=7, **SMALL)
    state = {f"{wrapper}{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state | ({"head.weight": torch.zeros(1)} if wrapper else {})}, tmp_path / "weights.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth"), "prefix": prefix}
    backbone = small(init_cfg=init)
    backbone.init_weights()
    for name, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name], atol=0, rtol=0)


def test_a_file_that_holds_code_is_refused_unopened(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    backbone = small(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth")})
    with pytest.raises(ValueError, match=r"weights\.pth"):
        backbone.init_weights()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vmamba_huge"}, "no model is called 'vmamba_huge'"),
        ({"out_indices": (0, 4)}, r"levels 0 to 3 of vmamba_tiny, got \(0, 4\)"),
        ({"out_indices": ()}, "levels 0 to 3"),
        ({"block_norm": "batch"}, "block_norm must be 'layer' or None"),
        ({"residual": False}, "vmamba_tiny has no option residual or block_norm"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VSSMBackbone(**{"name": "vmamba_tiny", **SMALL, **options})


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"type": "Kaiming"}, "init_cfg must be of type 'Pretrained' or None, got 'Kaiming'"),
        ({"type": "Pretrained", "checkpoint": "FILE", "prefix": "neck."}, "no name begins with 'neck.'"),
        ({"type": "Pretrained", "checkpoint": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, init, message):
    torch.save(timm.create_model("vmamba_tiny", **SMALL).state_dict(), tmp_path / "weights.pth")
    init = {key: str(tmp_path / "weights.pth") if value == "FILE" else value for key, value in init.items()}
    with pytest.raises((ValueError, OSError), match=message):
        small(init_cfg=init).init_weights()
