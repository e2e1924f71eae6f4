"""Detector and segmentor from the shipped configurations against the official ones, on the same weights."""

import official
import packages
import parity
import torch
from mmdet.structures.bbox import bbox2roi
from mmengine.structures import InstanceData

from vssm import cli
from vssm.checkpoint import load_official
from vssm.integrations.openmmlab import build_model

TOLERANCE = 1e-4


def model_of(golden, name):
    model = build_model(packages.read(name)).eval()
    # As the authors' trainers write it.
    load_official(model, {"state_dict": official.official_state(golden), "meta": {}})
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    return model, torch.from_numpy(parity.fill_input(golden["input"]))


def assert_agrees(golden, got):
    for tap, value in got.items():
        error = parity.relative_error(value.numpy(), golden["outputs"][tap])
        assert error < TOLERANCE, f"{tap}: {error}"


@torch.inference_mode()
def test_mask_rcnn_gives_the_official_outputs():
    golden = official.load_golden("maskrcnn_vmamba_tiny")
    model, x = model_of(golden, "mask_rcnn_vmamba_tiny_1x_coco")
    levels = model.backbone(x)
    pyramid = model.neck(levels)
    scores, deltas = model.rpn_head(pyramid)
    anchors = model.rpn_head.prior_generator.grid_priors([p.shape[2:] for p in pyramid], device="cpu")[2]
    flat = deltas[2][0].permute(1, 2, 0).reshape(-1, 4)
    boxes = model.rpn_head.bbox_coder.decode(anchors, flat, max_shape=tuple(x.shape[2:]))
    rois = torch.tensor(golden["rois"])
    assert torch.equal(bbox2roi([rois[:, 1:]]), rois)
    head = model.roi_head
    features = head.bbox_roi_extractor(pyramid[:4], rois)
    classes, refined = head.bbox_head(features)
    masks = head.mask_head(head.mask_roi_extractor(pyramid[:4], rois))
    got = {f"level{i}": level for i, level in enumerate(levels)}
    got |= {f"fpn{i}": level for i, level in enumerate(pyramid)}
    got |= {"rpn_cls2": scores[2], "rpn_reg2": deltas[2], "anchors2": anchors, "rpn_boxes2": boxes}
    got |= {"roi_feats": features, "cls_score": classes, "bbox_pred": refined, "mask_pred": masks}
    assert got.keys() == golden["outputs"].keys()
    assert_agrees(golden, got)
    assert isinstance(model.predict(x, [_sample(x)])[0].pred_instances, InstanceData)


def _sample(x):
    from mmdet.structures import DetDataSample

    size = tuple(x.shape[2:])
    return DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0), "pad_shape": size})


@torch.inference_mode()
def test_upernet_gives_the_official_outputs():
    golden = official.load_golden("upernet_vmamba_tiny")
    model, x = model_of(golden, "upernet_vmamba_tiny_160k_ade20k")
    levels = model.backbone(x)
    head, auxiliary = model.decode_head, model.auxiliary_head
    decoded = head._forward_feature(levels)
    logits = head.cls_seg(decoded)
    got = {f"level{i}": level for i, level in enumerate(levels)}
    got |= {"psp": head.psp_forward(levels), "decode_feats": decoded, "logits": logits}
    got |= {"aux_logits": auxiliary(levels)}
    got["seg_full"] = torch.nn.functional.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)
    assert got.keys() == golden["outputs"].keys()
    assert_agrees(golden, got)


def test_the_zoo_verifies_neck_and_heads_too(tmp_path, capsys):
    state = official.official_state(official.load_golden("maskrcnn_vmamba_tiny"))
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "detector.pth")
    command = ["zoo", "verify", "mask_rcnn_vmamba_tiny.1x_coco", "--file", str(tmp_path / "detector.pth")]
    assert cli.main(command) == 0
    assert "of the whole model fit configs/openmmlab/mask_rcnn_vmamba_tiny_1x_coco.py" in capsys.readouterr().out
    del state["neck.fpn_convs.0.conv.bias"]
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "detector.pth")
    assert cli.main(command) == 2
    assert "neck.fpn_convs.0.conv.bias" in capsys.readouterr().err
