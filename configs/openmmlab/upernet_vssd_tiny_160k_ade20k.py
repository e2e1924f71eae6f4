_base_ = "_base_/upernet_160k_ade20k.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="vssd_tiny", drop_path_rate=0.2, pretrained=True),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
