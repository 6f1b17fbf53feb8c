"""FID and KID by torch-fidelity, the field's reference; needs the extra `fid`."""

import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import file_sha256

EXTRACTOR = "inception-v3-compat"  # TensorFlow's weights of 2015, and its resizing, bilinear to 299x299
WEIGHTS_SHA256 = "6726825d"  # its first digits, as in the file's published name
KERNEL_SUBSET = 1_000  # images of each of KID's subsets, torch-fidelity's default


def check_installed() -> None:
    """Raises a UserError unless torch-fidelity is installed."""
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise UserError('FID and KID need torch-fidelity: pip install "facevae-jax[fid]".') from error


def check_weights(path: pathlib.Path) -> None:
    """Raises a UserError unless the file is the one that torch-fidelity downloads: a pickle could run any code."""
    try:
        found = file_sha256(path)
    except OSError as error:
        raise UserError(f"--inception_weights={str(path)!r} cannot be read: {error.strerror}.") from error
    if not found.startswith(WEIGHTS_SHA256):
        raise UserError(
            f"--inception_weights={str(path)!r} has SHA-256 {found[:8]}..., not {WEIGHTS_SHA256}...: give "
            "torch-fidelity's weights-inception-2015-12-05-6726825d.pth."
        )


def fidelity(
    made: Iterable[np.ndarray],
    real: Iterable[np.ndarray],
    *,
    count: int,
    resolution: int,
    weights: pathlib.Path | None = None,
    extractor: str = EXTRACTOR,
) -> dict[str, float]:
    """FID and KID of two sets of `count` images, uint8 [b, h, w, 3] in batches.

    Args:
      made: images of the model.
      real: images of the data.
      count: images of each set.
      resolution: pixels along one side.
      weights: the extractor's; None: torch-fidelity downloads them.
      extractor: a name registered with torch-fidelity.

    Raises:
      UserError: torch-fidelity is not installed, or cannot download its weights.
    """
    check_installed()
    import torch
    import torch_fidelity

    def stored(batches: Iterable[np.ndarray], path: pathlib.Path) -> Any:
        """A dataset of uint8 tensors [3, h, w] in a memory-mapped file."""
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, resolution, resolution, 3))
        at = 0
        for batch in batches:
            images[at : at + len(batch)] = batch
            at += len(batch)
        tensors: Any = torch.from_numpy(images).permute(0, 3, 1, 2)
        return torch.utils.data.Subset(tensors, range(count))

    with tempfile.TemporaryDirectory(prefix="facevae-fid-") as folder:
        sets = [stored(batches, pathlib.Path(folder) / f"{number}.npy") for number, batches in enumerate((made, real))]
        try:
            found = torch_fidelity.calculate_metrics(
                input1=sets[0],
                input2=sets[1],
                fid=True,
                kid=True,
                kid_subset_size=min(KERNEL_SUBSET, count),
                feature_extractor=extractor,
                feature_extractor_weights_path=str(weights) if weights else None,
                cuda=torch.cuda.is_available(),
                cache=False,
                save_cpu_ram=True,
                verbose=False,
            )
        except OSError as error:  # of urllib: no network
            raise UserError(
                f"torch-fidelity cannot download its weights ({error}): give --inception_weights=PATH."
            ) from error
    return {
        "fid": float(found["frechet_inception_distance"]),
        "kid": float(found["kernel_inception_distance_mean"]),
        "kid_std": float(found["kernel_inception_distance_std"]),
    }
