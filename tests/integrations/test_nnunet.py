"""The trainers through nnU-Net's own commands, on crops of the ICBM brain: plan, train, validate, predict.

nnU-Net is copied to a temporary folder, where `install` may write, an epoch is two steps and nothing is mirrored in
validation; nothing else of it is changed.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import vssm
from vssm.volumes.phantom import LABELS, load_phantom, simulate_scan

pytestmark = pytest.mark.skipif(
    find_spec("nnunetv2") is None, reason='nnunetv2 is not installed; pip install "vssm[nnunet]", or make test-nnunet'
)

TRAINERS = ["nnUNetTrainerUMambaBot", "nnUNetTrainerUMambaEnc", "nnUNetTrainerSegMamba"]
DATASET = "Dataset901_ICBM"
SIZE = 32
# First voxel of each crop of the template at 4 mm.
CORNERS = [(4, 10, 6), (9, 14, 8), (13, 20, 5)]
SHORT = {
    "num_epochs = 1000": "num_epochs = 1",
    "num_iterations_per_epoch = 250": "num_iterations_per_epoch = 2",
    "num_val_iterations_per_epoch = 50": "num_val_iterations_per_epoch = 1",
    # Else the validation passes eight mirror images of every case through the network.
    "use_mirroring=True": "use_mirroring=False",
}
# What the console script of that name does, wherever it was installed.
CONSOLE_SCRIPT = """
import sys
from importlib.metadata import entry_points
del sys.argv[0]
(script,) = entry_points(group="console_scripts", name=sys.argv[0])
sys.exit(script.load()())
"""


class NNUNet:
    """nnU-Net's commands over folders of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        package = folder / "site" / "nnunetv2"
        shutil.copytree(Path(find_spec("nnunetv2").origin).parent, package)
        trainer = package / "training" / "nnUNetTrainer" / "nnUNetTrainer.py"
        code = trainer.read_text()
        for published, short in SHORT.items():
            assert code.count(published) == 1
            code = code.replace(published, short)
        trainer.write_text(code)
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(package.parent), str(Path(vssm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            ),
            "nnUNet_def_n_proc": "1",
            "MPLBACKEND": "agg",
        }
        self.environment.pop("nnUNet_extTrainer", None)
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir()
            self.environment[f"nnUNet_{name}"] = str(folder / name)

    def python(self, *arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, command: str, *arguments: object) -> str:
        done = self.python("-c", CONSOLE_SCRIPT, command, *arguments)
        assert done.returncode == 0, done.stdout
        return done.stdout


def write_dataset(folder: Path) -> None:
    """Three crops with noise and their tissues, as nnU-Net wants its raw data."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    phantom = load_phantom(resolution_mm=4)
    for case, corner in enumerate(CORNERS):
        crop = tuple(slice(first, first + SIZE) for first in corner)
        generator = torch.Generator().manual_seed(case)
        scan = simulate_scan(phantom.intensity[crop], phantom.brightest, 0.03, 0.2, generator)
        for name, voxels in {
            f"imagesTr/icbm_{case}_0000": scan.numpy(),
            f"labelsTr/icbm_{case}": phantom.labels[crop].numpy().astype(np.uint8),
        }.items():
            nibabel.save(nibabel.Nifti1Image(voxels, phantom.image.affine), folder / f"{name}.nii.gz")
    description = {
        "channel_names": {"0": "T1"},
        "labels": {label: i for i, label in enumerate(LABELS)},
        "numTraining": len(CORNERS),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nnunet")
    nnunet = NNUNet(folder)
    write_dataset(folder / "raw" / DATASET)
    nnunet.run("nnUNetv2_plan_and_preprocess", "-d", 901, "-c", "3d_fullres", "-npfp", 1, "-np", 1)
    # Augment in the process that trains; planning wants a positive number.
    nnunet.environment["nnUNet_n_proc_DA"] = "0"
    done = nnunet.python("-m", "vssm.integrations.nnunet", "install")
    assert done.returncode == 0, done.stdout
    yield nnunet
    # Checkpoints with their optimisers are large.
    shutil.rmtree(folder)


# About a dozen processes, each of which imports torch and nnU-Net.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_trains_validates_and_predicts_through_the_command_line(nnunet, trainer):
    nnunet.run("nnUNetv2_train", 901, "3d_fullres", "all", "-tr", trainer, "-device", "cpu")
    results = nnunet.folder / "results" / DATASET / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_all"
    checkpoint = torch.load(results / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == trainer
    assert checkpoint["current_epoch"] == 1
    weights = checkpoint["network_weights"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    # The parts that make these networks what they are, and one head for each resolution or a single one.
    assert any("mixer" in name for name in weights)
    heads = {name.partition(".weight")[0] for name in weights if name.startswith("head") and name.endswith("weight")}
    assert heads == ({"head"} if "SegMamba" in trainer else {"heads.0", "heads.1", "heads.2"})
    summary = json.loads((results / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(CORNERS)

    images, predictions = nnunet.folder / "images", nnunet.folder / f"predicted_{trainer}"
    images.mkdir(exist_ok=True)
    image = nnunet.folder / "raw" / DATASET / "imagesTr" / "icbm_1_0000.nii.gz"
    shutil.copy(image, images)
    options = ["-d", 901, "-c", "3d_fullres", "-f", "all", "-tr", trainer, "-device", "cpu", "-npp", 1, "-nps", 1]
    nnunet.run("nnUNetv2_predict", "-i", images, "-o", predictions, "--disable_tta", *options)
    predicted = nibabel.load(predictions / "icbm_1.nii.gz")
    assert predicted.shape == (SIZE,) * 3
    assert np.allclose(predicted.affine, nibabel.load(image).affine)
    labels = np.asarray(predicted.dataobj)
    assert set(np.unique(labels)) <= set(range(len(LABELS)))
    # The network rebuilt for prediction is the one that was trained: they agree but for the last bits of near ties.
    validated = np.asarray(nibabel.load(results / "validation" / "icbm_1.nii.gz").dataobj)
    assert (labels == validated).mean() > 0.999


def test_unregistered_trainers_are_not_found_and_others_still_are(nnunet):
    find = (
        "import sys; from nnunetv2.run.run_training import recursive_find_trainer_class_by_name as find\n"
        "assert find('nnUNetTrainer_5epochs').__module__.startswith('nnunetv2.')\n"
        "assert 'vssm' not in sys.modules\n"
        f"for name in {TRAINERS}: assert find(name).__module__ == 'vssm.integrations.nnunet.trainers'\n"
    )
    done = nnunet.python("-c", find)
    assert done.returncode == 0, done.stdout
    removed = nnunet.python("-m", "vssm.integrations.nnunet", "uninstall")
    assert removed.returncode == 0, removed.stdout
    assert "removed" in removed.stdout
    try:
        done = nnunet.python("-c", find)
        assert done.returncode != 0
    finally:
        nnunet.python("-m", "vssm.integrations.nnunet", "install")


def test_the_environment_variable_leads_to_the_trainers(monkeypatch):
    paths = pytest.importorskip("nnunetv2.paths")
    if not hasattr(paths, "nnUNet_extTrainer"):
        pytest.skip("nnunetv2 before 2.8 has no nnUNet_extTrainer")
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from vssm.integrations import nnunet
    from vssm.integrations.nnunet.registration import EXTERNAL_FOLDER

    monkeypatch.setenv("nnUNet_extTrainer", str(EXTERNAL_FOLDER))
    for name in TRAINERS:
        assert recursive_find_trainer_class_by_name(name) is getattr(nnunet, name)


@pytest.mark.parametrize("regions", [False, True])
def test_segmamba_is_trained_with_cross_entropy_alone(regions):
    from vssm.integrations.nnunet import nnUNetTrainerSegMamba

    trainer = object.__new__(nnUNetTrainerSegMamba)
    trainer.label_manager = SimpleNamespace(has_regions=regions, ignore_label=None)
    trainer.configuration_manager = SimpleNamespace(batch_dice=False)
    trainer.is_ddp, trainer.enable_deep_supervision, trainer.device = False, False, torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 4, generator=generator)
    if regions:
        target = torch.randint(2, logits.shape, generator=generator)
        expected = binary_cross_entropy_with_logits(logits, target.float())
    else:
        target = torch.randint(3, (2, 1, 4, 4, 4), generator=generator)
        expected = cross_entropy(logits, target[:, 0])
    torch.testing.assert_close(trainer._build_loss()(logits, target), expected)


def test_segmamba_refuses_a_patch_size_with_the_one_to_set():
    from vssm.integrations.nnunet import nnUNetTrainerSegMamba

    with pytest.raises(ValueError, match=r"patch_size.*\(40, 56, 40\).*\(48, 64, 48\).*plans file"):
        nnUNetTrainerSegMamba._network({"patch_size": [40, 56, 40]}, 1, 2, False)
