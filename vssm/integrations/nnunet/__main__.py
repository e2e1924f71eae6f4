"""The command that makes nnU-Net find the trainers, or forget them."""

import argparse
import sys

from . import registration


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vssm.integrations.nnunet", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="write one file into nnunetv2's folder of trainers")
    commands.add_parser("uninstall", help="remove that file")
    commands.add_parser("folder", help="print what nnUNet_extTrainer may name (nnunetv2 2.8 or later)")
    command = parser.parse_args().command
    try:
        if command == "install":
            print(f"wrote {registration.install()}")
        elif command == "uninstall":
            print(f"removed {registration.uninstall()}")
        else:
            print(registration.EXTERNAL_FOLDER)
    except (ImportError, registration.RegistrationError) as error:
        print(f"{parser.prog} {command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
