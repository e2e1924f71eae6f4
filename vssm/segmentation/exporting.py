"""A MONAI bundle from a training run: for `python -m monai.bundle run`, MONAI Label and `vssm segment`.

https://docs.monai.io/en/stable/mb_specification.html. `network_def`, `preprocessing` and `inferer` are plain data,
which `vssm.volumes.load_bundle` reads too; with `postprocessing` they are what MONAI Label looks for, and the rest
makes the bundle run by itself.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import Tensor

import vssm

from ..training.checkpoints import load_checkpoint
from ..volumes.errors import VolumeError
from ..volumes.writing import atomic_file
from .fitting import BEST, LAST
from .network import build_network
from .planning import Plan
from .preparing import preprocessing_steps

_WINDOWS = 2
_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"


def export_bundle(run: str | Path, folder: str | Path, checkpoint: str = "best") -> Path:
    """Write the network of a run as a MONAI bundle and check that the bundle builds it and takes its patches.

    Args:
        run: folder of a training run.
        folder: to write; files of a bundle that are there are replaced.
        checkpoint: "best" (highest mean Dice in validation) or "last".

    Returns:
        `folder`.

    Raises:
        VolumeError: the run has no such checkpoint, the checkpoint is damaged, or the folder cannot be written.
    """
    run, folder = Path(run), Path(folder)
    try:
        state = load_checkpoint(run / {"best": BEST, "last": LAST}[checkpoint])
    except ValueError as error:
        raise VolumeError(str(error)) from None
    missing = {"network", "definition", "plan", "dataset", "options", "dice", "step"} - state.keys()
    if missing:
        raise VolumeError(f"{run}: its {checkpoint} checkpoint lacks {', '.join(sorted(missing))}; train anew")
    plan = Plan(**state["plan"])
    # a file that training began from is not needed, and not there on other machines
    definition = {name: value for name, value in state["definition"].items() if name != "encoder_weights"}
    definition, weights = _single_output(definition, state["network"])
    packed = io.BytesIO()
    torch.save(weights, packed)
    inference = _inference(definition, plan, state["dataset"], state["options"]["overlap"])
    contents = {
        "configs/inference.json": json.dumps(inference, indent=4).encode() + b"\n",
        "configs/metadata.json": json.dumps(_metadata(state, plan), indent=4).encode() + b"\n",
        "docs/README.md": _card(state, plan).encode(),
        "models/model.pt": packed.getvalue(),
    }
    for name, content in contents.items():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VolumeError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
        with atomic_file(folder / name) as stream:
            stream.write(content)
    _check(folder, plan)
    return folder


def _check(folder: Path, plan: Plan) -> None:
    """Build the network from the written files as MONAI does, and run it on one patch of zeros."""
    config = ConfigParser()
    config.read_config(folder / "configs" / "inference.json")
    config.read_meta(folder / "configs" / "metadata.json")
    network = config.get_parsed_content("network_def")
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    form = config["_meta_"]["network_data_format"]
    with torch.inference_mode():
        found = network.eval()(torch.zeros(1, form["inputs"]["image"]["num_channels"], *plan.network_size))
    expected = (1, form["outputs"]["pred"]["num_channels"], *plan.network_size)
    if not isinstance(found, Tensor) or tuple(found.shape) != expected:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise VolumeError(f"{folder}: its network returns {shape} for a patch, {expected} is needed; check the network")


def _single_output(definition: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The network without deep supervision, and those of the weights that it has."""
    if not definition.get("deep_supervision"):
        return definition, weights
    definition = definition | {"deep_supervision": False}
    network = build_network(definition)
    weights = {name: weights[name] for name in network.state_dict()}
    network.load_state_dict(weights)
    return definition, weights


def _inference(definition: dict[str, Any], plan: Plan, dataset: dict[str, Any], overlap: float) -> dict[str, Any]:
    pictures = dataset["pictures"]
    return {
        "imports": ["$import glob", "$import numpy as np"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": _datalist(len(dataset["channels"]), pictures),
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": definition,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(plan, dataset)},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": _inferer(plan, pictures, overlap),
        "postprocessing": _postprocessing(pictures),
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def _datalist(num_channels: int, pictures: bool) -> str:
    if pictures:
        return "$[{'image': path} for path in sorted(glob.glob(@dataset_dir + '/*.*'))]"
    if num_channels == 1:
        return "$[{'image': path} for path in sorted(glob.glob(@dataset_dir + '/*.nii*'))]"
    # nnU-Net's names of channels
    channels = f"[path.replace('_0000.nii', '_%04d.nii' % channel) for channel in range({num_channels})]"
    return f"$[{{'image': {channels}}} for path in sorted(glob.glob(@dataset_dir + '/*_0000.nii*'))]"


def _preprocessing(plan: Plan, dataset: dict[str, Any]) -> list[dict[str, Any]]:
    image = {"keys": "image"}
    steps = preprocessing_steps(plan, dataset["pictures"])
    if not dataset["pictures"]:
        return [{"_target_": "LoadImaged", **image}, {"_target_": "EnsureChannelFirstd", **image}, *steps]
    # training sees pictures as volumes of one slice, the bundle has no need to
    for step in steps:
        if step["_target_"] == "Resized":
            step |= {"spatial_size": plan.resize[:2], "mode": "bilinear"}
    colours = -1 if len(dataset["channels"]) > 1 else "no_channel"
    return [
        {"_target_": "LoadImaged", **image, "reader": "PILReader"},
        {"_target_": "EnsureChannelFirstd", **image, "channel_dim": colours},
        # MONAI reads columns first and writes them so
        {"_target_": "Transposed", **image, "indices": [0, 2, 1]},
        *steps,
    ]


def _inferer(plan: Plan, pictures: bool, overlap: float) -> dict[str, Any]:
    options = {"roi_size": plan.network_size, "sw_batch_size": _WINDOWS, "overlap": overlap, "mode": "gaussian"}
    if plan.is_flat and not pictures:
        return {"_target_": "SliceInferer", "spatial_dim": 2, **options}
    return {"_target_": "SlidingWindowInferer", **options}


def _postprocessing(pictures: bool) -> dict[str, Any]:
    back = {"_target_": "Invertd", "keys": "pred", "orig_keys": "image", "transform": "@preprocessing"}
    ending = ".png" if pictures else ".nii.gz"
    saved = {"output_dir": "@output_dir", "output_ext": ending, "output_postfix": "seg", "separate_folder": False}
    if pictures:
        saved |= {"output_dtype": "$np.uint8", "resample": False}
    return {
        "_target_": "Compose",
        "transforms": [
            # logits are interpolated, not labels
            {**back, "nearest_interp": False},
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "SaveImaged", "keys": "pred", **saved},
        ],
    }


def _metadata(state: dict[str, Any], plan: Plan) -> dict[str, Any]:
    dataset = state["dataset"]
    labels, channels = dataset["labels"], dataset["channels"]
    tensor = {
        "type": "image",
        "spatial_shape": plan.network_size,
        "dtype": "float32",
        "is_patch_data": True,
    }
    image = tensor | {
        "format": "magnitude",
        "modality": channels[0],
        "num_channels": len(channels),
        "value_range": [-1000, 1000],
        "channel_def": {str(index): name for index, name in enumerate(channels)},
    }
    prediction = tensor | {
        "format": "segmentation",
        "num_channels": len(labels),
        "value_range": [],
        "channel_def": {str(index): name for index, name in enumerate(labels)},
    }
    return {
        "schema": _SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported by vssm export-bundle"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"vssm": vssm.__version__},
        "name": dataset["name"],
        "task": f"Segmentation of {', '.join(labels[1:])}",
        "description": f"{state['definition']['_target_']} trained on {dataset['name']} for {state['step']} steps",
        "authors": "not stated",
        "copyright": "not stated",
        "eval_metrics": {"mean_dice_validation": state["dice"]},
        "intended_use": "Research. Not for diagnosis, treatment or any decision about a person.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": prediction}},
    }


def _card(state: dict[str, Any], plan: Plan) -> str:
    dataset, options = state["dataset"], state["options"]
    labels = "\n".join(f"- {index}: {name}" for index, name in enumerate(dataset["labels"]))
    return (
        f"# {dataset['name']}\n\n"
        f"`{state['definition']['_target_']}` for {', '.join(dataset['channels'])}, trained with vssm for "
        f"{state['step']} steps (fold {options['fold']} of {options['folds']}, seed {options['seed']}). Mean Dice in "
        f"validation: {state['dice']:.4f}. This is research software, not a medical device.\n\n"
        f"Spacing {plan.spacing} mm, patches of {plan.patch_size} voxels (right, front, top), normalisation "
        f"{plan.normalisation}.\n\n## Labels\n\n{labels}\n\n## Use\n\n"
        "With MONAI, nibabel, pytorch-ignite and fire installed, in the bundle's folder:\n\n"
        "    python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json "
        "--bundle_root . --dataset_dir IMAGES --output_dir RESULTS\n"
    )
