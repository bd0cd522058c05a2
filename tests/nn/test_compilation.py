"""Compilation in place: same numbers, same keys, and no compilation that is not owed."""

import contextlib
import copy
import functools
import gc
import os
import subprocess
import sys
import tracemalloc
import warnings

import pytest
import timm
import torch
from helpers.own_models import list_classifiers
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.exc import CppCompileError
from torch.nn.modules.module import register_module_forward_hook

import s3a
import s3a.nn.compilation
from s3a.attention.plan import NUMBERS
from s3a.nn import compilation
from s3a.nn.layers import Downsample, Region
from s3a.support import compiler
from s3a.support.compiler import raise_compilation_errors

OWN = list_classifiers()
SMALL = {
    "ssvit_nano": {"mlp_ratios": (2, 2), "layer_scale": (None, None)},
    "svit_nano": {"mlp_ratio": 2, "layer_scale": (None, None), "super_token_sizes": (4, 1)},
    "vvt_nano": {"mlp_ratios": (2, 2)},
}
OTHERS = [name for name in SMALL if name != "ssvit_nano"]
# What has code of its own on 48 x 48 pixels, with maps of 12 x 12 and 6 x 6 tokens: a stem, a downsampling and the
# blocks of either map, for SSViT those of two scans on the first and of one on the second.
KINDS = {"ssvit_nano": 5, "svit_nano": 4, "vvt_nano": 4}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    s3a.nn.compilation.compile_region.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()
    s3a.nn.compilation.compile_region.cache_clear()


def small_model(name: str = "ssvit_nano", **model_args) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"dims": (16, 32), "depths": (3, 2), "num_heads": (1, 2), **SMALL[name]}
    return timm.create_model(name, num_classes=5, **{**sizes, **model_args})


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


@pytest.mark.parametrize(
    ("name", "first", "backend"),
    [
        pytest.param("ssvit_nano", (2, 3), "inductor", marks=pytest.mark.slow),
        ("ssvit_nano", (1, 4), "eager"),
        pytest.param("ssvit_nano", (24, 2), "eager", marks=pytest.mark.slow),
        pytest.param("svit_nano", (1, 4), "eager", marks=pytest.mark.slow),
        pytest.param("vvt_nano", (24, 2), "eager", marks=pytest.mark.slow),
    ],
)
def test_blocks_share_code_and_batch_sizes_stop_compiling(name, first, backend, monkeypatch):
    """Each kind once, and once with any batch size."""
    compile_with(backend, monkeypatch)
    model = small_model(name).eval()
    plain = copy.deepcopy(model)
    s3a.compile_model(model)
    kinds = KINDS[name]
    with torch.no_grad():
        for times, batch_size in enumerate(first, start=1):
            model(torch.randn(batch_size, 3, 48, 48))
            assert graphs() == times * kinds
        for batch_size in (4, 1, 2, 15, 16, 40):
            images = torch.randn(batch_size, 3, 48, 48)
            torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-5)
        assert graphs() == 2 * kinds


def test_blocks_of_another_scan_have_code_of_their_own(monkeypatch):
    """Dynamo would compile the shared code anew for each of them, and gives up after some."""
    kind = (Region, (8, 8, 32), None)
    assert compilation.compile_region(kind, any_batch=True) is compilation.compile_region(kind, any_batch=True)
    calls = {}

    def compile_region(call, any_batch):
        calls[call] = any_batch
        return compilation.transform

    monkeypatch.setattr(compilation, "compile_region", compile_region)
    model = s3a.compile_model(timm.create_model("ssvit_nano").eval())
    with torch.no_grad():
        model(torch.zeros(1, 3, 96, 96))
    expected = set()
    for side, dim in ((24, 32), (12, 64), (6, 128)):
        for fixed in ("window", "anchors"):
            expected.add(((side, side, dim), s3a.sparse_scan(side, side, 3, fixed)))
    scans = {number: scan for (scan, *_), number in NUMBERS.items()}
    assert {(shape, scans[plan]) for kind, shape, plan, *_ in calls if kind.__name__ == "ScanBlock"} == expected
    assert len(expected) > 3
    assert set(calls.values()) == {True}, "on a CPU one code serves all batch sizes"


def test_inside_of_a_larger_graph_regions_are_plain(monkeypatch):
    model = timm.create_model("ssvit_nano").eval()
    plain, images = copy.deepcopy(model), torch.randn(1, 3, 32, 40)
    s3a.compile_model(model)
    monkeypatch.setattr(compilation, "compile_region", None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))


def test_another_resolution_compiles_once(monkeypatch):
    compile_with("eager", monkeypatch)
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssvit_nano", *OTHERS])
def test_every_family_trains_compiled(name, monkeypatch):
    """Logits, gradients and statistics, with the same paths dropped, at two batch sizes; a third compiles nothing."""
    compile_with("aot_eager", monkeypatch)
    model = small_model(name, drop_path_rate=0.3).train()
    plain = copy.deepcopy(model)
    assert list(s3a.compile_model(model).state_dict()) == list(plain.state_dict())
    for batch_size in (2, 3):
        images, outcomes = torch.randn(batch_size, 3, 40, 56), []
        for each in (model, plain):
            torch.manual_seed(1)
            logits = each(images)
            gradients = torch.autograd.grad(logits.square().sum(), list(each.parameters()))
            outcomes.append([logits, *gradients, *each.buffers()])
        for compiled, eager in zip(*outcomes, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)
    before = graphs()
    model(torch.randn(5, 3, 40, 56)).sum().backward()
    assert graphs() == before
    assert counters["graph_break"] == {}


@pytest.mark.slow
def test_bf16_compiles():
    model = small_model().eval().to(torch.bfloat16)
    plain = copy.deepcopy(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled, eager = s3a.compile_model(model)(images), plain(images)
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_the_whole_model_is_one_graph():
    model = small_model().eval()
    whole = torch.compile(model, fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(whole(images), model(images), rtol=1e-5, atol=1e-6)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssvit_nano", *OTHERS])
def test_the_whole_of_every_family_trains_as_one_graph(name):
    """A second batch size compiles once more, with the batch size left open, and a third never."""
    model = small_model(name, depths=(1, 1), drop_path_rate=0.3).train()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch_size in (2, 3, 4):
        whole(torch.randn(batch_size, 3, 32, 48)).sum().backward()
    assert graphs() == 2
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_exported_programs_take_any_batch_size(name):
    model, images = small_model(name, depths=(1, 1)).eval(), torch.randn(2, 3, 40, 56)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch_size in (1, 2, 7):
        images = torch.randn(batch_size, 3, 40, 56)
        torch.testing.assert_close(program(images), model(images), rtol=1e-5, atol=1e-6)


def test_a_model_without_our_blocks_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no blocks.*torch\.compile"):
        s3a.compile_model(torch.nn.Linear(2, 2))


def test_a_compiled_model_copies_and_saves(tmp_path, monkeypatch):
    """A copy, such as the moving average of the weights, runs the same code on weights of its own."""
    compile_with("eager", monkeypatch)
    model = s3a.compile_model(small_model().eval())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        before = graphs()
        torch.testing.assert_close(copied(images), expected, rtol=1e-5, atol=1e-6)
        assert graphs() == before
        assert all(region.run_compiled for region in copied.modules() if isinstance(region, Region))
        model = copied
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(s3a.SSViT.from_pretrained(tmp_path)(images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("training", "dtype"), [(False, torch.float32), pytest.param(True, torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "name", [name if name == "ssvit_nano" else pytest.param(name, marks=pytest.mark.slow) for name in OWN]
)
def test_every_model_compiles_without_graph_breaks(name, training, dtype, monkeypatch):
    """Once per (class, scan, map), counted here from the modules. Traced and differentiated, not compiled to code."""
    compile_with("aot_eager" if training else "eager", monkeypatch)
    model = timm.create_model(name, num_classes=3).to(dtype).train(training)
    images = torch.randn(2, 3, 48, 64, dtype=dtype)
    kinds = set()
    regions = [each for each in model.modules() if isinstance(each, Region)]
    hooks = [
        region.register_forward_pre_hook(lambda region, args: kinds.add(kind_of(region, args[0]))) for region in regions
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:  # each would be compiled for
        hook.remove()
    with torch.set_grad_enabled(training):
        logits = s3a.compile_model(model)(images)
        if training:
            logits.float().sum().backward()
    assert logits.shape == (2, 3)
    assert graphs() == len(kinds)
    assert counters["graph_break"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("scan", ["local-only", "anchor-only", "dense"])
def test_scans_of_an_ablation_compile(scan, monkeypatch):
    """Logits and gradients, also of blocks whose maps leave their scan no pass."""
    compile_with("aot_eager", monkeypatch)
    model = small_model(scan=scan).train()
    plain = copy.deepcopy(model)
    s3a.compile_model(model)
    images = torch.randn(2, 3, 32, 40)
    outcomes = []
    for each in (model, plain):
        logits = each(images)
        logits.square().sum().backward()
        outcomes.append((logits, *(parameter.grad for parameter in each.parameters())))
    for compiled, eager in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)
    assert counters["graph_break"] == {}


@pytest.mark.parametrize("scan", ["local-only", "dense"])
def test_scans_of_an_ablation_export(scan):
    model, images = small_model(scan=scan).eval(), torch.randn(1, 3, 40, 56)
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------
# Whatever else is done to a model
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["stages.0.blocks.1", "stages.0.blocks.1.attn.qkv", "stem.0"])
def test_hooks_fire_whenever_they_are_registered(place, monkeypatch):
    """Before the first call and after it, in a second model that shares the code of the first, and until removed."""
    compile_with("eager", monkeypatch)
    images = torch.randn(2, 3, 32, 32)
    first, second = (s3a.compile_model(small_model(depths=(2, 1)).train()) for _ in range(2))
    inside = place != "stages.0.blocks.1"
    for model in (first, second, first):
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
            fired = []
            module = model.get_submodule(place)
            hook = getattr(module, f"register_{kind}_hook")(lambda *arguments, fired=fired: fired.append(arguments[0]))
            with pytest.warns(RuntimeWarning, match="uncompiled while") if inside else contextlib.nullcontext():
                model(images).sum().backward()
            assert fired == [module], kind
            hook.remove()
            model(images).sum().backward()
            assert fired == [module], kind


def test_hooks_of_every_module_fire(monkeypatch):
    compile_with("eager", monkeypatch)
    model, images, fired = s3a.compile_model(small_model().eval()), torch.randn(2, 3, 32, 32), []
    with torch.no_grad():
        model(images)
        hook = register_module_forward_hook(lambda module, *_: fired.append(module))
        try:
            model(images)
        finally:
            hook.remove()
    assert {model.stem, model.stages[0].blocks[0], model.stages[0].blocks[0].attn.qkv} <= set(fired)


def test_a_hook_of_a_region_changes_nothing_in_its_code(monkeypatch):
    """As those with which FSDP gathers the weights of a block: they run, and the block stays compiled."""
    compile_with("eager", monkeypatch)
    images = torch.randn(2, 3, 32, 32)
    compiled = []
    for _ in range(2):  # a model with a hook before all code, and one that shares the code of the first
        model, plain = s3a.compile_model(small_model().eval()), small_model().eval()
        for each in (model, plain):
            each.stages[0].blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output)
        with torch.no_grad():
            torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-6)
            assert not torch.allclose(plain(images), small_model().eval()(images))
        compiled.append(graphs())
    assert compiled[0] == compiled[1] > 0


class LowRank(torch.nn.Module):
    """A layer with a correction of low rank, which takes its place, as adapters do."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


def test_layers_that_are_replaced_are_called(monkeypatch):
    compile_with("eager", monkeypatch)
    model, images = s3a.compile_model(small_model().eval()), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        for block in model.stages[0].blocks[:2]:
            block.attn.proj = LowRank(block.attn.proj)
        plain = small_model().eval()
        plain.stages = copy.deepcopy(model.stages)
        for region in plain.modules():
            if isinstance(region, Region):
                region.run_compiled = None
        torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(model(images), before)


def test_functional_transforms_give_what_they_give_uncompiled(monkeypatch):
    """Gradients of single samples, and a batch of batches."""
    compile_with("eager", monkeypatch)
    model = s3a.compile_model(small_model(scan="dense", depths=(1, 1)).eval())
    images = torch.randn(3, 2, 3, 32, 32)
    with torch.no_grad():
        separate = torch.stack([model(each) for each in images])
        torch.testing.assert_close(torch.vmap(model)(images), separate, rtol=1e-4, atol=1e-5)
    parameters = dict(model.named_parameters())

    def compute_loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    samples = torch.vmap(torch.func.grad(compute_loss), in_dims=(None, 0))(parameters, images[0])
    for index, image in enumerate(images[0]):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(samples[name][index], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_every_family_is_vectorised_by_vmap(compiled, monkeypatch):
    compile_with("eager", monkeypatch)
    for name in SMALL:
        model = small_model(name, depths=(1, 1)).eval()
        images = torch.randn(2, 1, 3, 32, 32)
        with torch.no_grad():
            expected = torch.stack([model(each) for each in images])
            vectorised = torch.vmap(s3a.compile_model(model) if compiled else model)(images)
        torch.testing.assert_close(vectorised, expected, rtol=1e-4, atol=1e-5)


def test_replicas_of_data_parallel_have_weights_of_their_own(monkeypatch):
    """As torch.nn.parallel.replicate makes them for the second GPU: the replica's tensors differ from the module's."""
    compile_with("eager", monkeypatch)
    model, images = s3a.compile_model(small_model().eval()), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first = model(images)
        replica = replicate(model, scale=0.5)
        halved = small_model().eval()
        for parameter in halved.parameters():
            parameter.mul_(0.5)
        torch.testing.assert_close(replica(images), halved(images), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(images), first)
    assert not torch.allclose(first, halved(images))


def replicate(module: torch.nn.Module, scale: float) -> torch.nn.Module:
    """A replica of a module by torch's own rule, with scaled parameters."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replicate(child, scale))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(replica, name, scale * parameter.detach())
    return replica


def test_twenty_kinds_of_one_region_compile(monkeypatch):
    """As where a model is unfrozen layer by layer. Dynamo, which compiles anew for each, gives up after eight."""
    compile_with("eager", monkeypatch)
    region = s3a.compile_model(Downsample(8, 8)).train()
    parameters = list(region.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for kind in range(20):
            trained = [bool((kind % 15 + 1) >> index & 1) for index in range(len(parameters))]
            for parameter, requires_grad in zip(parameters, trained, strict=True):
                parameter.grad = None
                parameter.requires_grad_(requires_grad)
            region(torch.randn(2, 4, 4, 8, requires_grad=kind >= 15)).sum().backward()
            assert [parameter.grad is not None for parameter in parameters] == trained
    assert graphs() == 20


def test_past_the_limit_a_block_runs_uncompiled_and_says_so_once(monkeypatch):
    compile_with("eager", monkeypatch)
    monkeypatch.setattr(compiler, "MOST_VARIANTS", 2)
    model = s3a.compile_model(small_model(depths=(1, 1)).train())
    plain, images = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    for region in plain.modules():
        if isinstance(region, Region):
            region.run_compiled = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(4):
            for each in (model, plain):
                list(each.stages[0].blocks[0].parameters())[index].requires_grad_(False)
            torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-6)
    (warning,) = caught
    assert "a ScanBlock runs uncompiled from here on: one function met more kinds of input" in str(warning.message)
    assert model.stages[0].blocks[0].run_compiled is None
    assert model.stages[1].blocks[0].run_compiled is not None


def test_a_batch_of_one_value_is_refused_as_uncompiled(monkeypatch):
    """Batch norm has no variance of one value; trained on after batches of other sizes it would leave NaN behind."""
    compile_with("aot_eager", monkeypatch)
    model = s3a.compile_model(torch.nn.Sequential(Downsample(8, 8))).train()
    for batch_size in (4, 3):
        model(torch.randn(batch_size, 2, 2, 8)).sum().backward()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 2, 2, 8))
    model(torch.randn(1, 4, 4, 8)).sum().backward()
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("name", SMALL)
def test_compiled_tokens_lie_as_uncompiled_ones(name, monkeypatch):
    """Channels-last, which convolutions on a CPU keep, and pointwise layers need."""
    compile_with("eager", monkeypatch)
    model = small_model(name, depths=(1, 1)).eval()
    first = next(module for module in model.modules() if isinstance(module, Region))
    images = torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        strides = first(images).stride()
        s3a.compile_model(model)
        assert first(images).stride() == strides
        assert first(images).is_contiguous()


def test_a_compiled_model_is_traced(monkeypatch):
    """By torch.jit and by torch.fx, which know nothing of compiled code; also where a module has a child of None."""
    compile_with("eager", monkeypatch)
    model, images = s3a.compile_model(small_model(depths=(1, 1)).eval()), torch.randn(2, 3, 32, 32)
    model.stages[0].blocks[0].mlp.register_module("nothing", None)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(torch.jit.trace(model, images)(images), expected, rtol=1e-5, atol=1e-6)
        stem = torch.fx.symbolic_trace(torch.nn.Sequential(model.stem))
        torch.testing.assert_close(stem(images), model.stem(images), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_calls_leave_nothing_behind(monkeypatch):
    compile_with("eager", monkeypatch)
    model = s3a.compile_model(small_model(depths=(1, 1)).eval())
    block, tokens = model.stages[1].blocks[0], torch.randn(1, 4, 4, 32)
    with torch.no_grad():
        plan = block.attn.plan(tokens)
        for _ in range(20):
            block(tokens, plan)
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(2_000):
                block(tokens, plan)
            gc.collect()
            left = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert left < 20_000, "ten bytes a call"


def test_second_derivatives_are_refused_with_the_remedy(monkeypatch):
    compile_with("aot_eager", monkeypatch)
    model = s3a.compile_model(small_model(depths=(1, 1)).eval())
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match=r'leave s3a\.compile_model out, .* backend="reference"'):
        torch.autograd.grad(model(images).sum(), images, create_graph=True)
    assert torch.autograd.grad(model(images).sum(), images)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_s3a_compiles_with_open_sizes(backend):
    """At ten sizes of maps, and so past dynamo's limit."""
    attention = s3a.S3A(32, 2, size=3)
    compiled = torch.compile(attention, dynamic=True, backend=backend)
    sizes = [(12, 12), (9, 11), (8, 8), (7, 20), (16, 16), (5, 5), (13, 6), (11, 11), (10, 30), (6, 7)]
    with torch.no_grad():
        for height, width in sizes:
            tokens = torch.randn(2, height, width, 32)
            torch.testing.assert_close(compiled(tokens), attention(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_another_default_device_changes_nothing(compiled, monkeypatch):
    """A plan that is made under torch.device("meta") holds real tensors."""
    compile_with("eager", monkeypatch)
    model, images = small_model(depths=(1, 1)).eval(), torch.randn(2, 3, 44, 36)
    if compiled:
        s3a.compile_model(model)
    s3a.clear_caches()
    with torch.no_grad():
        with torch.device("meta"):
            first = model(images)
        torch.testing.assert_close(first, model(images))
    assert first.device.type == "cpu"


def compile_with(backend: str, monkeypatch) -> None:
    """The frontend makes the graphs; eager runs them as they are, aot_eager with their backward graphs."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def kind_of(module: torch.nn.Module, x: torch.Tensor) -> tuple:
    attn = getattr(module, "attn", None)
    scan = s3a.sparse_scan(*x.shape[1:3], attn.size, attn.fixed) if isinstance(attn, s3a.S3A) else None
    return type(module), scan, x.shape


NO_COMPILER = """
import torch, timm, s3a
model = timm.create_model("ssvit_nano", num_classes=2).eval()
images = torch.randn(1, 3, 32, 32)
compiled = s3a.compile_model(__import__("copy").deepcopy(model))
query = torch.randn(1, 8, 8, 1, 16)
calls = {"model": lambda: compiled(images), "flex": lambda: s3a.neighborhood_attention(*[query] * 3, 3, backend="flex")}
for name, call in calls.items():
    try:
        with torch.no_grad():
            call()
    except s3a.CompilationError as error:
        print(name, error)
print(model(images).shape, s3a.neighborhood_attention(*[query] * 3, 3).shape)
"""


@pytest.mark.slow
def test_without_a_compiler_the_error_says_so_and_the_eager_path_works(tmp_path):
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", NO_COMPILER]
    run = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    model, flex, eager = run.stdout.splitlines()
    assert "no working C++ compiler" in model
    assert "set CXX" in model
    assert "leave s3a.compile_model out" in model
    assert "no working C++ compiler" in flex
    assert 'use backend="tiled"' in flex
    assert eager == "torch.Size([1, 2]) torch.Size([1, 8, 8, 1, 16])"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (CppCompileError(["g++"], "error: unknown type"), "C\\+\\+ compiler refused.*install a current g\\+\\+"),
        (
            RuntimeError("No valid triton configs. out of resource: shared memory, Required: 9"),
            "too little shared memory",
        ),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "Triton finds no C compiler; install gcc"),
        (TorchDynamoException("some limit\nand more"), "failed here: some limit; or do that"),
    ],
)
def test_failures_are_worded(error, words):
    with pytest.raises(s3a.CompilationError, match=words) as raised, raise_compilation_errors(instead="do that"):
        raise error
    assert raised.value.__cause__ is error


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), raise_compilation_errors(instead="do that"):
        raise RuntimeError("shapes differ")
