_base_ = "_base_/upernet_160k_ade20k.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="vmambav0_small", drop_path_rate=0.3, pretrained=True),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
