"""Between a host and its device, so that neither waits for the other: batches ahead, figures behind.

The device computes what it was given before, while the host gives it more. It runs dry wherever the host reads a tensor
of the step under way.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor

from s3a.data import Batch


def find_exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which counts and losses are summed on a device: float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def send_batches(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device; their indices stay with the host.

    On CUDA each is copied on a stream of its own, at the same time as the device computes with those before. None is
    asked for before it is needed, so the host does not wait for a loader while the device has nothing to do.
    """
    if device.type != "cuda":
        yield from (send(batch, device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            sent = send(batch, device)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        recursively_apply(reserve, sent, computing)
        yield sent


def reserve(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    """Keeps a tensor's memory from being used again before the stream has come to the end of its work so far."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


def send(batch: Batch, device: torch.device) -> Batch:
    """A batch on its way to the device; on the CPU the same tensors."""
    sent = send_to_device(batch._replace(indices=batch.indices[:0]), device, non_blocking=True)
    return cast(Batch, sent)._replace(indices=batch.indices)


class Readback:
    """A tensor of the device, which the host will read later: by then it is there.

    From CUDA it is copied into pinned memory behind the work that was launched so far; elsewhere it is kept.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.copied = tensor, None
        if tensor.is_cuda:
            self.tensor = tensor.to("cpu", non_blocking=True)  # into pinned memory, as torch has it
            self.copied = torch.cuda.Event(blocking=True)
            self.copied.record()

    def is_there(self) -> bool:
        """Whether the work in front of it is done, so that reading it would not wait."""
        return self.copied is None or self.copied.query()

    def read(self) -> list[float]:
        """Its numbers; waits for the work in front of it."""
        if self.copied is not None:
            self.copied.synchronize()
        return cast(list[float], self.tensor.tolist())
