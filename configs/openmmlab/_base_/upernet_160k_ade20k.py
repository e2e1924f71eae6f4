# UPerNet, 160,000 iterations of 512 x 512 crops, as the papers train it: OpenMMLab's Swin configuration with another
# backbone. The path is spelt out because mmengine looks for `mmseg::` under a distribution name that onedl-mmseg lacks.
_base_ = [
    __import__("importlib.util").util.find_spec("mmseg").submodule_search_locations[0]
    + "/.mim/configs/swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
]
custom_imports = dict(imports=["vssm.integrations.openmmlab"], allow_failed_imports=False)
