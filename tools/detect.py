"""Draw the boxes and masks that a trained OpenMMLab detector finds in a picture."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vssm.atomic import replaced_file
from vssm.cli.common import WRONG_INPUT, Parser
from vssm.integrations.openmmlab_packages import require

EXAMPLE = """example:
  python tools/detect.py street.jpg --config configs/openmmlab/mask_rcnn_vmamba_tiny_1x_coco.py \\
      --checkpoint mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth -o found.png"""
COLOURS = [(230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230)]
OPACITY = 0.45


def read_picture(path: Path) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB; ValueError if it cannot be read."""
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error}); give a JPEG or PNG file") from None


def detector(config: Path, checkpoint: Path, device: str):
    """The model of a configuration with weights, the authors' or ours, for one picture at a time.

    Raises:
        ValueError: a file that is missing, damaged or does not fit.
    """
    from mmdet.apis import init_detector

    from vssm.checkpoint import load_official

    try:
        model = init_detector(str(config), None, device="cpu", cfg_options={"model.backbone.pretrained": False})
    except (FileNotFoundError, KeyError, SyntaxError) as error:
        raise ValueError(f"{config}: not a configuration of a detector ({error})") from None
    load_official(model, checkpoint)
    labels = model.cfg.get("metainfo") or model.dataset_meta
    model.dataset_meta = {"classes": labels["classes"]}
    return model.to(device)


def draw(picture: np.ndarray, found, classes: tuple[str, ...], threshold: float) -> tuple[Image.Image, list[str]]:
    """The picture with masks, boxes and names of what scores at least `threshold`, and a line for each."""
    pixels = picture.astype(np.float32)
    keep = [i for i in range(len(found.scores)) if found.scores[i] >= threshold]
    for place, i in enumerate(keep):
        if "masks" in found:
            mask = np.asarray(found.masks[i], bool)
            pixels[mask] = (1 - OPACITY) * pixels[mask] + OPACITY * np.array(COLOURS[place % len(COLOURS)])
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    pen, lines = ImageDraw.Draw(drawn), []
    for place, i in enumerate(keep):
        box = [float(v) for v in found.bboxes[i]]
        text = f"{classes[int(found.labels[i])]} {float(found.scores[i]):.2f}"
        pen.rectangle(box, outline=COLOURS[place % len(COLOURS)], width=2)
        pen.text((box[0] + 3, box[1] + 2), text, fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
        lines.append(f"{text} at " + ", ".join(f"{v:.0f}" for v in box))
    return drawn, lines


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    parser = Parser(
        prog="detect.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("picture", type=Path, metavar="PICTURE")
    parser.add_argument(
        "--config", type=Path, required=True, help="of the detector, such as those in configs/openmmlab"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights; nothing in the file is executed")
    parser.add_argument("-o", "--output", type=Path, default=Path("detected.png"), metavar="PNG")
    parser.add_argument("--threshold", type=float, default=0.3, metavar="SCORE", help="least score that is drawn")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    given = parser.parse_args(arguments)
    try:
        picture = read_picture(given.picture)
        require("mmengine", "mmcv.ops", "mmdet")
        import vssm.integrations.openmmlab  # noqa: F401  registers the backbone

        model = detector(given.config, given.checkpoint, given.device)
        from mmdet.apis import inference_detector

        # OpenMMLab's packages read pictures as BGR.
        result = inference_detector(model, picture[:, :, ::-1].copy())
        found = result.pred_instances.cpu().numpy()
        drawn, lines = draw(picture, found, model.dataset_meta["classes"], given.threshold)
        buffer = io.BytesIO()
        drawn.save(buffer, format="PNG")
        given.output.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(given.output) as stream:
            stream.write(buffer.getvalue())
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    print("\n".join(lines) or f"nothing scores {given.threshold:g} or more; try a lower --threshold")
    print(f"wrote {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
