"""Compilation in place: same numbers, same keys, and no compilation that is not owed."""

import copy

import pytest
import timm
import torch
from torch._dynamo.utils import counters

import s3a

SMALL = {"dims": (16, 32), "depths": (3, 2), "num_heads": (1, 2), "mlp_ratios": (2, 2), "layer_scale": (None, None)}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    s3a.compile.region_code.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()
    s3a.compile.region_code.cache_clear()


def small_model(**model_args) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("ssvit_nano", num_classes=5, **{**SMALL, **model_args})


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_a_compiled_model_is_the_same_function_under_the_same_keys():
    model = small_model().eval()
    plain = copy.deepcopy(model)
    assert s3a.compile_model(model) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-6)
    assert counters["graph_break"] == {}


def test_blocks_share_code_and_batch_sizes_stop_compiling():
    """Maps of 12 x 12 and 6 x 6: two scans and one, a stem, a downsampling; once, and once with any batch size."""
    model = s3a.compile_model(small_model().eval())
    kinds = 2 + 1 + 2
    with torch.no_grad():
        model(torch.randn(2, 3, 48, 48))
        assert graphs() == kinds
        model(torch.randn(3, 3, 48, 48))
        assert graphs() == 2 * kinds
        for batch_size in (4, 7, 2, 15):
            model(torch.randn(batch_size, 3, 48, 48))
        assert graphs() == 2 * kinds
        for batch_size in (16, 24):  # PyTorch has another rule for convolutions from 16 images on
            model(torch.randn(batch_size, 3, 48, 48))
        assert graphs() <= 3 * kinds


def test_another_resolution_compiles_once():
    model = s3a.compile_model(small_model().eval())
    with torch.no_grad():
        model(torch.randn(2, 3, 48, 48))
        before = graphs()
        model(torch.randn(2, 3, 32, 64))
        compiled = graphs() - before
        assert 0 < compiled <= 5
        for size in ((48, 48), (32, 64), (48, 48)):
            model(torch.randn(2, 3, *size))
    assert graphs() == before + compiled


def test_training_gives_the_same_gradients_and_drop_path_compiles_nothing():
    model = small_model(drop_path_rate=0.3).train()
    plain = copy.deepcopy(model)
    s3a.compile_model(model)
    images = torch.randn(4, 3, 32, 32)
    gradients = []
    for each in (model, plain):
        torch.manual_seed(1)
        each(images).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-5)
    before = graphs()
    for _ in range(3):
        model(images).sum().backward()
    assert graphs() == before


def test_bf16_compiles():
    model = small_model().eval().to(torch.bfloat16)
    plain = copy.deepcopy(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled, eager = s3a.compile_model(model)(images), plain(images)
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


def test_the_whole_model_is_one_graph():
    model = small_model().eval()
    whole = torch.compile(model, fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(whole(images), model(images), rtol=1e-5, atol=1e-6)
    assert graphs() == 1


def test_a_model_without_our_blocks_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no blocks.*torch\.compile"):
        s3a.compile_model(torch.nn.Linear(2, 2))


def test_a_compiled_model_copies_and_saves(tmp_path):
    model = s3a.compile_model(small_model().eval())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(copy.deepcopy(model)(images), expected, rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(s3a.SSViT.from_pretrained(tmp_path)(images), expected, rtol=1e-5, atol=1e-6)
