_base_ = "_base_/mask_rcnn_1x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="vmamba_base", drop_path_rate=0.6, pretrained=True),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
