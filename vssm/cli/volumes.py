"""`vssm segment`: labels of CT and MR volumes."""

import argparse
import time

from .common import DISCLAIMER, CommandError, add_command, is_terminal, medical, note, print_table


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare `segment`."""
    segment = add_command(
        commands,
        _segment,
        "segment",
        "label the voxels of a CT or MR volume",
        "vssm segment T1.nii.gz -o tissue.nii.gz --overlay tissue.png",
        f"This is {DISCLAIMER}. The default bundle learned brain tissue from one template and is a demonstration.",
    )
    segment.add_argument("image", metavar="IMAGE", help="volume, .nii or .nii.gz")
    segment.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="label map, .nii or .nii.gz; replaced if it exists"
    )
    segment.add_argument(
        "--bundle", help="folder of a MONAI bundle, or the name of one that ships with vssm (default: brain tissue)"
    )
    segment.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto is cuda, else cpu")
    segment.add_argument("--overlap", type=float, help="of neighbouring windows, 0 to below 1 (default: the bundle's)")
    segment.add_argument("--overlay", metavar="PNG", help="also draw three planes with contours")
    segment.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def _segment(options: argparse.Namespace) -> None:
    volumes = medical("vssm.volumes")
    if options.overlay is not None:
        medical("matplotlib")
    start = time.perf_counter()
    try:
        result = volumes.segment_file(
            options.image,
            options.output,
            bundle=options.bundle,
            device=options.device,
            overlap=options.overlap,
            overlay=options.overlay,
            progress=not options.quiet and is_terminal(),
        )
    except volumes.VolumeError as error:
        raise CommandError(str(error)) from None
    for text in result.notes:
        note(text)
    if options.quiet:
        return
    print_table(
        [
            ("label", "name", "voxels", "ml"),
            *((str(s.label), s.name, str(s.voxels), f"{s.millilitres:.1f}") for s in result.segments),
        ]
    )
    print(f"wrote {options.output} in {time.perf_counter() - start:.1f} s")
    note(DISCLAIMER)
