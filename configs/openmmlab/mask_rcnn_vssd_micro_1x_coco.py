_base_ = "_base_/mask_rcnn_1x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="vssd_micro", drop_path_rate=0.1, pretrained=True),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
