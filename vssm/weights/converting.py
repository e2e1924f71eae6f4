"""Official checkpoint -> safetensors in vssm's names, with where it came from and on what terms."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

import vssm

from ..atomic import replaced_file
from ..checkpoint import read_checkpoint
from ..hashing import file_sha256
from ..zoo import Weights
from .models import is_dense, meta_model, own_names


def convert(facts: Weights, source: Path, output: Path) -> dict[str, str]:
    """Write the weights of a row as a safetensors file; returns the metadata in it.

    Classifiers and networks get vssm's names. Detectors and segmenters keep OpenMMLab's, below which their backbone
    must be the one that the row names. Either file loads as the official one does, and nothing else is in it:
    optimizer, configuration and logs are left out.

    Args:
        source: the official file.
        output: ends in .safetensors; replaced if it exists.

    Raises:
        ValueError: the file is not the model's, see `own_names`, or `output` is called otherwise.
        OSError: a file cannot be read or written.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"{output} must end in .safetensors")
    state = read_checkpoint(source)
    own = own_names(facts, meta_model(facts), state)
    if not is_dense(facts):
        state = own
    metadata = {
        # what transformers and timm look for
        "format": "pt",
        "weights": facts.name,
        "model": facts.model_name,
        "names": "official" if is_dense(facts) else "vssm",
        "source": facts.url or facts.page,
        "repository": facts.repository,
        "commit": facts.commit,
        "paper": facts.paper,
        "code_licence": facts.code_licence,
        "weights_licence": facts.weights_licence,
        "original_file": source.name,
        "original_sha256": file_sha256(source),
        "converted_by": f"vssm {vssm.__version__}",
    }
    # tensors that share their storage would be refused
    tensors = {key: value.detach().clone().contiguous() for key, value in state.items()}
    with replaced_file(output) as stream:
        stream.write(save(tensors, metadata))
    return metadata
