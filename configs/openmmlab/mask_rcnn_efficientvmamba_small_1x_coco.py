# The authors' file has another width than their classifier; this is the classifier's. No figures are published.
_base_ = "_base_/mask_rcnn_1x_coco.py"
model = dict(
    backbone=dict(
        _delete_=True, type="VSSMBackbone", name="efficientvmamba_small", drop_path_rate=0.2, pretrained=True
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(type="AmpOptimWrapper")
