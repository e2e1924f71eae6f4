_base_ = "_base_/mask_rcnn_1x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="vssd_small", drop_path_rate=0.4, pretrained=True),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
