"""A process that trains a small network with synchronised batch norms on its share of a batch."""

import os
from pathlib import Path

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from s3a.nn.batch_norm import synchronise_batch_norm

STEPS = 2


def make_network() -> nn.Sequential:
    """A network with every kind of batch norm that can be synchronised."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 2),
        BatchNormAct2d(4),
        nn.Conv2d(4, 5, 2),
        nn.BatchNorm2d(5, momentum=None, affine=False),
    ).double()


def make_batch(num_images: int) -> Tensor:
    """Images whose channels are far from 0, as those of a network may be, and differ from image to image."""
    images = torch.randn(num_images, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return images + 100 + torch.arange(num_images)[:, None, None, None]


def train_on(network: nn.Module, images: Tensor, first: int) -> dict[str, Tensor]:
    """Takes steps without an optimizer, as they add up in the statistics; returns what the last one gave.

    Args:
        first: the place of the images in the whole batch, on which the loss depends.
    """
    for _ in range(STEPS):
        network.zero_grad()
        images = images.detach().requires_grad_()
        outputs = network(images)
        weights = torch.arange(first * outputs[0].numel(), (first + len(images)) * outputs[0].numel())
        (outputs.square() * weights.view(outputs.shape)).sum().backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
    return {"outputs": outputs.detach(), "images": images.grad, **gradients, **dict(network.named_buffers())}


def take_share(rank: int, shares: tuple[int, ...], port: int, backend: str | None, folder: Path) -> None:
    """Trains on the images of that rank, and writes what came out."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=len(shares))
    network = make_network()
    synchronise_batch_norm(network)
    if backend is not None:
        network.compile(fullgraph=True, backend=backend)
    first = sum(shares[:rank])
    found = train_on(network, make_batch(sum(shares))[first : first + shares[rank]], first)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
