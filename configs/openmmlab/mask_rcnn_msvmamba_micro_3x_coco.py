_base_ = "_base_/mask_rcnn_3x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="msvmamba_micro", drop_path_rate=0.2, pretrained=True),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=4, num_workers=4)
