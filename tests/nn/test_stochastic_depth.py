"""What stochastic depth draws: how often, for whom, and the same however a batch is cut."""

import pytest
import timm
import torch

from s3a.nn.stochastic_depth import PlacedDropout2d, draw_branch_scales, make_image_generators, place_in_batch

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


def test_dropout_drops_whole_channels():
    """As often as the rate says, with the mean kept; nothing in evaluation, or at rate 0."""
    dropout, x = PlacedDropout2d(0.25), torch.rand(50, 80, 2, 3) + 1
    dropped_out = dropout(x)
    dropped = dropped_out == 0
    assert torch.equal(dropped.all((2, 3)), dropped.any(3).any(2))
    assert dropped.all((2, 3)).double().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped_out[~dropped], (x / 0.75)[~dropped])
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(PlacedDropout2d(0).train()(x), x)


@pytest.mark.parametrize("rate", [-0.1, 1])
def test_dropout_of_a_rate_that_is_none(rate: float):
    with pytest.raises(ValueError, match=f"rate is {rate}: it must be at least 0 and less than 1"):
        PlacedDropout2d(rate)


def test_an_image_keeps_its_channels_and_draws_however_the_batch_is_cut():
    """The next seed, and the next image, draw anew."""
    dropout, x = PlacedDropout2d(0.5), torch.ones(6, 40, 1, 1)

    def run(seed: int, sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        parts, draws, first = [], [], 0
        for part in x.split(sizes):
            torch.rand(first)
            with place_in_batch(seed, first, len(x), CPU):
                draws += [torch.rand(3, generator=each) for each in make_image_generators(len(part), CPU)]
                parts.append(dropout(part))
            first += len(part)
        return torch.cat(parts), torch.stack(draws)

    whole, draws = run(7, (6,))
    assert len(draws.unique()) == 18
    for cut in ((3, 3), (1, 2, 3)):
        parts, own = run(7, cut)
        assert torch.equal(parts, whole)
        assert torch.equal(own, draws)
    parts, own = run(8, (6,))
    assert not torch.equal(parts, whole)
    assert not torch.isin(own, draws).any()


def test_without_a_place_image_generators_follow_the_global_one():
    torch.manual_seed(3)
    first = [torch.rand((), generator=each) for each in make_image_generators(2, CPU)]
    second = [torch.rand((), generator=each) for each in make_image_generators(2, CPU)]
    torch.manual_seed(3)
    again = [torch.rand((), generator=each) for each in make_image_generators(2, CPU)]
    assert first == again
    assert len({*map(float, first + second)}) == 4
