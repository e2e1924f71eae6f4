# The authors publish figures and no configuration of this row; the settings are those of 12 epochs.
_base_ = "_base_/mask_rcnn_3x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="vssd_small", drop_path_rate=0.4, pretrained=True),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
