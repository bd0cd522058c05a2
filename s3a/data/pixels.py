"""Pixels become the input of a network: on its device, from the bytes that workers hand over.

A worker ships a pixel in one byte. As a normalised float32 it would take four, in shared memory, in pinned memory and
on the way to the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s3a.data.batches import Batch
from s3a.data.erasing import erase


class PixelNormalizer:
    """Makes a batch on its device ready for the network: normalises pixels, and erases what the worker drew.

    A pixel becomes (pixel / 255 - mean) / std in float32, computed in the order of torchvision's ToTensor and
    Normalize, so that it has the same bits on a CPU. Images of floating point stay as they are, but for what is erased.
    On CUDA the host waits for nothing; mean and std are copied to a device once.

    Args:
        mean: of each channel, or one for all, where pixels are between 0 and 1; None where no images are pixels.
        std: likewise; not 0.

    Raises:
        ValueError: for a std of 0, or one of the two without the other.
    """

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        if (mean is None) != (std is None) or (std is not None and 0 in std):
            raise ValueError(f"mean is {mean} and std {std}: give both, without a std of 0, or neither")
        self._mean, self._std = (
            None if values is None else torch.tensor(values, dtype=torch.float32)[:, None, None]  # [channels, 1, 1]
            for values in (mean, std)
        )

    def __call__(self, batch: Batch) -> Batch:
        """The batch with images of floating point, of which nothing is left to erase.

        Raises:
            ValueError: for pixels without a mean and std of as many channels, and for other integers.
        """
        images = batch.images
        if images.dtype == torch.uint8:
            images = self._normalize(images)
        elif not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: a transform gives pixels as uint8, or floating point")
        elif batch.erasure is not None:
            images = images.clone()  # the loader's own
        if batch.erasure is not None:
            erase(images, batch.erasure)
        return batch._replace(images=images, erasure=None)

    def _normalize(self, pixels: Tensor) -> Tensor:
        """[n, channels, height, width] uint8, however they lie in memory, as normalised float32 in that order."""
        if self._mean is None or self._std is None:
            raise ValueError("images are uint8 pixels: give the loader the mean and std to normalise them by")
        channels = pixels.shape[1]
        if {len(self._mean), len(self._std)} - {1, channels}:
            raise ValueError(
                f"images have {channels} channels, the mean {len(self._mean)} and the std {len(self._std)}: "
                f"give one number for each channel, or one for all"
            )
        if self._mean.device != pixels.device:
            self._mean, self._std = self._mean.to(pixels.device), self._std.to(pixels.device)
        floats = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return floats.div_(255).sub_(self._mean).div_(self._std)
