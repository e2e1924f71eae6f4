_base_ = "_base_/mask_rcnn_1x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="vmamba_tiny_s2l5", drop_path_rate=0.2, pretrained=True),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
