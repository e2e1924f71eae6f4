_base_ = "_base_/upernet_160k_ade20k.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="vmamba_base", drop_path_rate=0.6, pretrained=True),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
