_base_ = "_base_/mask_rcnn_1x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="vmamba_small", drop_path_rate=0.3, pretrained=True),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
