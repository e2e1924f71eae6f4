# Cascade Mask R-CNN over a pyramid from one map, by LBVim's settings (arXiv 2506.15976, detection/configs/lbmamba/):
# 184375 steps of 4 processes x 8 pictures are 50 epochs, though the authors' file name says 300. Theirs fails as
# published (an import of a file that is elsewhere), and its layer decay reaches the embeddings alone; here it reaches
# every block, by timm's layers.
_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["vssm.integrations.openmmlab"], allow_failed_imports=False)

size = (1024, 1024)
norm = dict(type="LN2d", requires_grad=True)
box_head = dict(
    type="Shared4Conv1FCBBoxHead",
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    norm_cfg=norm,
    reg_class_agnostic=False,
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="L1Loss", loss_weight=1.0),
)
coder = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0])
model = dict(
    data_preprocessor=dict(
        batch_augments=[dict(type="BatchFixedSizePad", size=size, img_pad_value=0, pad_mask=True, pad_seg=False)]
    ),
    backbone=dict(
        _delete_=True,
        type="VSSMBackbone",
        name="lbvim_tiny",
        out_indices=(23,),
        residual=False,
        img_size=1024,
        drop_path_rate=0.1,
        pretrained=True,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=192, out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(**box_head, bbox_coder=dict(**coder, target_stds=[0.1, 0.1, 0.2, 0.2])),
            dict(**box_head, bbox_coder=dict(**coder, target_stds=[0.05, 0.05, 0.1, 0.1])),
            dict(**box_head, bbox_coder=dict(**coder, target_stds=[0.033, 0.033, 0.067, 0.067])),
        ],
        mask_head=dict(norm_cfg=norm),
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute", crop_size=size, recompute_bbox=True, allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type="Pad", size=size, pad_val=dict(img=(114, 114, 114))),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=True),
    dict(type="Pad", size=size, pad_val=dict(img=(114, 114, 114))),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True),
    batch_sampler=None,
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

steps = 184375
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="VSSMLayerDecayConstructor",
    paramwise_cfg=dict(layer_decay=0.7),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=steps, milestones=[163889, 177546], gamma=0.1),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=5000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5000))
log_processor = dict(by_epoch=False)
