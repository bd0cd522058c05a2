"""What stochastic depth draws: how often, for whom, and the same however a batch is cut."""

import pytest
import timm
import torch

from s3a.nn.stochastic_depth import draw_branch_scales, place_in_batch

CPU = torch.device("cpu")


def test_every_block_branch_and_image_is_drawn_for():
    """Dropped as often as the rates say, apart from each other, and scaled so that the mean stays."""
    rates = (0.0, 0.2, 0.5)
    scales = torch.stack(draw_branch_scales(rates, torch.empty(4000, 1, dtype=torch.float64)))
    assert scales.shape == (3, 2, 4000, 1, 1, 1)
    assert scales.dtype == torch.float64
    dropped = (scales == 0).double().flatten(2)  # [blocks, branches, images]
    torch.testing.assert_close(dropped.mean((1, 2)), torch.tensor(rates, dtype=torch.float64), rtol=0, atol=0.03)
    torch.testing.assert_close(scales.mean((1, 2, 3, 4, 5)), torch.ones(3, dtype=torch.float64), rtol=0, atol=0.05)
    assert torch.corrcoef(dropped[1:].flatten(0, 1)).fill_diagonal_(0).abs().max() < 0.1


@pytest.mark.parametrize("cut", [(6,), (3, 3), (1, 2, 3)])
def test_an_image_keeps_its_branches_however_the_batch_is_cut(cut: tuple[int, ...]):
    """In all stages of a model; and the next seed draws anew."""
    torch.manual_seed(0)
    model = timm.create_model("ssvit_nano", drop_path_rate=0.5).train()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.eval()
    images = torch.randn(6, 3, 32, 32)

    def run(seed: int, sizes: tuple[int, ...]) -> torch.Tensor:
        parts, first = [], 0
        for part in images.split(sizes):
            torch.rand(first)  # the global generator is elsewhere in each process
            with place_in_batch(seed, first, len(images), CPU), torch.no_grad():
                parts.append(model(part))
            first += len(part)
        return torch.cat(parts)

    whole = run(7, (6,))
    torch.testing.assert_close(run(7, cut), whole, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(run(8, cut), whole, rtol=1e-4, atol=1e-6)


def test_without_a_place_the_global_generator_draws():
    torch.manual_seed(3)
    first = draw_branch_scales((0.5,), torch.empty(64, 1))[0]
    with place_in_batch(0, 0, 64, CPU):
        draw_branch_scales((0.5,), torch.empty(64, 1))
    assert not torch.equal(draw_branch_scales((0.5,), torch.empty(64, 1))[0], first)
    torch.manual_seed(3)
    assert torch.equal(draw_branch_scales((0.5,), torch.empty(64, 1))[0], first)
