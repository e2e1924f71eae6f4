"""Registering the trainers with nnU-Net: what is written, what is refused and in which words; needs no nnunetv2."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import spec_from_file_location

import pytest

from vssm.integrations.nnunet import __main__ as command
from vssm.integrations.nnunet import registration


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of an nnunetv2 2.8 that holds nothing."""
    (tmp_path / "training" / "nnUNetTrainer").mkdir(parents=True)
    found = spec_from_file_location("nnunetv2", tmp_path / "__init__.py")
    monkeypatch.setattr(registration, "find_spec", lambda name: found)
    monkeypatch.setattr(registration, "version", lambda name: "2.8.1")
    return tmp_path


def run(monkeypatch, capsys, name):
    """Exit status, standard output and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["nnunet", name])
    status = command.main()
    return status, *capsys.readouterr()


def test_install_writes_one_file_and_uninstall_removes_it(package):
    target = registration.install()
    assert [path for path in package.rglob("*") if path.is_file()] == [target]
    assert target == package / "training" / "nnUNetTrainer" / "vssm_trainers.py"
    target.write_text('"""An older vssm.integrations.nnunet wrote this."""')
    assert registration.install() == target
    assert target.read_text() == (registration.EXTERNAL_FOLDER / "vssm_trainers.py").read_text()
    assert registration.uninstall() == target
    assert not target.exists()
    with pytest.raises(registration.RegistrationError, match="not installed"):
        registration.uninstall()


def test_a_file_of_somebody_else_is_left_alone(package):
    target = package / "training" / "nnUNetTrainer" / "vssm_trainers.py"
    target.write_text("mine")
    for act in (registration.install, registration.uninstall):
        with pytest.raises(registration.RegistrationError, match="not written by vssm"):
            act()
    assert target.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_one_sentence_with_the_variable(package, monkeypatch, capsys):
    (package / "training" / "nnUNetTrainer").rmdir()
    status, out, error = run(monkeypatch, capsys, "install")
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert f"nnUNet_extTrainer to {registration.EXTERNAL_FOLDER}" in error


def missing(name):
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("version", "words"),
    [(missing, "is not installed"), (lambda name: "2.5.2", "2.5.2 is too old"), (lambda name: "1.7", "1.7 is too old")],
)
def test_a_missing_or_old_nnunet_is_one_sentence_with_the_command(package, monkeypatch, capsys, version, words):
    monkeypatch.setattr(registration, "version", version)
    for name in ("install", "uninstall"):
        status, out, error = run(monkeypatch, capsys, name)
        assert (status, out) == (2, "")
        assert error.count("\n") == 1
        assert words in error
        assert 'pip install "vssm[nnunet]"' in error


@pytest.mark.parametrize("version", ["2.6", "2.10.0", "3.0.dev1"])
def test_later_versions_are_taken(package, monkeypatch, version):
    monkeypatch.setattr(registration, "version", lambda name: version)
    assert registration.require_nnunet() == package


def test_neither_vssm_nor_the_command_imports_nnunet():
    code = "import sys, vssm, vssm.networks, vssm.integrations.nnunet.__main__; assert 'nnunetv2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
