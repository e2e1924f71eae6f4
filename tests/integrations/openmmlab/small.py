"""Configurations that train shrunken models on the four pictures of tests/data/pictures in half a minute."""

from __future__ import annotations

from pathlib import Path

import packages

PICTURES = Path(__file__).resolve().parents[2] / "data" / "pictures"
CLASSES = ("person", "cat", "cup", "rocket")
BACKBONE = """backbone=dict(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128), drop_path_rate=0.0, pretrained=False)"""

DETECTOR = f"""
_base_ = "{packages.CONFIGS}/mask_rcnn_vmamba_tiny_1x_coco.py"
metainfo = dict(classes={CLASSES})
model = dict(
    {BACKBONE},
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=4),
        mask_roi_extractor=dict(out_channels=32),
        mask_head=dict(in_channels=32, conv_out_channels=32, num_classes=4),
    ),
    # After so few steps nothing scores much.
    test_cfg=dict(rcnn=dict(score_thr=0.0)),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(128, 96), keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 96), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    ),
]
data = dict(data_root="{PICTURES}/", ann_file="instances.json", data_prefix=dict(img="images/"), metainfo=metainfo)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline, **data)
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline, **data))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="{PICTURES}/instances.json")
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=0.002))
param_scheduler = []
train_cfg = dict(max_epochs=10, val_interval=10)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=10))
randomness = dict(seed=0)
"""

SEGMENTOR = f"""
_base_ = "{packages.CONFIGS}/upernet_vmamba_tiny_160k_ade20k.py"
norm = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    {BACKBONE},
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=32, num_classes=5, norm_cfg=norm),
    auxiliary_head=dict(in_channels=64, channels=32, num_classes=5, norm_cfg=norm),
)
read, resize = dict(type="LoadImageFromFile"), dict(type="Resize", scale=(96, 96))
labels, pack = dict(type="LoadAnnotations"), dict(type="PackSegInputs")
data = dict(
    _delete_=True,
    type="BaseSegDataset",
    data_root="{PICTURES}",
    data_prefix=dict(img_path="images", seg_map_path="masks"),
    img_suffix=".jpg",
    seg_map_suffix=".png",
    metainfo=dict(classes=("background", *{CLASSES}), palette=[[i, i, i] for i in range(5)]),
)
train_data = dict(pipeline=[read, labels, resize, pack], **data)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=train_data)
val_data = dict(pipeline=[read, resize, labels, pack], **data)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=val_data)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=0.002))
param_scheduler = []
train_cfg = dict(max_iters=20, val_interval=20)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=20))
randomness = dict(seed=0)
"""
