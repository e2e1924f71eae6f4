# No figures are published.
_base_ = "_base_/mask_rcnn_3x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="efficientvmamba_base", drop_path_rate=0.2, pretrained=True),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(type="AmpOptimWrapper")
