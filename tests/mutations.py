"""Mutations: faults that are put into the library one by one, each with the test that must notice it.

    python tests/mutations.py                             # all of them, in about 25 minutes
    python tests/mutations.py s3a/data -k window --jobs 2 # those of a file or folder, with a word in their description
    python tests/mutations.py --list

Prints which were killed, which survived, and which are faults of this list (a test that cannot be collected, or that
fails without the mutation); exit status 1 where any survived, 2 for faults of the list. `test_mutations.py` checks in
the default suite that every mutation can still be applied and that its test exists; running them is for this script.

A worker imports the libraries once, but not `s3a`, and forks for every mutation: the child imports `s3a` from a copy of
the repository in which the mutation is applied, and runs the test there.
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("s3a", "tests", "recipes", "tools", "docs")  # folders that tests read; and all files beside them
IGNORED = shutil.ignore_patterns("*.egg-info", "runs", ".git", ".*_cache")
# Imported before a worker forks. Not s3a, nor anything that imports it.
LIBRARIES = (
    "pytest",
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "timm",
    "accelerate",
    "datasets",
    "torchao.quantization",
    "sklearn.datasets",
    "sklearn.model_selection",
    "matplotlib.figure",
    "tyro",
    "xdist.plugin",  # where it is installed
)
BROKEN = 70  # exit status of a child that could not run the tests at all


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Attributes:
        file: in which text is replaced, from the root of the repository.
        old: text that stands in the file exactly once.
        new: what takes its place.
        breaks: what goes wrong then, in a sentence.
        test: the id of the test that must fail; with its parameters in brackets, or for all of them.
    """

    file: str
    old: str
    new: str
    breaks: str
    test: str

    def __str__(self) -> str:
        return f"{self.file}: {self.breaks}"


def mutate(file: str, tests: str, *rows: tuple[str, str, str, str]) -> list[Mutation]:
    """The mutations of a file.

    Args:
        tests: the file of those tests that are named by their function alone.
        rows: (old, new, breaks, test).
    """
    return [
        Mutation(file, old, new, breaks, test if "::" in test else f"{tests}::{test}")
        for old, new, breaks, test in rows
    ]


# One mutation in two lines, where it fits: what is replaced; what breaks, and the test that must notice.
# fmt: off

# --------------------------------------------------------------------------------------------------------
# The operator
# --------------------------------------------------------------------------------------------------------

OPERATOR = [
    *mutate("s3a/geometry.py", "tests/test_geometry.py",
        ("index - kernel_size // 2, 0", "index - kernel_size // 2 + 1, 0",
         "windows are off centre", "test_windows_shift_inwards_at_borders"),
        ("np.maximum(group_length - kernel_size, 0))", "np.maximum(group_length - 1, 0))",
         "windows do not move inwards at the end", "test_windows_shift_inwards_at_borders"),
        ("np.clip(index - kernel_size // 2, 0, np.maximum(group_length - kernel_size, 0))",
         "np.minimum(index - kernel_size // 2, np.maximum(group_length - kernel_size, 0))",
         "windows do not move inwards at the beginning", "test_windows_shift_inwards_at_borders"),
        ("start + np.minimum(kernel_size, group_length)", "start + kernel_size",
         "a kernel leaves its group where it is larger", "test_a_kernel_larger_than_the_group_sees_the_group"),
        ("np.lexsort((token, token % dilation))", "np.lexsort((token, token // dilation))",
         "dilation groups are neighbours", "test_windows_shift_inwards_at_borders"),
        ("-(-(length - group) // dilation)", "length // dilation",
         "the longer of ragged groups lose a token", "test_keys_of_every_query_on_one_axis"),
        ("find_axis_windows(width, self.kernel_size[1], self.dilation[1])",
         "find_axis_windows(width, self.kernel_size[0], self.dilation[0])",
         "columns have the window of the rows", "test_rows_and_columns_are_not_mixed_up"),
        ("(rows.stop - rows.start).sum() * (columns.stop - columns.start).sum()",
         "(rows.stop - rows.start).sum() * (rows.stop - rows.start).sum()",
         "pairs are counted as on square maps", "test_count_pairs"),
        ("windows.start[place] : windows.stop[place]]", "windows.start[place] : windows.stop[place] - 1]",
         "the last key of a window is not listed", "test_windows_shift_inwards_at_borders"),
        ("return number if number % 2 else number + 1", "return number if number % 2 else number - 1",
         "even kernels shrink", "test_scans_at_224_pixels"),
        (" and not isinstance(value, bool)", "",
         "True is a kernel size", "test_wrong_kernels_are_refused"),
        ("if rows % 2 == 0 or columns % 2 == 0:", "if rows % 2 == 0 and columns % 2 == 0:",
         "a kernel may be even on one axis", "test_wrong_kernels_are_refused"),
        ("for one in find_passes(height, width, size, fixed, passes) if",
         "for one in find_passes(height, width, size, fixed, passes)[::-1] if",
         "the anchor pass comes first", "test_scans_at_224_pixels"),
        ("shorter = min(height, width)", "shorter = max(height, width)",
         "scans follow the longer side", "test_scans_of_oblong_maps_follow_the_shorter_side"),
        ('(size, shorter // size) if fixed == "window"', '(size, shorter // size) if fixed == "anchors"',
         "what is fixed is swapped", "test_scans_at_224_pixels"),
        ("min(window, shorter // make_odd(anchors))", "window",
         "anchors reach beyond the map", "test_scans_at_224_pixels"),
        ("shorter // make_odd(anchors)))", "shorter // anchors))",
         "the dilation is that of an even number of anchors", "test_scans_of_every_map"),
        ("Neighborhood(make_odd(anchors), dilation) if", "Neighborhood(make_odd(anchors)) if",
         "anchors are neighbours", "test_scans_at_224_pixels"),
        ("window > 1 and", "window > 0 and",
         "a window of one token is a pass", "test_scans_of_every_map"),
        ("anchors > 1 and", "anchors > 0 and",
         "one anchor is a pass", "test_scans_at_224_pixels"),
        ("Neighborhood(make_odd(max(height, width)))", "Neighborhood(make_odd(min(height, width)))",
         "a dense scan does not reach the ends of oblong maps", "test_a_dense_scan_is_one_pass_over_all_tokens"),
        ("self.fixed[block % len(self.fixed)]", "self.fixed[(block + 1) % len(self.fixed)]",
         "the blocks of a stage begin with anchors", "test_rules_say_what_each_block_runs"),
        ('passes != "anchor"', 'passes != "local"',
         "the ablations leave out the wrong pass", "test_one_pass_leaves_the_other_out"),
    ),
    *mutate("s3a/attention/functional.py", "tests/attention/test_functional.py",
        ("return (Neighborhood(kernel_size, dilation),)", "return (Neighborhood(kernel_size),)",
         "dilation is ignored", "test_dense_mask"),
        ("for axis in (1, 2, 4))", "for axis in (2, 1, 4))",
         "maps are attended transposed", "test_dense_mask"),
        ("attend_plan(query, key, value, plan, scale)", "attend_plan(query, key, value, plan)",
         "scale is ignored", "test_scale"),
        ("needs_grad = torch.is_grad_enabled() and", "needs_grad = False and",
         "a backend without a backward is used for training", "test_flex_refuses_what_it_cannot_run"),
        ("needs_grad = torch.is_grad_enabled() and any", "needs_grad = any",
         "flex refuses trainable inputs without a graph", "test_flex_runs_trainable_inputs_without_a_graph"),
        ("sparse_scan, (size, fixed, passes), scale", "sparse_scan, (size, fixed), scale",
         "passes is ignored", "test_ablated_scans"),
        ("height, width, operands, backend, kernel_options)", "height, width, operands)",
         "a backend that is named is not used", "test_the_backend_that_is_named_attends"),
        ("query.ndim != 5 or 0 in query.shape", "query.ndim != 5",
         "empty maps are attended", "test_wrong_shapes"),
        ('for quality in ("shape", "dtype", "device"):', 'for quality in ("shape", "device"):',
         "keys may have another dtype", "test_wrong_dtypes_and_devices"),
    ),
    *mutate("s3a/attention/plan.py", "tests/attention/test_functional.py",
        ("for each in plan.passes:", "for each in plan.passes[:1]:",
         "the second pass is left out", "test_sparse_scan_is_two_chained_passes"),
        ("for each in plan.passes:", "for each in plan.passes[::-1]:",
         "the second pass is attended first", "test_sparse_scan_is_two_chained_passes"),
        ("value = attend_pass(", "query = value = attend_pass(",
         "what the first pass returned asks in the second one", "test_sparse_scan_is_two_chained_passes"),
        ("value = attend_pass(", "key = value = attend_pass(",
         "what the first pass returned is the second one's keys", "test_sparse_scan_is_two_chained_passes"),
        ("query.shape[-1] ** -0.5", "query.shape[-2] ** -0.5",
         "the scale is that of the number of heads", "test_dense_mask"),
        ("lay_out_scan(scan, height, width, operands.device, backends, **may_fall_back)",
         'lay_out_scan(scan, height, width, torch.device("cpu"), backends, **may_fall_back)',
         "plans are on the CPU whatever attends",
         "tests/attention/test_plan.py::test_a_plan_is_looked_up_by_all_that_matters"),
        ("    if backend is None:\n", "    if True:\n",
         "every pass gets the automatic choice", "test_explicit_choice_is_kept"),
        ("zip(scan, backends, strict=True)", "zip(scan, backends[:1] * len(scan), strict=True)",
         "all passes have the backend of the first",
         "tests/attention/test_plan.py::test_the_passes_of_a_scan_mix_backends"),
        ("    with make_plain_tensors():\n", "    if True:\n",
         "plans are lost with the mode they were built in",
         "tests/attention/test_plan.py::test_plans_survive_the_mode_they_are_built_in"),
        ("    if reason is not None:\n", "    if reason is not None and not BACKENDS:\n",
         "a backend that cannot run is used all the same", "test_flex_refuses_what_it_cannot_run"),
        ("return min(costs, key", "return max(costs, key",
         "what costs most is chosen", "test_the_automatic_choice_is_what_costs_least"),
        ("if reason is None and name not in costs.candidates:", "if reason is None and not costs.candidates:",
         "the oracle is chosen where it seems cheap", "test_the_automatic_choice_is_what_costs_least"),
        ("choose_backend(each, height, width, operands) for each in scan",
         "choose_backend(scan[0], height, width, operands) for each in scan",
         "the choice is made for the first pass alone",
         "tests/attention/test_plan.py::test_a_plan_is_looked_up_by_all_that_matters"),
        ("    if device.type not in UNCOMPILED:\n", "    if True:\n",
         "every call tries to compile again",
         "test_an_automatic_choice_that_does_not_compile_gives_way_to_tiles_with_one_warning"),
        ("plan.automatic and not torch.compiler.is_compiling()", "not torch.compiler.is_compiling()",
         "a backend that is named gives way too", "test_a_named_backend_that_does_not_compile_is_an_error"),
        ("    return tuple(sorted(options.items()))", "    return tuple(options.items())",
         "kernel options in another order are other plans", "test_kernel_options_of_any_order_are_one_plan"),
        ("@cache_results(maxsize=1024)\ndef plan_scan", "def plan_scan",
         "every call plans anew", "tests/attention/test_plan.py::test_one_forward_builds_what_the_next_one_uses"),
        ("@cache_results(maxsize=256)\ndef lay_out_scan", "def lay_out_scan",
         "a plan is laid out again for another dtype", "tests/attention/test_plan.py::test_plans_are_built_once"),
    ),
    *mutate("s3a/attention/backends/backend.py", "tests/attention/test_plan.py",
        ("    needs_grad: bool\n", "    needs_grad: bool\n\n    def __eq__(self, other: object) -> bool:\n"
         "        return isinstance(other, Operands) and self.device == other.device\n\n"
         "    def __hash__(self) -> int:\n        return hash(self.device)\n",
         "plans are looked up by the device alone", "test_a_plan_is_looked_up_by_all_that_matters"),
    ),
    *mutate("s3a/attention/backends/table.py", "tests/attention/test_functional.py",
        ("layout=tiles.lay_out_tiles,\n            attend=tiled.attend",
         "layout=reference.lay_out_keys,\n            attend=reference.attend",
         "the tiled backend is the reference", "test_the_backend_that_is_named_attends"),
    ),
    *mutate("s3a/attention/backends/reference.py", "tests/attention/test_plan.py",
        ("seen = places < stop[:, None]", "seen = places <= stop[:, None]",
         "short windows see a key too many", "test_gathers_are_the_rule"),
        ("token_order = np.argsort(windows.position)", "token_order = windows.position",
         "queries of dilated passes have each other's keys", "test_gathers_are_the_rule"),
        ("scores = scale * torch.einsum", "scores = torch.einsum",
         "the scale is ignored", "tests/attention/test_functional.py::test_scale"),
        ("scores.masked_fill(~seen, -torch.inf).softmax", "scores.softmax",
         "keys that stand in for missing ones count", "tests/attention/test_functional.py::test_dense_mask"),
    ),
    *mutate("s3a/attention/backends/tiles.py", "tests/attention/test_plan.py",
        ("np.arange(windows.start[begin], windows.stop[end - 1])",
         "np.arange(windows.start[begin], windows.stop[begin])",
         "a halo ends with the keys of the first query", "test_tiles_are_the_rule"),
        ("np.arange(windows.start[begin], windows.stop[end - 1])",
         "np.arange(windows.start[end - 1], windows.stop[end - 1])",
         "a halo begins with the keys of the last query", "test_tiles_are_the_rule"),
        ("(start <= halo) & (halo < stop)", "(start <= halo) & (halo <= stop)",
         "a query of a tile sees a key too many", "test_tiles_are_the_rule"),
        ("shape = (mask.shape, mask.tobytes())", 'shape = (mask.shape, b"")',
         "tiles of different masks share one", "test_tiles_are_the_rule"),
        ("windows.position[begin:end], windows.position[halo]", "windows.position[begin:end], halo",
         "keys are places, not positions", "test_tiles_are_the_rule"),
        ("rows.mask[:, None, :, None] & columns.mask[None, :, None, :]",
         "rows.mask[:, None, :, None] | columns.mask[None, :, None, :]",
         "a key is seen if one axis has it", "test_tiles_are_the_rule"),
        ("of_rows[:, None, :, None] * width + of_columns",
         "of_rows[:, None, :, None] * len(columns.queries) + of_columns",
         "tiles lie elsewhere on oblong maps", "test_tiles_are_the_rule"),
        ("mask=None if mask.all() else", "mask=None if mask.any() else",
         "no mask is stored", "test_tiles_are_the_rule"),
        ("key=lambda cost: cost.total)", "key=lambda cost: -cost.total)",
         "the dearest tiles are chosen", "test_tiles_stay_sparse"),
        ("rows.group is not None and columns.group is not None", "rows.group is not None",
         "tiles are taken for whole groups if they are on one axis",
         "tests/attention/test_functional.py::test_dense_mask"),
        ("group=group_length if length % min(length, dilation) == 0 and tile == group_length else None",
         "group=group_length if tile == group_length else None",
         "ragged groups are taken for equal ones", "tests/attention/test_functional.py::test_dense_mask"),
        ("places[:, np.argsort(np.concatenate(positions))]", "places",
         "the places of positions are in the order of the tiles", "test_tiles_are_the_rule"),
        ("seen=None if seen.all() else fix_size(seen)", "seen=None",
         "compiled inference sees keys that are missing",
         "tests/attention/test_functional.py::test_what_is_compiled_is_the_dense_mask"),
        ("< tiles\n", "> tiles\n",
         "keys are listed where tiles are cheaper", "test_keys_are_listed_where_that_is_cheaper"),
        ("in enumerate((height, width))", "in enumerate((width, height))",
         "rows of oblong maps are cut as columns are", "test_tiles_are_the_rule"),
    ),
    *mutate("s3a/attention/backends/tiled.py", "tests/attention/test_functional.py",
        ("first = num_tokens * torch", "first = 0 * torch",
         "all images of a batch are the first one", "test_dense_mask"),
        ("concatenate(attended), place_rows, query_rows", "concatenate(attended), query_rows, place_rows",
         "tiles do not go back to their places", "test_dense_mask"),
        ("query.flatten(0, 1), query_rows, place_rows, axis=0", "query.flatten(0, 1), query_rows, query_rows, axis=0",
         "gradients of queries are other tokens'", "test_gradients_of_the_dense_mask"),
        ("(b r c) (i j) n d -> b (i r j c) n d", "(b r c) (i j) n d -> b (r i j c) n d",
         "whole dilation groups come back row by row", "test_dense_mask"),
        ("attn_mask=mask, scale=scale).transpose(1, 2)\n    lengths",
         "attn_mask=None, scale=scale).transpose(1, 2)\n    lengths",
         "a map that is one tile has no mask", "test_dense_mask"),
        ("scores = scale * products.sum(-1)", "scores = products.sum(-1)",
         "compiled inference has no scale", "test_what_is_compiled_is_the_dense_mask"),
        ("scores.masked_fill(~layout.seen[:, :, None], -torch.inf)", "scores",
         "compiled inference does not mask", "test_what_is_compiled_is_the_dense_mask"),
        ("((scale * query) @ key.mT)", "(query @ key.mT)",
         "compiled bfloat16 tiles have no scale", "test_what_is_compiled_is_the_dense_mask"),
        ("scores.masked_fill(~mask, -torch.inf)", "scores",
         "compiled bfloat16 tiles have no mask", "test_what_is_compiled_is_the_dense_mask"),
        ("return compiled and not needs_grad and", "return compiled and",
         "compiled training holds all keys of all queries at once",
         "test_what_is_fused_is_compiled_inference_on_a_cpu"),
        ("torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()",
         "torch.compiler.is_dynamo_compiling()",
         "exported programs hold all keys at once", "test_what_is_fused_is_compiled_inference_on_a_cpu"),
    ),
    *mutate("s3a/attention/backends/flex.py", "tests/attention/test_functional.py",
        ("attended.transpose(1, 2), inverse, order[: len(inverse)]",
         "attended.transpose(1, 2), order[: len(inverse)], inverse",
         "the tokens come back in another order", "test_flex_is_the_dense_mask"),
        ("block_mask=block_mask, scale=scale, kernel", "block_mask=block_mask, kernel",
         "the scale is ignored", "test_flex_scales"),
        ("options: Any = dict(kernel_options)", "options: Any = {}",
         "kernel options are ignored", "test_kernel_options_reach_flex_attention"),
        ("value, rebuild_mask(layout), scale", "value, layout.block_mask, scale",
         "a caller cannot compile it", "test_flex_is_part_of_a_callers_graph"),
        ("FLASH_QUERY_BLOCKS = {9: 1, 10: 2, 11: 2}", "FLASH_QUERY_BLOCKS = {8: 1, 9: 1, 10: 2, 11: 2}",
         "kernels that ignore the mask are taken",
         "test_flash_kernels_are_refused_where_they_would_be_dense_or_missing"),
        ("FLASH_QUERY_BLOCKS = {9: 1, 10: 2, 11: 2}", "FLASH_QUERY_BLOCKS = {9: 1, 10: 1, 11: 2}",
         "Blackwell gets the blocks of Hopper", "test_flash_kernels_have_the_blocks_that_they_ask_for"),
        ("if operands.head_dim < 16:", "if operands.head_dim < 8:",
         "head dims without a kernel are taken", "test_flex_refuses_what_it_cannot_run"),
        ("not in (torch.float32, torch.bfloat16, torch.float16):",
         "not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):",
         "float64 is taken", "test_flex_refuses_what_it_cannot_run"),
        ('if device == "cpu" and operands.needs_grad:', 'if device == "xpu" and operands.needs_grad:',
         "it trains on a CPU without a backward",
         "tests/nn/test_s3a.py::test_s3a_refuses_to_train_on_flex_without_cuda"),
        ("query.dtype, scale, mode)", "query.dtype, scale, None)",
         "modes share code until dynamo gives up", "test_flex_stays_compiled_over_modes"),
        ("query.dtype, scale, mode)", "query.dtype, 0, mode)",
         "scales share code until dynamo gives up", "test_flex_stays_compiled_over_many_scales"),
        ("compile_pass(layout, query.shape[1]", "compile_pass(None, query.shape[1]",
         "maps share code until dynamo gives up", "test_flex_stays_compiled_over_many_maps"),
    ),
    *mutate("s3a/attention/backends/blocks.py", "tests/attention/test_plan.py",
        ("(row < row_window[1, query])", "(row <= row_window[1, query])",
         "queries see a row of keys too many", "test_block_mask_is_the_rule"),
        ("(column < column_window[1, query])", "(column <= column_window[1, query])",
         "queries see a column of keys too many", "test_block_mask_is_the_rule"),
        ("in_rows & (column_window[0, query] <= column)", "in_rows | (column_window[0, query] <= column)",
         "a key is seen if one axis has it", "test_block_mask_is_the_rule"),
        ("(0, padding), constant_values=-1)", '(0, padding), mode="edge")',
         "padding is seen as a key", "test_order_pads_to_whole_blocks"),
        ("np.argsort(order[:num_tokens])", "order[:num_tokens]",
         "the inverse of the order is the order", "test_order_pads_to_whole_blocks"),
        ("key=lambda order: order.estimate_cost(costs).total)", "key=lambda order: -order.estimate_cost(costs).total)",
         "the dearest order is taken", "test_touched_blocks_at_56_by_56"),
        ("np.minimum(factor, num_query_blocks - factor * query_block)", "np.minimum(factor, num_query_blocks)",
         "joined blocks without a neighbour are never full", "test_block_mask_is_the_rule"),
        ("num_full == num_joined", "num_full > 0",
         "joined blocks are full if one of them is", "test_block_mask_is_the_rule"),
        ("for size in BLOCK_SIZES if size == max(BLOCK_SIZES) or num_tokens > size)", "for size in BLOCK_SIZES[1:])",
         "blocks have 128 tokens everywhere",
         "tests/attention/test_functional.py::test_blocks_fit_the_tiles_that_kernel_options_ask_for"),
        ("full = (key + 1) * block_size <= len(row)", "full = key * block_size <= len(row)",
         "a padded block is full", "test_block_mask_is_the_rule"),
        ("(highest < common_stop)", "(highest <= common_stop)",
         "blocks are full that lack a key", "test_block_mask_is_the_rule"),
        ("np.maximum.reduceat(windows.start[place], starts)", "np.minimum.reduceat(windows.start[place], starts)",
         "a block is full if one query sees it", "test_block_mask_is_the_rule"),
        ("*index_blocks(full, shape, device)", "*index_blocks(full[:0], shape, device)",
         "full blocks are lost", "test_block_mask_is_the_rule"),
        ("columns.stop[last] - 1, num_rows", "columns.start[last], num_rows",
         "blocks at the ends of windows are not touched", "test_block_mask_is_the_rule"),
        ("columns.start[first], num_rows", "columns.stop[first] - 1, num_rows",
         "blocks at the beginnings of windows are not touched", "test_block_mask_is_the_rule"),
        ("column_tile[column], row_tile[row], columns.group[column], rows.group[row]",
         "columns.group[column], rows.group[row], column_tile[column], row_tile[row]",
         "tokens are walked tile by tile over all groups",
         "test_tokens_are_walked_group_by_group_and_inside_a_group_tile_by_tile"),
    ),
    *mutate("s3a/attention/backends/permute.py", "tests/attention/test_functional.py",
        ("permuted: Tensor = Permutation.apply(tensor, order, inverse, axis, padding)",
         "permuted: Tensor = tensor.index_select(axis, order)",
         "gradients are scattered", "test_the_gradient_of_flex_scatters_nothing"),
        ("(*(0, 0) * behind, 0, ctx.padding)", "(*(0, 0) * behind, ctx.padding, 0)",
         "the gradient of padding comes first", "test_what_padding_is_given_is_left_out"),
    ),
    *mutate("s3a/nn/s3a.py", "tests/nn/test_s3a.py",
        ("rotate(heads[:, :, :2], plan.cosine, plan.sine).unbind(2)", "heads[:, :, :2].unbind(2)",
         "queries and keys are not rotated", "test_s3a_is_the_official_mathematics"),
        ('"b h w (three n d) -> b (h w) three n d"', '"b h w (n three d) -> b (h w) three n d"',
         "heads are cut before queries, keys and values", "test_s3a_is_the_official_mathematics"),
        ('"b (h w) n d -> b h w (n d)"', '"b (h w) n d -> b h w (d n)"',
         "heads come back interleaved", "test_s3a_is_the_official_mathematics"),
        ("qkv[..., 2 * self.dim :]", "qkv[..., self.dim : 2 * self.dim]",
         "LePE is of the keys", "test_s3a_is_the_official_mathematics"),
        ("self.proj(attended + self.lepe(", "self.proj(attended - self.lepe(",
         "LePE is subtracted", "test_s3a_is_the_official_mathematics"),
        ("x.requires_grad or self.qkv.weight.requires_grad", "x.requires_grad",
         "weights are trained by a backend without a backward", "test_s3a_refuses_to_train_on_flex_without_cuda"),
        ("height, width = operator.index(x.shape[1]), operator.index(x.shape[2])",
         "width, height = operator.index(x.shape[1]), operator.index(x.shape[2])",
         "maps are planned transposed", "test_s3a_is_the_official_mathematics"),
        ("scan = height, width, self.size, self.fixed, self.passes",
         'scan = height, width, self.size, "window", self.passes',
         "fixed is ignored", "test_s3a_is_the_official_mathematics"),
        ("scan = height, width, self.size, self.fixed, self.passes", "scan = height, width, 7, self.fixed, self.passes",
         "size is ignored", "test_s3a_is_the_official_mathematics"),
        ("torch.promote_types(operands.dtype, torch.float32)", "operands.dtype",
         "rotary tables are as coarse as the tokens",
         "tests/attention/test_plan.py::test_rotary_tables_survive_the_mode_they_are_built_in"),
        ("join_plan(scan, operands.head_dim, operands.device, dtype)",
         "join_plan(scan, operands.head_dim, operands.device, torch.float32)",
         "rotary tables are float32 for float64 too", "test_s3a_is_the_official_mathematics"),
        ("(dim // num_heads) % 4", "(dim // num_heads) % 2",
         "head dims without pairs for both axes are taken", "test_s3a_refuses_sizes_without_meaning"),
        ("plan = plan or self.plan(x)", "plan = self.plan(x)",
         "a plan that is handed in is not used", "test_s3a_takes_a_plan"),
        ("(plan.scan.height, plan.scan.width) != x.shape[1:3]", "False",
         "a plan of another map is used", "test_s3a_refuses_a_plan_of_another_map"),
        ("height, width, operands, backend, kernel_options)\n    dtype", "height, width, operands)\n    dtype",
         "a backend that is named is not used",
         "tests/attention/test_functional.py::test_the_backend_that_is_named_attends"),
    ),
    *mutate("s3a/nn/rotary.py", "tests/nn/test_rotary.py",
        ('torch.linspace(0, 1, head_dim // 4, dtype=torch.float64, device="cpu")',
         'torch.linspace(0, 1, head_dim // 4 + 1, dtype=torch.float64, device="cpu")[:-1]',
         "the frequencies end before 1 / 10000", "test_rotation_by_hand"),
        ("[rows.expand(-1, width, -1), columns.expand(height, -1, -1)]",
         "[columns.expand(height, -1, -1), rows.expand(-1, width, -1)]",
         "columns turn the first half of the pairs", "test_rotation_by_hand"),
        ("dtype=torch.float64", "dtype=None",
         "angles are as coarse as the default dtype", "test_rotation_does_not_depend_on_the_default_dtype"),
        ("odd * cosine + even * sine", "odd * cosine - even * sine",
         "it is no rotation", "test_rotation_by_hand"),
        ("x.unflatten(-1, (-1, 2)).unbind(-1)", "x.unflatten(-1, (2, -1)).unbind(-2)",
         "halves are pairs, not neighbours", "test_rotation"),
        ("turned.flatten(-2).to(x.dtype)", "turned.flatten(-2)",
         "bfloat16 becomes float32", "test_rotation_keeps_the_dtype"),
    ),
]

# --------------------------------------------------------------------------------------------------------
# What a run compared with itself does not show: resumed or not, on one process or two, it has the same fault
# --------------------------------------------------------------------------------------------------------

BLIND = [
    *mutate("s3a/training/trainer.py", "tests/training/test_ranks.py",
        ("        loader.load_state_dict(states[run.accelerator.process_index])\n", "",
         "a stream begins its epoch again after each stop",
         "tests/training/test_streaming.py::test_a_stream_that_was_killed_ends_with_the_same_bytes"),
        ("    if progress.step == 0 or not loader.state_dict():", "    if not loader.state_dict():",
         "other readers are said to see images again where nobody does",
         "tests/training/test_streaming.py::test_between_epochs_other_readers_change_nothing"),
        ("            failure = error\n", "            raise\n",
         "a full disk leaves the other processes waiting", "test_where_the_main_process_cannot_write_both_end"),
    ),
    *mutate("s3a/training/build.py", "tests/training/test_ranks.py",
        ("        elif theirs != first:\n", "        elif not theirs:\n",
         "processes train on other images", "test_processes_with_other_images_are_refused"),
    ),
    *mutate("s3a/training/trainer.py", "tests/training/test_steps.py",
        ("    if run.recipe.clip_grad is not None:\n", "    if False:\n",
         "gradients are not clipped", "test_the_optimizer_gets_gradients_of_the_norm_allowed"),
        ("count_steps(run, progress), run.accelerator.process_index)", "count_steps(run, progress), 0)",
         "every process draws the same", "tests/training/test_ranks.py::test_every_process_draws_for_itself"),
    ),
    *mutate("s3a/training/build.py", "tests/training/test_steps.py",
        ("        seed=recipe.seed,\n", "        seed=0,\n",
         "the order of the images is that of seed 0", "test_the_order_of_the_images_is_that_of_the_seed"),
    ),
    *mutate("s3a/training/tasks/classification.py", "tests/training/tasks/test_classification.py",
        ("CrossEntropyLoss(label_smoothing=recipe.label_smoothing)", "CrossEntropyLoss()",
         "labels are smoothed only where images are mixed", "test_mixed_targets_are_smoothed_and_their_loss_is_soft"),
        ("mixup_alpha=recipe.mixup,\n                cutmix_alpha=recipe.cutmix,",
         "mixup_alpha=recipe.cutmix,\n                cutmix_alpha=recipe.mixup,",
         "mixup and cutmix are swapped", "test_every_option_of_the_mixing_reaches_timm"),
        ("                switch_prob=recipe.mixup_switch,\n", "",
         "cutmix stands in for mixup half of the time, whatever the recipe says",
         "test_every_option_of_the_mixing_reaches_timm"),
        ("RandomErasing(recipe.random_erasing, ", "RandomErasing(0.5, ",
         "half of the images are erased, whatever the recipe says", "test_erasing_is_the_recipes"),
        ("            scale=recipe.crop_scale,\n", "",
         "crops are of timm's area", "test_every_option_of_the_augmentation_reaches_timm"),
        ("            ratio=recipe.crop_ratio,\n", "",
         "crops are of timm's aspect", "test_every_option_of_the_augmentation_reaches_timm"),
        ("hflip=recipe.horizontal_flip,", "hflip=0.5,",
         "half of the images are mirrored, whatever the recipe says",
         "test_every_option_of_the_augmentation_reaches_timm"),
        ("color_jitter=recipe.color_jitter,", "color_jitter=None,",
         "colours do not jitter", "test_every_option_of_the_augmentation_reaches_timm"),
        ("logits.topk(min(5, ", "logits.topk(min(4, ",
         "top-5 looks at four classes", "test_scores_are_counts_by_hand"),
    ),
]

# --------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------

TRAINING = [
    *mutate("s3a/training/trainer.py", "tests/training/test_steps.py",
        ("        finite = finite & norm.isfinite()\n", "        pass\n",
         "an infinite gradient is stepped along", "test_an_infinite_gradient_is_skipped_where_that_is_asked_for"),
        ("optimizer.found_inf = not_finite", "optimizer.found_inf = torch.zeros_like(not_finite)",
         "a step that is not finite reaches the weights",
         "test_an_infinite_gradient_is_skipped_where_that_is_asked_for"),
        ("    apply_gradient(run, outcome[2], buffers)\n",
         "    outcome.tolist()\n    apply_gradient(run, outcome[2], buffers)\n",
         "the host waits for the gradient before it has the weights changed",
         "tests/training/test_transfers.py::test_between_forward_and_update_the_host_reads_nothing"),
        ("    settle_step(run, progress)\n    model_state", "    model_state",
         "a checkpoint lacks the loss of its last step",
         "tests/training/test_dense_runs.py::test_stopped_and_killed_a_run_ends_with_the_same_bytes"),
        ("(choice,) = broadcast_object_list(chosen)", "(choice,) = chosen",
         "each process chooses its own checkpoint",
         "tests/training/test_ranks.py::test_all_processes_go_on_from_the_checkpoint_of_the_main_one"),
        ("if index == len(micro_batches) else", "if index == 1 else",
         "the first micro-batch is synchronised, not the last",
         "tests/training/test_ranks.py::test_all_processes_have_the_same_weights_after_every_step"),
        ("run.accelerator.no_sync(run.model):", "nullcontext():",
         "every micro-batch is synchronised",
         "tests/training/test_ranks.py::test_gradients_are_synchronised_in_the_last_micro_batch_alone"),
        ("stop=stop > 0", "stop=stop > 1",
         "all processes must be asked to stop",
         "tests/training/test_ranks.py::test_a_signal_to_one_process_stops_both_after_the_same_step"),
        ("    run.clock.restart()\n", "",
         "once it is due, a checkpoint is written at every step", "test_every_checkpoint_begins_the_minutes_anew"),
        ('if state["data"] != summarize_data(run) | run.task.config:',
         'if {**state["data"], "fingerprint": ""} != {**summarize_data(run), **run.task.config, "fingerprint": ""}:',
         "a run goes on with other images", "test_other_pixels_in_the_same_files_are_not_the_data_of_the_run"),
        ("    share_buffers(run)\n", "",
         "every process validates with its own statistics",
         "tests/training/test_ranks.py::test_all_processes_validate_with_the_same_statistics"),
        ("run.compute_loss(run.model, batch) / len(micro_batches)", "run.compute_loss(run.model, batch)",
         "the gradient grows with the micro-batches",
         "tests/training/test_trainer.py::test_accumulated_passes_are_one_step"),
        ("        run.ema.update(run.bare_model)\n", "        run.ema.update(run.shell)\n",
         "the average is of other weights", "tests/training/test_trainer.py::test_the_average_is_that_of_the_steps"),
        ("validate(run, progress, run.ema.module)", "validate(run, progress, run.bare_model)",
         "the average's score is that of the plain weights",
         "tests/training/tasks/test_task.py::test_what_a_task_scores_is_what_plain_code_scores"),
        ("return self.step - self.skipped - (", "return self.step - (",
         "skipped steps count as steps of loss 0",
         "tests/training/test_trainer.py::test_steps_that_are_not_finite_are_skipped_and_counted"),
        ("torch.where(not_finite > 0, before, buffer)", "buffer",
         "a skipped step leaves its statistics",
         "tests/training/test_trainer.py::test_steps_that_are_not_finite_are_skipped_and_counted"),
        ("run.train_loader.epoch(progress.epoch, first_step=progress.step)", "run.train_loader.epoch(progress.epoch)",
         "a resumed epoch begins with the first images again",
         "test_a_resumed_epoch_goes_on_with_the_images_that_are_left"),
        ("run.train_loader.epoch(progress.epoch, ", "run.train_loader.epoch(0, ",
         "every epoch has the order and the augmentation of the first",
         "test_every_epoch_and_step_has_images_and_a_learning_rate_of_its_own"),
        ("run.scheduler.step_update(count_steps(run, progress) + 1)",
         "run.scheduler.step_update(count_steps(run, progress))",
         "the learning rate of a step is that of the step before",
         "test_every_epoch_and_step_has_images_and_a_learning_rate_of_its_own"),
        ("run.scheduler.step(progress.epoch)", "run.scheduler.step(progress.epoch + 1)",
         "the learning rate of an epoch is that of the next one",
         "test_a_schedule_of_epochs_has_one_learning_rate_in_each"),
        ("                module.eval()\n", "                module.train()\n",
         "frozen statistics move", "tests/training/test_trainer.py::test_accumulated_passes_are_one_step"),
        ("        model.set_drop_path(rate)\n", "        model.set_drop_path(0.0)\n",
         "late drop path is none", "tests/training/test_trainer.py::test_a_late_drop_path_holds_for_the_last_epochs"),
        ('run.ema.module.load_state_dict(state["ema"])', "run.ema.module.load_state_dict(run.bare_model.state_dict())",
         "a resumed average begins anew", "test_a_run_resumes_with_all_that_it_saved"),
        ('state["model"], state["optimizer"])', 'state["model"], None)',
         "a resumed optimizer has forgotten its moments", "test_a_run_resumes_with_all_that_it_saved"),
        ("if name in origins and origins[name].metrics is progress.history[-1]:", "if name in origins:",
         "the best weights are the last ones", "test_each_weights_folder_holds_the_weights_of_its_epoch"),
        ("name = max((name for name in", "name = min((name for name in",
         "the worse of plain weights and average is published",
         "test_each_weights_folder_holds_the_weights_of_its_epoch"),
        ('if run.ema is not None and name.startswith("ema"):', 'if run.ema is not None and name == "ema":',
         "the best average's folder holds plain weights", "test_each_weights_folder_holds_the_weights_of_its_epoch"),
        ("if len(progress.unreadable) > most:", "if len(progress.unreadable) >= most:",
         "as many unreadable images as are allowed stop the run",
         "tests/training/test_trainer.py::test_unreadable_images_are_listed_up_to_the_limit"),
        ("most = int(run.recipe.max_bad_val_images * run.data.val.num_images)",
         "most = int(run.recipe.max_bad_images * run.data.val.num_images)",
         "the limit of training images holds for validation images",
         "tests/training/test_trainer.py::test_of_validation_images_none_may_be_unreadable_unless_allowed"),
        ("sums[:2] / run.accelerator.num_processes", "sums[:2]",
         "the loss grows with the processes",
         "tests/training/test_ranks.py::test_the_loss_of_a_step_is_the_mean_of_the_processes"),
        ("if task != type(run.task).__name__:", 'if task == "":',
         "another task takes a run over",
         "tests/training/tasks/test_task.py::test_a_run_is_not_taken_over_by_another_task"),
        ("            if progress.step == 0:\n                write_history(run, progress)\n", "",
         "nothing is there to watch before the end",
         "tests/training/test_trainer.py::test_a_run_learns_and_leaves_all_that_it_promises"),
        ("            save(run, progress)\n            fail_at_unreadable", "            fail_at_unreadable",
         "an epoch is lost to unreadable validation images",
         "tests/training/test_trainer.py::test_of_validation_images_none_may_be_unreadable_unless_allowed"),
    ),
    *mutate("s3a/training/transfers.py", "tests/training/test_transfers.py",
        ("recursively_apply(reserve, sent, computing)", "reserve(sent.images, computing)",
         "CUDA writes over noise and labels before they are read",
         "test_on_cuda_all_that_was_sent_is_kept_until_it_is_computed_with"),
    ),
    *mutate("s3a/training/build.py", "tests/training/test_build.py",
        ("    with accelerator.main_process_first():\n", "    with nullcontext():\n",
         "other processes go on before the folder is claimed",
         "tests/training/test_ranks.py::test_the_main_process_claims_the_folder_before_the_others_go_on"),
        ("weight_decay=recipe.weight_decay, fused", "weight_decay=0.05, fused",
         "weight decay is the default", "test_weight_decay_spares_biases_and_vectors"),
        ("recipe.ema_decay ** (recipe.batch_size / 512)", "recipe.ema_decay",
         "the average's decay does not follow the batch size",
         "tests/training/test_trainer.py::test_the_average_is_that_of_the_steps"),
        ("(recipe.num_workers + 1) // 2", "recipe.num_workers // 2",
         "a single worker is none for the validation images", "test_half_of_the_workers_decode_validation_images"),
        ("batch_size=recipe.batch_size // recipe.accumulate", "batch_size=recipe.batch_size",
         "--accumulate does not make an evaluation fit into memory",
         "test_validation_batches_are_as_large_as_the_passes_of_training"),
        ("        erasing=task.make_erasing(recipe),\n", "",
         "nothing is erased",
         "tests/training/tasks/test_classification.py::test_the_images_of_a_run_are_those_of_timms_whole_transform"),
        ("        accumulate=recipe.accumulate,\n", "",
         "a step is one micro-batch", "test_what_a_recipe_asks_of_model_and_loader_is_built"),
        ("        repeats=recipe.repeats,\n", "",
         "augmentation is not repeated",
         "tests/training/test_steps.py::test_the_order_of_the_images_is_that_of_the_seed"),
        ("    ema.module = convert_model(recipe, ema.module, accelerator)\n", "",
         "the average is evaluated uncompiled", "test_the_average_is_compiled_like_the_model"),
        ("    recipe = replace(recipe, backend=None)\n", "",
         "weights name the backend of their run", "test_the_backend_is_that_of_the_run_and_not_of_its_weights"),
        ("            compile_model(model)  #", "            pass  #",
         "nothing is compiled",
         "tests/training/test_trainer.py::test_a_compiled_run_learns_and_saves_ordinary_weights"),
        ("mixed_precision=recipe.precision,", "mixed_precision=None,",
         "precision is ignored", "test_what_a_recipe_asks_of_model_and_loader_is_built"),
        ("clock=CheckpointClock(recipe.checkpoint_every),", "clock=CheckpointClock(None),",
         "no checkpoint comes between epochs",
         "tests/training/test_steps.py::test_every_checkpoint_begins_the_minutes_anew"),
        ("seed_step(recipe.seed, step=0, process=-1)", "seed_step(0, step=0, process=-1)",
         "the first weights are those of seed 0", "test_the_first_weights_are_those_of_the_seed"),
        ("        fake_quantize(model, recipe.quantize)\n", "        pass\n",
         "training does not know of the quantization", "test_a_run_for_a_quantization_scheme_rounds_as_it_trains"),
        ("    check_folder(recipe)\n    task", "    task",
         "a folder of another run is found after the data is loaded",
         "test_a_folder_of_another_run_is_refused_before_anything_is_built"),
    ),
    *mutate("s3a/training/processes.py", "tests/training/test_processes.py",
        ('names = ["SIGTERM", "SIGUSR1", "SIGINT"]', 'names = ["SIGTERM"]',
         "SIGTERM alone is noted", "test_a_signal_is_noted_and_the_handlers_are_put_back"),
        ("        if os.getpid() != self.process:", "        if False:",
         "workers answer Ctrl-C too", "test_workers_leave_ctrl_c_to_their_run"),
        ("        if self.was_interrupted:", "        if self.noted:",
         "any request before makes the first Ctrl-C end the run",
         "test_the_first_ctrl_c_after_another_request_interrupts_nothing"),
        ("self.wakeup, self.others_are_woken = signal.set_wakeup_fd(-1), False", "self.others_are_woken = False",
         "a signal in a run ends it as if it had not begun",
         "test_signals_that_end_a_command_early_are_left_to_it_until_the_run_begins"),
        ("cudnn.benchmark = cudnn_benchmark and not deterministic", "cudnn.benchmark = cudnn_benchmark",
         "cuDNN tries its algorithms in a deterministic run", "test_kernels_are_chosen_for_the_time_of_a_run"),
        ("            raise KeyboardInterrupt\n", "            pass\n",
         "a second Ctrl-C is ignored", "test_ctrl_c_is_answered_at_once_and_interrupts_the_second_time"),
        ("            signal.signal(number, handler)\n", "            pass\n",
         "the handlers stay after the run", "test_a_signal_is_noted_and_the_handlers_are_put_back"),
        ("self.launcher not in (None, os.getppid())", "self.launcher is None",
         "the end of the launcher is not noticed", "test_the_end_of_a_launcher_asks_to_stop"),
        ("combine_seeds(seed, step, process + 1)", "combine_seeds(seed, process + 1)",
         "every step draws the same", "test_drawing_does_not_depend_on_the_steps_before"),
        ("    np.random.seed(state)\n", "",
         "numpy's draws depend on the steps before", "test_drawing_does_not_depend_on_the_steps_before"),
        ("max(1, cores // processes)", "cores",
         "processes share no cores", "test_processes_share_the_cores"),
    ),
    *mutate("s3a/training/checkpoints.py", "tests/training/test_checkpoints.py",
        ("    for path in (*folder.iterdir(), folder):\n        flush(path)\n", "",
         "a checkpoint has its name before its files are on the disk",
         "test_files_are_on_the_disk_before_a_checkpoint_has_its_name"),
        ("    flush(folder.parent)\n", "",
         "the name of a checkpoint may be lost", "test_files_are_on_the_disk_before_a_checkpoint_has_its_name"),
        ('folder.parent.glob(".partial-step-*")', "folder.parent.glob(partial.name)",
         "a half-written checkpoint of another name stays for good",
         "test_what_a_killed_run_left_half_written_is_removed"),
        ("[keep:]", "[keep + 1 :]",
         "a checkpoint more than asked for stays", "test_the_newest_few_stay"),
        ('parent.glob("step-[0-9]*")', 'parent.glob("*")',
         "folders of the user are taken for checkpoints", "test_folders_of_the_user_are_left_alone"),
        ("if hash_file(folder / name) != written:", "if hash_file(folder / name)['bytes'] != written['bytes']:",
         "altered bytes are not noticed", "test_a_damaged_checkpoint_is_said_and_skipped"),
        ("    if expected not in (None, manifest):", "    if False:",
         "processes go on from different checkpoints of one name",
         "tests/training/test_ranks.py::test_a_process_that_cannot_read_the_checkpoint_of_the_main_one_ends_both"),
        ('groups = [group | computes for group in optimizer_state["param_groups"]]',
         'groups = optimizer_state["param_groups"]',
         "a checkpoint decides how the optimizer computes",
         "tests/training/test_steps.py::test_an_older_checkpoint_leaves_the_optimizer_fused"),
        ("time.monotonic() - self.written >= self.seconds", "time.monotonic() - self.written >= self.seconds / 60",
         "minutes are seconds", "test_a_clock_of_minutes"),
        ("step % self.steps == 0", "step % self.steps == 1",
         "checkpoints come a step late", "test_a_clock_of_minutes"),
        ('{"dict": [[key, pack(value, tensors)] for key', '{"dict": [[str(key), pack(value, tensors)] for key',
         "the integer keys of optimizers become strings", "test_an_optimizer_goes_on_from_its_checkpoint"),
        ("        shutil.rmtree(partial, ignore_errors=True)\n        if not", "        if not",
         "a full disk stays full of half a checkpoint", "test_a_write_that_stops_half_way_leaves_the_last_checkpoint"),
    ),
    *mutate("s3a/training/model.py", "tests/training/test_build.py",
        ("        cast(TimmModel, model).set_grad_checkpointing()\n", "        pass\n",
         "activations are kept in spite of the recipe", "test_what_a_recipe_asks_of_model_and_loader_is_built"),
    ),
    *mutate("s3a/training/tasks/task.py", "tests/training/test_build.py",
        ('"crop_pct": recipe.crop_pct}', '"crop_pct": 1.0}',
         "the evaluation crops otherwise than the recipe says", "test_what_a_recipe_asks_of_model_and_loader_is_built"),
        ("            if self.fit_head(model):\n", "            if False:\n",
         "fine-tuned weights keep their head", "test_fine_tuning_on_other_classes_and_another_size"),
    ),
    *mutate("s3a/training/model.py", "tests/training/tasks/test_segmentation.py",
        ("        check_architecture(recipe, recipe.weights)\n        classifier", "        classifier",
         "weights of a dense model are taken for a backbone's", "test_what_is_of_another_task_is_refused"),
        ("        check_architecture(recipe, recipe.weights)\n        model", "        model",
         "a dense model's weights are said to have no drop path", "test_what_is_of_another_task_is_refused"),
    ),
    *mutate("s3a/training/build.py", "tests/training/tasks/test_segmentation.py",
        ("return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)",
         "return self.steps_per_epoch",
         "a run of some steps ends with its epoch", "test_a_number_of_steps_ends_in_the_middle_of_an_epoch"),
    ),
    *mutate("s3a/training/tasks/task.py", "tests/training/tasks/test_segmentation.py",
        ('            ignore_zero=getattr(options, "ignore_zero", False),\n', "",
         "--ignore-zero is left unheeded", "test_what_is_of_another_task_is_refused"),
        ("            streaming=options.streaming,\n", "",
         "--streaming is left unheeded", "test_what_is_of_another_task_is_refused"),
    ),
    *mutate("s3a/training/tasks/segmentation.py", "tests/training/tasks/test_segmentation.py",
        ("labels[known] * self.num_outputs + probabilities.argmax(1)[known]",
         "probabilities.argmax(1)[known] * self.num_outputs + labels[known]",
         "the confusion matrix lies on its side", "test_scores_are_scikit_learns"),
        ("-chosen[known].clamp(min=1e-12).log()", "-chosen.clamp(min=1e-12).log()",
         "ignored pixels have a validation loss", "test_scores_are_scikit_learns"),
        ("right[union > 0] / union[union > 0]", "right / union.clamp(min=1)",
         "classes that are nowhere have an IoU of 0", "test_scores_are_scikit_learns"),
        ("union = true + predicted - right", "union = true + predicted",
         "the IoU is half of Dice's coefficient", "test_miou_by_hand"),
        ("batch.images[same, :, :height, :width]", "batch.images[same]",
         "predictions see the padding for their neighbours", "test_neighbours_in_a_batch_do_not_matter"),
        ("return total / len(views)", "return total",
         "probabilities of several views are summed", "test_multi_scale_is_the_mean_over_resized_images"),
        ("model(seen.flip(3)).flip(3) if mirrored", "model(seen.flip(3)) if mirrored",
         "predictions of mirror images stay mirrored", "test_flip_is_the_mean_of_an_image_and_its_mirror_image"),
        ("SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)", "SCALES = (0.5, 0.75, 1.0)",
         "several sizes are not mmsegmentation's", "test_multi_scale_is_the_mean_over_resized_images"),
        ("short=round(max(self.scales) * data_config", "short=round(data_config",
         "an evaluation at several sizes is at smaller ones", "test_multi_scale_is_the_mean_over_resized_images"),
        ("logits.float()[:, :, :height, :width]", "logits.float()",
         "predictions of padding are stretched over the image", "test_padding_for_compiled_code_is_cut_off"),
        ('reduction="sum") / labels.numel()', 'reduction="mean")',
         "the loss is the mean over known pixels", "test_the_loss_is_the_mean_over_all_pixels"),
        ("loss + self.auxiliary_weight * average_loss(", "loss + average_loss(",
         "the auxiliary loss has the whole weight", "test_the_loss_is_the_mean_over_all_pixels"),
        ("COMPILED_MULTIPLE if recipe.compile else 1", "1",
         "each size of an image is compiled",
         "tests/training/test_dense_recipes.py::test_compiled_runs_pad_to_few_sizes"),
        ("probabilities.argmax(0).cpu().numpy())", 'example.target["label_map"].numpy())',
         "examples show the truth twice", "test_examples_show_the_truth_and_the_prediction"),
    ),
    *mutate("s3a/training/tasks/dense_transforms.py", "tests/training/tasks/test_dense_transforms.py",
        ("min(short / min(height, width), long / max(height, width))", "short / min(height, width)",
         "the longer side has no limit", "test_sizes_by_hand"),
        ("int(height * factor + 0.5)", "int(height * factor)",
         "heights are rounded down", "test_sizes_by_hand"),
        ('return name in ("label_map", "boxes", "masks")', 'return name in ("boxes", "masks")',
         "label maps stay where they were", "test_crops_are_parts_of_the_image_and_of_its_map"),
        ("name: F.horizontal_flip(each) if is_spatial(name) else each", "name: each",
         "objects are not mirrored with their image", "test_boxes_and_masks_follow_their_objects"),
        ("            image, target = mirror(image, target)\n        if self.distorts",
         "            pass\n        if self.distorts",
         "no crop is mirrored", "test_crops_are_parts_of_the_image_and_of_its_map"),
        ("torch.full((self.side, self.side), IGNORED, dtype=torch.uint8)",
         "torch.zeros((self.side, self.side), dtype=torch.uint8)",
         "padding of crops is of class 0", "test_what_is_smaller_than_the_crop_is_padded_and_ignored_there"),
        ("self.side, self.side, self.color)", "self.side, self.side, (0, 0, 0))",
         "crops are padded with black", "test_what_is_smaller_than_the_crop_is_padded_and_ignored_there"),
        ("self.side * random.uniform(*self.scale)", "self.side * self.scale[0]",
         "all images have the smallest size", "test_factors_are_drawn_from_the_whole_range"),
        ("for _ in range(CROP_TRIES):", "for _ in range(1):",
         "crops of one class are taken", "test_no_class_has_more_than_its_share_of_a_crop"),
        ("CROP_TRIES = 10", "CROP_TRIES = 11",
         "a crop more is tried", "test_an_image_of_one_class_ends_after_ten_crops"),
        ("counts.max() < self.largest_class", "counts.max() <= self.largest_class",
         "a class may have exactly its share", "test_no_class_has_more_than_its_share_of_a_crop"),
        ("minlength=IGNORED + 1)[:IGNORED]", "minlength=IGNORED + 1)",
         "ignored pixels are a class of a crop", "test_ignored_pixels_have_no_share"),
        ("            image = DISTORTION(image)\n", "            pass\n",
         "no photometric distortion", "test_contrast_is_distorted"),
        ('("hue", 0.1))', '("hue", 0.5))',
         "hues are any", "test_colors_are_distorted_and_channels_stay"),
        ("image = DISTORTION(image)", "image = F.permute_channels(DISTORTION(image), [1, 2, 0])",
         "distortion changes the order of channels", "test_colors_are_distorted_and_channels_stay"),
        ("LONGEST * self.short)", 'float("inf"))',
         "validation images are as long as they like", "test_the_longer_side_of_a_view_is_at_most_four_shorter_ones"),
        ("padded = [-(-side // self.multiple) * self.multiple for side in size]", "padded = list(size)",
         "views are not padded for compiled code", "test_a_view_is_the_whole_image_beside_its_map_as_it_is"),
        ('        target = select_objects(target, ~target["is_crowd"])\n', "",
         "crowds are trained as objects", "test_crowds_are_left_out"),
        ("random.choice(self.short_sides), self.long_side", "self.short_sides[0], self.long_side",
         "short sides are not drawn", "test_short_sides_are_drawn_and_the_longer_side_is_limited"),
        ("(corners[:, 2:] - corners[:, :2] > SMALLEST_SIDE).all(1)", "torch.ones(len(corners), dtype=torch.bool)",
         "objects outside of a crop stay", "test_parts_of_objects_stay_in_a_crop_and_others_leave"),
        ("if self.crops and random.random() < 0.5:", "if self.crops:",
         "all images are cropped", "test_half_of_the_images_are_cropped"),
        ("SMALLEST_CROP, LARGEST_CROP = 384, 600", "SMALLEST_CROP, LARGEST_CROP = 384, 500",
         "crops are not DETR's", "test_crops_have_the_sizes_of_detr"),
        ('"original_size": (image.height, image.width),', '"original_size": size,',
         "the size of an image before it was resized is forgotten",
         "test_a_detection_view_says_its_size_and_the_one_before"),
    ),
    *mutate("s3a/training/dense_recipe.py", "tests/training/test_dense_recipes.py",
        ("self.recipe.find_rate(max(t - 1, 0),", "self.recipe.find_rate(t,",
         "each step has the rate of the next, and the last none", "test_poly_is_torchs"),
        (" ** self.decay_power", "",
         "poly is linear", "test_poly_is_torchs"),
        ("return self.steps or self.epochs * steps_per_epoch", "return self.epochs * steps_per_epoch",
         "a number of steps is left unheeded", "test_poly_is_torchs"),
        ("step >= epoch * steps_per_epoch", "step > epoch * steps_per_epoch",
         "the rate falls a step late", "test_steps_are_torchs"),
        ("share *= self.warmup_start", "share = self.warmup_start",
         "the rate does not fall in the warm-up", "test_the_warm_up_multiplies_what_the_step_would_have"),
        ("(1 - self.warmup_start) * step / self.warmup_steps", "step / self.warmup_steps",
         "the warm-up ends above the rate", "test_the_warm_up_multiplies_what_the_step_would_have"),
        ("            warmup_steps=round(share * self.warmup_steps),\n", "",
         "a short dense run is warm-up alone", "test_fewer_epochs_shorten_the_phases_of_a_named_recipe"),
        ("            steps=None,\n", "",
         "a short run has all the steps", "test_fewer_epochs_shorten_the_phases_of_a_named_recipe"),
        ("        return self.learning_rate\n", "        return self.learning_rate * self.batch_size / 512\n",
         "the rate of dense recipes follows the batch size", "test_the_peak_does_not_follow_the_batch_size"),
        ('pyramid = super().head_args if self.head == "semantic_fpn" else {}', "pyramid: dict[str, Any] = {}",
         "--pyramid-dim is left unheeded", "test_recipes_build_the_authors_heads"),
        ('if self.num_proposals is not None else ()', 'if self.num_proposals is None else ()',
         "--num-proposals is left unheeded", "test_options_reach_the_heads_of_detectors"),
        ("if not 0 < low <= high:", "if not 0 < low:",
         "the smallest factor may be the largest", "test_bad_options_are_one_line"),
        ("list(self.decay_epochs) != sorted({*self.decay_epochs})", "False",
         "the rate may fall twice in an epoch", "test_bad_options_are_one_line"),
    ),
    *mutate("s3a/training/dense_recipes.py", "tests/training/test_dense_recipes.py",
        ('weight_decay=1e-4 if head == "retinanet" else 0.05', "weight_decay=0.05",
         "RetinaNet has Mask R-CNN's weight decay",
         "test_every_field_of_a_named_recipe_is_as_written_or_the_default"),
        ("return -(-steps // (ADE20K_IMAGES // 16))", "return steps // (ADE20K_IMAGES // 16)",
         "the last steps are in no epoch", "test_every_field_of_a_named_recipe_is_as_written_or_the_default"),
    ),
    *mutate("s3a/training/named_recipes.py", "tests/training/test_dense_recipes.py",
        ("        if name in table:\n", "        if False:\n",
         "a recipe of another command is unknown", "test_bad_options_are_one_line"),
        ("find_late_name(options, str(error), self.recipes)", "find_late_name(options, str(error))",
         "recipes behind options are looked for in another table", "test_bad_options_are_one_line"),
    ),
    *mutate("s3a/training/evaluation.py", "tests/training/test_evaluation.py",
        ("num_scored = (batch.labels >= 0).sum()", "num_scored = (batch.labels >= -1).sum()",
         "padding counts as images",
         "tests/training/test_trainer.py::test_of_validation_images_none_may_be_unreadable_unless_allowed"),
        ("    model.eval()\n", "",
         "models are evaluated as they train", "test_the_weights_evaluate_to_what_training_said"),
        ("if not math.isfinite(score):", "if score == math.inf:",
         "a NaN is a score", "tests/training/tasks/test_task.py::test_a_score_that_is_not_finite_stops_the_run"),
        ("    model.train(was_training)\n    check_count", "    check_count",
         "a model is left in evaluation mode", "test_a_model_is_left_as_it_is"),
        ("    if num_read == loader.num_images:\n", "    if True:\n",
         "images that are missing are not missed",
         "tests/training/test_streaming.py::test_a_split_with_other_images_than_it_said_is_refused"),
    ),
    *mutate("recipes/evaluate.py", "tests/training/test_evaluation.py",
        ("    task.check_weights(model, other_label_names=options.other_label_names)\n", "",
         "weights are evaluated on other classes", "test_evaluation_refuses_data_of_other_classes"),
    ),
    *mutate("s3a/training/run_folder.py", "tests/training/test_run_folder.py",
        ("highest = max(history, key", "highest = min(history, key",
         "the best epoch is the worst", "test_each_weights_folder_knows_its_epoch"),
        ("highest = max(history, key", "highest = max(history[::-1], key",
         "of equal epochs the last is the best", "test_each_weights_folder_knows_its_epoch"),
        ("keys = sorted((ours.keys() | theirs.keys()) - set(INCIDENTAL))", "keys = sorted(ours.keys() | theirs.keys())",
         "a run cannot move to another machine", "test_how_the_work_is_spread_is_not_another_recipe"),
        ("default=str)) | theirs", "default=str)) and theirs",
         "a run does not go on with a later version that has more options",
         "test_a_run_goes_on_that_is_older_than_an_option"),
        ("if changed:", "if len(changed) > 3:",
         "a recipe may change under a run", "test_a_folder_of_another_recipe_is_left_alone"),
        ("for column, count in counts.items() if count}", "for column, count in counts.items()}",
         "counts of 0 are columns", "test_a_line_of_metrics_has_its_columns_in_order_and_comes_back"),
        ("        if strangers:\n", "        if len(strangers) > 1:\n",
         "a run is written among other files", "test_other_files_are_left_alone"),
    ),
    *mutate("s3a/training/recipe.py", "tests/training/test_recipe.py",
        ("min_lr=self.min_learning_rate,", "min_lr=0.0,",
         "the cosine ends at 0",
         "tests/training/test_trainer.py::test_the_learning_rate_follows_batch_size_warm_up_and_cosine"),
        ("        warmup_epochs=self.warmup_epochs,", "        warmup_epochs=0,",
         "there is no warm-up",
         "tests/training/test_trainer.py::test_the_learning_rate_follows_batch_size_warm_up_and_cosine"),
        ("self.learning_rate * self.batch_size / 512", "self.learning_rate",
         "the learning rate does not follow the batch size", "test_the_learning_rate_follows_the_global_batch"),
        ("epoch >= self.total_epochs - self.late_drop_path[1]", "epoch >= self.epochs - self.late_drop_path[1]",
         "late drop path does not count the cooldown", "test_late_drop_path_counts_the_cooldown"),
        ("if not 0 < low <= high <= most:", "if not 0 < low <= most:",
         "a crop may be larger than it is at most", "test_numbers_out_of_their_range_are_refused"),
    ),
    *mutate("s3a/training/named_recipes.py", "tests/training/test_named_recipes.py",
        ("repeats=3,", "repeats=2,",
         "a named recipe is not the paper's", "test_every_field_of_a_named_recipe_is_as_written_or_the_default"),
        ("        min_learning_rate=5e-6,\n", "",
         "the learning rate rises while weights are fine-tuned at 384 px",
         "test_fine_tuning_at_384_keeps_its_learning_rate"),
        ('    **{f"{model}_384": partial(svit_384, model) for model in SVIT},\n', "",
         "a published top-1 has no recipe", "tests/test_published.py::test_every_published_top1_has_a_recipe"),
    ),
    *mutate("s3a/training/recipe.py", "tests/training/test_named_recipes.py",
        (" and given.schedule is None:", ":",
         "a schedule that is given is replaced",
         "test_phases_that_are_given_stay_and_are_refused_where_they_do_not_fit"),
        ('dataclasses.replace(self, schedule="step").change_epochs', "self.change_epochs",
         "a short run of a long recipe has no warm-up", "test_fewer_epochs_shorten_the_phases_of_a_named_recipe"),
    ),
    *mutate("s3a/training/recipe.py", "tests/tools/test_compare.py",
        ("warmup = share * self.warmup_epochs", "warmup = self.warmup_epochs",
         "the warm-up does not keep its share", "test_equal_compute"),
    ),
    *mutate("s3a/training/tasks/classification.py", "tests/training/tasks/test_classification.py",
        ("self.criterion = SoftTargetCrossEntropy()",
         "self.criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)",
         "mixed labels are smoothed twice", "test_mixed_targets_are_smoothed_and_their_loss_is_soft"),
        ("return recipe.mixup > 0 or recipe.cutmix > 0", "return recipe.mixup > 0",
         "cutmix alone mixes nothing", "test_one_kind_of_mixing_alone_mixes"),
        ('reduction="none", ignore_index=-1)', 'reduction="none")',
         "padding has a loss", "test_scores_are_counts_by_hand"),
        ('("label_names") == self.data.label_names\n', '("label_names") is not None\n',
         "fine-tuned weights keep the head of other classes",
         "tests/training/test_build.py::test_fine_tuning_on_other_classes_and_another_size"),
    ),
]

# --------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------

DATA = [
    *mutate("s3a/data/slices.py", "tests/data/test_slices.py",
        ("(self.process_index * self.accumulate + part) * size",
         "(part * self.num_processes + self.process_index) * size",
         "a process has its micro-batches in other places", "test_training_is_cut_as_the_example_says"),
        ("return self.num_images // self.batch_size", "return -(-self.num_images // self.batch_size)",
         "an epoch has a batch that is not whole",
         "tests/data/test_loaders.py::test_an_epoch_has_whole_batches_of_different_images"),
        ("return -(-left // self.num_processes)", "return left // self.num_processes",
         "the last images are not evaluated", "test_evaluation_is_cut_as_the_example_says"),
        ("end = min((number + 1) * self.batch_size, self.num_images)", "end = (number + 1) * self.batch_size",
         "rows behind the last one are evaluated", "test_every_position_is_in_one_slice"),
    ),
    *mutate("s3a/data/batches.py", "tests/data/test_loaders.py",
        ("(0, width - image.shape[-1], 0, height - image.shape[-2])",
         "(width - image.shape[-1], 0, height - image.shape[-2], 0)",
         "images leave their targets where they are padded",
         "test_targets_go_through_the_transform_with_their_images"),
        ("positions % self.repeats) * self.images.num_images + indices",
         "positions % self.repeats) * self.images.num_images + positions",
         "augmentation depends on the place in the epoch", "test_augmentation_follows_the_documented_draw"),
        ("(epoch * self.repeats + positions % self.repeats)", "(epoch * self.repeats)",
         "the copies of an image are augmented alike", "test_repeats_are_side_by_side_and_augmented_apart"),
        ("        torch.set_rng_state(states[2])\n", "",
         "the loader advances the model's generator", "test_loaders_leave_the_global_generators_alone"),
        ("    np.random.seed(seed)\n", "",
         "augmentations that draw by numpy are not those of the seed", "test_a_step_is_the_same_however_it_is_cut"),
        ("decoded, label = black, -1", "decoded, label = black, row.label",
         "an image that cannot be read is scored", "test_evaluation_marks_the_unreadable"),
        ("labels + [-1] * padding", "labels + [0] * padding",
         "padding is scored as class 0", "test_few_images_for_many_processes_are_padded"),
        ("with keep_generators(), silence_pillow():", "with keep_generators():",
         "a run prints Pillow's warnings of broken files, again and again",
         "tests/data/test_images.py::test_loaders_refuse_images_of_many_pixels_without_a_warning"),
        ("default_rng((seed, epoch)).permutation(num_images)", "default_rng(seed).permutation(num_images)",
         "all epochs have one order", "test_the_order_follows_seed_and_epoch_alone"),
        ("            tried.clear()\n", "",
         "a run ends at its thousandth broken image, wherever these lie",
         "tests/data/test_stream.py::test_broken_images_end_a_run_where_they_are_neighbours"),
        ("self.slices.process_index + self.slices.num_processes * (number % self.num_readers)",
         "self.slices.process_index + number % self.num_readers",
         "two processes read the same shards",
         "tests/data/test_stream.py::test_an_epoch_of_even_shards_has_every_image_once[2-3-4]"),
        ("        if place is not None:\n", "        if self._draws is None:\n",
         "an epoch that is begun again goes on where it was left",
         "tests/data/test_stream.py::test_an_epoch_that_is_left_begins_again[webdataset-2]"),
        ("draw_erased(self.erasing, len(samples) - 1, ", "draw_erased(self.erasing, 0, ",
         "one image has all that is erased",
         "tests/data/test_pixels.py::test_a_loader_draws_what_is_erased_behind_the_transform"),
    ),
    *mutate("s3a/data/erasing.py", "tests/data/test_pixels.py",
        ("noise.expand(self.shape[0], height, width)", "noise",
         "a colour that stands for a rectangle is one pixel of it", "test_what_is_erased_is_what_timm_erases"),
        ("        start += part.numel()\n", "",
         "every rectangle has the noise of the first", "test_what_is_erased_is_what_timm_erases"),
    ),
    *mutate("s3a/data/pixels.py", "tests/data/test_pixels.py",
        (".div_(255)", ".div_(256)",
         "white is less than 1", "test_pixels_become_what_timms_transforms_make_of_them"),
        ("images = images.clone()", "pass",
         "what is erased changes the loader's images", "test_what_is_erased_is_what_timm_erases"),
        (", memory_format=torch.contiguous_format", "",
         "a network gets images that lie channels last", "test_pixels_become_what_timms_transforms_make_of_them"),
        ("if self._mean.device != pixels.device:", "if True:",
         "mean and std are copied for each batch", "test_a_device_gets_mean_and_std_once_and_reads_nothing_back"),
        ("elif not images.is_floating_point():", "elif False:",
         "integers that are no pixels reach the model", "test_images_that_cannot_be_normalised_are_refused"),
    ),
    *mutate("s3a/data/loaders.py", "tests/data/test_loaders.py",
        ("        signal.signal(number, signal.SIG_IGN)\n", "        pass\n",
         "a signal to all processes of a run kills its workers", "test_workers_outlive_the_signals_of_their_run"),
        ("number = first_step * self.accumulate\n", "number = first_step\n",
         "an epoch goes on at a micro-batch, not at a step", "test_an_epoch_goes_on_where_it_was_left"),
        ("signal.signal(signal.SIGCHLD, signal.SIG_DFL)", "pass",
         "a run ends with torch's traceback of the workers that it killed",
         "test_workers_that_are_left_at_the_end_of_a_process_end_silently"),
        ("        generator=torch.Generator(),\n", "",
         "iterating advances the model's generator", "test_loaders_leave_the_global_generators_alone"),
        ("{turn: self._places[turn % self.num_readers] for turn in turns}", "dict.fromkeys(turns, START)",
         "a stream that goes on begins with its first shards",
         "tests/data/test_stream.py::test_an_epoch_goes_on_exactly_where_it_was_left[1-1-1-0]"),
        ("min(num_workers, max(1, images.num_shards // num_processes))", "num_workers",
         "workers without shards are started",
         "tests/data/test_stream.py::test_more_workers_than_shards_are_not_started"),
        ("keep_workers=False", "keep_workers=True",
         "workers of an evaluation stay behind", "test_workers_of_an_evaluation_end_with_it"),
        ("if not 0 <= first_step <= self.steps_per_epoch:", "if not 0 <= first_step:",
         "an epoch may go on behind its end", "test_steps_that_an_epoch_does_not_have_are_refused"),
        ("except (DataError, OSError, RuntimeError) as error:", "except (DataError, RuntimeError) as error:",
         "a shard that is taken away is a traceback", "test_a_shard_that_is_taken_away_is_said_in_one_line"),
    ),
    *mutate("s3a/data/images.py", "tests/data/test_loaders.py",
        ("(row.index + offset) % self.num_images", "row.index + offset",
         "the last image has no substitute", "test_replacement_goes_round"),
    ),
    *mutate("s3a/data/stream.py", "tests/data/test_stream.py",
        ("default_rng((seed, epoch)).permutation(self.num_shards)", "default_rng(seed).permutation(self.num_shards)",
         "a reader has the same shards in all epochs", "test_epochs_deal_the_shards_anew"),
        ("default_rng((seed, epoch, passes, block[0].index))", "default_rng((seed, epoch, block[0].index))",
         "another pass has the order of the first", "test_a_reader_that_has_come_to_its_end_begins_another_pass"),
        ("range(used, repeats * len(block))", "range(repeats * len(block))",
         "a block is begun again after each stop", "test_behind_any_place_come_the_same_draws"),
        ("                rows.load_state_dict(shards)\n", "                pass\n",
         "a stream begins again after each stop", "test_behind_any_place_come_the_same_draws"),
        ("row.index, position % repeats)", "row.index)",
         "the copies of an image are augmented alike", "test_in_a_pass_readers_have_every_row_once"),
        ("        if share.index < self.num_shards:\n", "        if True:\n",
         "a reader without shards evaluates those of another", "test_evaluation_has_every_image_once[webdataset-5-2]"),
        ("if known is not None and num_rows != known:", "if known is not None and num_rows > known:",
         "a shard that shrinks is read twice", "test_a_shard_that_changes_is_named[shorter-0]"),
        ("if label is None or not 0 <= label < self.num_classes:", "if label is None:",
         "a label may be that of no class", "test_a_label_that_is_no_class_is_named"),
    ),
    *mutate("s3a/data/decode.py", "tests/data/test_decode.py",
        ("        ImageOps.exif_transpose(upright, in_place=True)\n", "",
         "photographs lie on their side", "test_exif_orientation"),
        ("(pixels >> 8)", "(pixels & 255)",
         "the lower eight of sixteen bits are taken", "test_sixteen_bits_keep_their_range"),
        ("        gray.info = dict(image.info)\n", "",
         "images of sixteen bits lie on their side", "test_exif_orientation_of_sixteen_bits"),
        ('image.convert("RGBA") if "transparency" in image.info else image', "image",
         "transparency is a colour", "test_images_of_every_kind_are_read_as_they_look"),
        ("except Image.DecompressionBombError as error:", "except MemoryError as error:",
         "a decompression bomb ends the run", "test_more_pixels_than_pillow_allows_are_unreadable"),
        ("            check_pixels(image.width * image.height)\n", "",
         "images of up to 179 megapixels are decoded", "test_a_small_file_of_many_pixels_is_refused_without_a_warning"),
        ('        warnings.filterwarnings("ignore", module=r"PIL\\.\\w+Plugin$")\n', "",
         "every photograph with broken metadata prints a warning",
         "test_warnings_about_metadata_are_not_repeated_for_every_image"),
        ("if not stat.S_ISREG(status.st_mode):", "if stat.S_ISDIR(status.st_mode):",
         "a device is read without end", "test_what_is_no_file_is_not_opened[device]"),
        ("        check_size(status.st_size)\n", "",
         "a file of any size is read", "test_files_of_too_many_bytes_are_unreadable"),
    ),
    *mutate("s3a/data/images.py", "tests/data/test_images.py",
        ("        if self.paths:\n", "        if True:\n",
         "a row that others wrote may name any file of this machine", "test_paths_in_shards_are_not_opened[False]"),
    ),
    *mutate("s3a/data/local.py", "tests/data/test_local.py",
        ("{path[start:]!r}), {size}, {label})", "{path[start:]!r}), {label})",
         "the fingerprint of a folder does not know of sizes", "test_fingerprints_change_with_a_folder"),
        ("{path[start:]!r}", "{path!r}",
         "a folder that moves is another one", "test_fingerprints_change_with_a_folder"),
        ("in sorted(chain(*columns)))", "in chain(*columns))",
         "runs on folders with a class `cat` and a class `cat-2` do not resume",
         "test_order_and_fingerprint_are_those_of_torchvision[False]"),
        ("for _, images in sorted(found))", "for _, images in found)",
         "images of deeper folders come in another order",
         "test_order_and_fingerprint_are_those_of_torchvision[False]"),
        ("follow_link(entry.path, way) if entry.is_symlink() else way", "way",
         "a link to a folder above it is followed for ever", "test_a_link_to_a_folder_above_it_is_named[..]"),
        ("way = (*way, os.path.realpath(Path(path).parent))", "way = (os.path.realpath(Path(path).parent),)",
         "links that lead to each other's folders are followed for ever",
         "test_links_that_lead_to_each_other_s_folders_are_named"),
        ('unicodedata.normalize("NFC", name.lower())', "name.lower()",
         "two Unicode forms of a name are two classes",
         "test_class_names_that_other_file_systems_take_for_one_are_named"),
        ("        if error.errno not in (errno.ENOENT, errno.ELOOP):\n            raise\n", "",
         "images in a folder that may not be entered have no size", "test_a_file_whose_size_may_not_be_known_is_named"),
        ("test_size=360, random_state=0", "test_size=360, random_state=1",
         "other digits are held out", "test_digits_are_those_of_scikit_learn"),
        ("(16 + i * size for i in range(count))", "(8 + i * size for i in range(count))",
         "pixels of Fashion-MNIST are read from its header on", "test_fashion_mnist_is_read_from_idx_files"),
        ("    check_classes(data_dir, splits)\n", "",
         "classes may differ between the splits", "test_a_class_missing_from_a_split_is_named"),
    ),
    *mutate("s3a/data/parquet.py", "tests/data/test_shards.py",
        ("read_class_names(data_dir) or find_class_names(label_features, every_label",
         "find_class_names(label_features, every_label",
         "classes.txt is not read", "test_classes_are_named_by_a_file"),
    ),
    *mutate("s3a/data/webdataset.py", "tests/data/test_shards.py",
        ('raise tarfile.ReadError("it is cut off")', "pass",
         "a tar that is cut off is read as far as it goes", "test_damaged_shards_are_named"),
        ('name.partition(".")', 'name.rpartition(".")',
         "keys end at the last dot", "test_file_names_are_cut_as_webdataset_does"),
        ("images[0].offset_data, images[0].size", "images[0].offset, images[0].size",
         "images begin with their header", "test_shards_hold_what_was_written"),
        ('side="right"', 'side="left"',
         "the first row of a tar is taken for the last of the one before", "test_shards_hold_what_was_written"),
        ('path.open("rb", buffering=0)', 'path.open("rb")',
         "images are read to find the headers between them",
         "tests/data/test_stream.py::test_looking_through_tars_reads_no_images"),
        (" or len(label) > LABEL_BYTES", "",
         "a label may have any number of digits", "test_samples_that_are_not_whole_are_named"),
    ),
    *mutate("s3a/data/shards.py", "tests/data/test_shards.py",
        ("(path.relative_to(data_dir), path.stat().st_size) for path in files",
         "path.relative_to(data_dir) for path in files",
         "the fingerprint of shards does not know of sizes", "test_fingerprints_change_with_shards"),
    ),
    *mutate("s3a/data/columns.py", "tests/data/test_columns.py",
        ("if others != names:", "if len(others) != len(names):",
         "the splits may number their classes otherwise",
         "tests/data/test_shards.py::test_classes_numbered_otherwise_in_the_other_split_are_refused"),
        ("fill_null(-1)", "fill_null(0)",
         "images without a label are of the first class", "test_missing_labels_are_no_class"),
        ("(labels < 0) | (labels >= num_classes)", "(labels < 0) | (labels > num_classes)",
         "a label may be as large as the number of classes", "test_labels_that_are_no_class_are_refused"),
        (" or pairs.shape[1] > num_classes:", ":",
         "the finest labels need not be parts of the others",
         "test_labels_of_which_none_is_the_finest_are_refused"),
    ),
    *mutate("s3a/data/cifar.py", "tests/data/test_cifar.py",
        (".transpose(0, 2, 3, 1)", ".transpose(0, 3, 2, 1)",
         "rows of CIFAR-100's images are columns", "test_images_and_labels_are_those_that_torchvision_reads"),
        ("return records[:, 1], ", "return records[:, 0], ",
         "images of CIFAR-100 have their coarse label", "test_images_and_labels_are_those_that_torchvision_reads"),
        ("(records[:, 1] >= NUM_FINE)", "(records[:, 1] > NUM_FINE)",
         "a fine label of CIFAR-100 may be 100", "test_damaged_files_are_named"),
    ),
    *mutate("s3a/data/imagenet.py", "tests/data/test_imagenet.py",
        ('np.argsort(labels, kind="stable").tolist()', "list(range(len(labels)))",
         "folders that are numbers are read in the order of text",
         "test_folders_that_are_numbers_are_in_the_order_of_numbers"),
        ("known[int(found[1]) - 1]", "known[int(found[1]) % len(known)]",
         "an image has the real labels of the one behind it", "test_real_labels_go_by_the_names_of_the_files"),
        ("keep = [row for row, fitting in enumerate(labels) if fitting]", "keep = list(range(len(labels)))",
         "images that no label fits are scored", "test_real_labels_go_by_the_names_of_the_files"),
        ("fitting = [number for number in classes if is_name_of(name, number)]",
         "fitting = [number for number in classes if is_name_of(name, number)][:1]",
         "a name of two classes is taken for the first",
         "test_two_classes_of_one_name_are_told_apart_by_the_order_alone"),
    ),
    *mutate("s3a/training/tasks/imagenet.py", "tests/robustness/test_imagenet.py",
        ("classes = torch.as_tensor(list(self.imagenet.classes), device=logits.device)",
         "classes = torch.arange(1000, device=logits.device)",
         "images of 200 classes may be given any of the 1,000", "test_the_logits_of_a_set_are_taken_before_the_argmax"),
        ("1.0 if self.imagenet.is_cropped else", "", "ImageNet-C is cropped twice",
         "test_images_that_were_cropped_are_not_cropped_again"),
        ("hits[:, 0].sum(), hits.any(1).sum(), losses[is_image].sum()",
         "hits.any(1).sum(), hits.any(1).sum(), losses[is_image].sum()",
         "with several right labels top-1 is top-5", "test_real_labels_are_counted_as_timm_counts_them"),
    ),
    *mutate("s3a/robustness/imagenet.py", "tests/robustness/test_imagenet.py",
        ('classes = None if SETS[name].indices is None else list_classes(name)', "classes = None",
         "the clean figure of ImageNet-A is of all classes", "test_the_logits_of_a_set_are_taken_before_the_argmax"),
        ("common = {name: errors[name] for name in COMMON}", "common = dict(errors)",
         "the extra corruptions count", "test_the_mean_corruption_error_is_of_errors_divided_by_alexnets"),
    ),
    *mutate("s3a/data/hub.py", "tests/data/test_hub.py",
        ("[builder.hash, builder.config_id, *class_names]", "[*class_names]",
         "another revision is the same data", "test_fingerprints_change_with_a_repository"),
        ('dataset.rpartition(":")', 'dataset.partition("/")',
         "a configuration is not found", "test_a_configuration_is_named_behind_a_colon"),
        ("            max_retries=3,\n", "            max_retries=0,\n",
         "a Hub that is busy for a moment ends a run", "test_a_hub_that_was_busy_for_a_moment_is_no_obstacle"),
        ("    except (FileNotFoundError, ValueError) as error:\n        if obstacle",
         "    except FileNotFoundError as error:\n        if obstacle",
         "without a network another configuration is called a script",
         "test_another_configuration_than_that_of_the_cache_needs_the_hub"),
    ),
    *mutate("s3a/data/sources.py", "tests/data/test_sources.py",
        ("if streaming and not streams:", "if streaming and rule is None:",
         "streaming is ignored where a source cannot", "test_options_that_do_not_fit_the_source_are_refused"),
    ),
    *mutate("s3a/data/scenes.py", "tests/data/test_scenes.py",
        ("default_rng((SPLITS.index(self.split), number))", "default_rng(number)",
         "validation has the scenes of training", "test_training_and_validation_differ_in_the_same_number"),
        ("default_rng((SPLITS.index(self.split), number))", "default_rng()",
         "a scene is another each time", "test_a_scene_follows_from_its_number_alone"),
        ("filled * np.float32(1.5 / 255), 1)", "filled * np.float32(1 / 255), 1)",
         "digits are gray in the middle of a stroke", "test_pixels_of_digits_are_painted_over_photographs"),
        ("is_free = not np.any(self.blocked[place][sprite.mask])", "is_free = True",
         "digits touch each other", "test_objects_stand_apart"),
        ("range(1, margin + 1)", "range(1, margin)",
         "the gap is a pixel smaller", "test_objects_stand_apart"),
        ("background * np.float32(self.settings.brightness)", "background * np.float32(1)",
         "photographs are as bright as they are", "test_photographs_are_dimmed"),
        ("np.all(self.seen - hidden >= self.visible * self.areas)", "True",
         "objects hide each other", "test_later_objects_are_in_front_and_hide_little"),
        ("np.append(self.seen - hidden, area)", "np.append(self.seen, area)",
         "several objects hide one", "test_later_objects_are_in_front_and_hide_little"),
        ("for _ in range(TRIES if area else 0):", "for _ in range(TRIES):",
         "an empty picture is an object", "test_objects_without_a_place_are_left_out"),
        ("np.array([0, *(1 + label for label in scene.labels)], np.uint8)[scene.owners]", "scene.owners",
         "label maps number objects, not classes", "test_both_kinds_of_targets_describe_the_same_scenes"),
        ("np.where(picture > 0, np.uint8(255), np.uint8(0))", "picture",
         "dark cloth does not belong to its mask", "test_what_belongs_to_clothes_is_above_zero"),
        ("float(right - left), float(bottom - top)]", "float(right), float(bottom)]",
         "boxes of the ground truth end elsewhere", "test_ground_truth_is_what_pycocotools_reads_of_the_masks"),
        ('"category_id": self.category_ids[label],', '"category_id": label,',
         "categories of the ground truth are shifted", "test_ground_truth_is_what_pycocotools_reads_of_the_masks"),
        ('"val": [each[:, cut:] for each in photographs]', '"val": photographs',
         "validation shows photographs of training", "test_splits_have_digits_and_photographs_of_their_own"),
        ("[settings, *names, *(hashlib", "[*names, *(hashlib",
         "other settings are the same data", "test_fingerprints_tell_settings_and_pictures_apart"),
        ("cos(radians(self.turn)) + sin(radians(self.turn))", "cos(radians(self.turn))",
         "rotated objects are larger than the scene", "test_settings_that_cannot_be_drawn_are_refused"),
    ),
    *mutate("s3a/data/label_maps.py", "tests/data/test_label_maps.py",
        ("table[: self.first] = table[IGNORED] = IGNORED", "table[IGNORED] = IGNORED",
         "0 of ADE20K makes images unreadable", "test_ade20k_has_150_classes_and_ignores_zero"),
        ("table[self.first : self.first + self.num_classes]", "table[: self.num_classes]",
         "classes are shifted by one", "test_zero_may_be_ignored_too"),
        ("if numbers.dtype.itemsize == 1 else np.minimum(numbers.astype(np.uint32), NUMBERS)",
         "if numbers.dtype.itemsize == 1 else numbers.astype(np.uint8)",
         "256 of sixteen bits is 0", "test_a_large_number_of_sixteen_bits_does_not_wrap"),
        ("if classes.min() == NO_CLASS:", "if False:",
         "a number of no class is ignored in silence", "test_numbers_of_no_class_are_named"),
        ("if numbers.shape != (height, width):", "if numbers.size != height * width:",
         "a map that is turned is taken", "test_what_is_no_label_map_of_the_image_is_unreadable"),
        ("numbers if step == 1 else numbers // step", "numbers",
         "numbers of four bits are stretched", "test_grays_of_few_bits_are_numbers[4]"),
        ("if image.format not in FORMATS:", "if False:",
         "JPEG blurs numbers", "test_what_is_no_label_map_of_the_image_is_unreadable"),
        ("for stem in sorted(found_images.keys() ^ found_maps.keys()):",
         "for stem in sorted(found_images.keys() - found_maps.keys()):",
         "a map without its image is left out in silence", "test_a_fault_of_a_folder_is_said_in_one_line"),
        ("stems = sorted(found_images)", "stems = list(found_images)[::-1]",
         "the order of a folder is the file system's", "test_images_of_any_kind_and_dots_in_names_are_paired"),
        ('f"{image[start:]!a} {labels[start:]!a} {sizes}"', 'f"{image!a} {labels!a} {sizes}"',
         "a folder of label maps that moves is another one", "test_fingerprints_tell_files_classes_and_numbers_apart"),
        ("hash_content([numbering, *names, *lines])", "hash_content([*names, *lines])",
         "what 0 means is no part of the fingerprint", "test_fingerprints_tell_files_classes_and_numbers_apart"),
    ),
    *mutate("s3a/data/hub_label_maps.py", "tests/data/test_label_maps.py",
        ("if number >= first and number != IGNORED}", "if number >= first}",
         "255 of id2label.json is a class", "test_zero_of_a_repository_may_be_ignored"),
        ("local_files_only=in_cache_alone)", "local_files_only=True)",
         "names are never downloaded", "test_a_repository_of_the_hub_stays_in_the_cache"),
        ("if rows.info.builder_name == FOLDER_BUILDER:", "if False:",
         "rows of paths are read as if they held images", "test_folders_of_single_files_are_refused"),
        ("if len(maps) != 1 or not images:", "if not maps or not images:",
         "one of several label maps is taken", "test_columns_that_could_be_meant_otherwise_are_refused"),
        ("[builder.hash, builder.config_id, numbering,", "[builder.hash, builder.config_id,",
         "what 0 means is no part of a repository's fingerprint",
         "test_fingerprints_of_repositories_tell_numbers_apart"),
    ),
    *mutate("s3a/data/targets.py", "tests/data/test_loaders.py",
        ("as_subclass(Tensor).flatten() for each in targets]",
         "as_subclass(Tensor).flatten() for each in targets[::-1]]",
         "images have each other's targets", "test_joined_targets_are_few_tensors_and_come_apart_again"),
    ),
    *mutate("s3a/data/targets.py", "tests/data/test_targets.py",
        ("return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1",
         "return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])",
         "boxes lack their last row and column", "test_objects_have_the_boxes_that_their_masks_fill"),
        ("canvas_size=size)", "canvas_size=size[::-1])",
         "flipped boxes leave their masks", "test_boxes_move_with_their_masks"),
        ("np.full((height, width), IGNORED, np.uint8)", "np.zeros((height, width), np.uint8)",
         "padding counts as class 0", "test_a_blank_label_map_is_ignored_everywhere"),
    ),
]

# --------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------

WEIGHTS = [
    *mutate("s3a/models/dense.py", "tests/weights/test_card.py",
        ('own_cfg.get("license") or model.pretrained_cfg["license"]', 'model.pretrained_cfg["license"]',
         "a dense model hides the licence of its backbone", "test_dense_models"),
    ),
    *mutate("s3a/quantization/convert.py", "tests/quantization/test_convert.py",
        ("return [x.to(HEAD_DTYPE) for x in maps]", "return maps",
         "the head of a dense model gets bfloat16", "test_the_backbone_of_a_dense_model_is_quantized"),
        ('if not part or name.startswith(f"{part}.")', "if True",
         "the box heads of a detector are quantized", "test_the_boxes_of_a_detector_stay_in_float32"),
    ),
    *mutate("tools/predict.py", "tests/tools/test_predict.py",
        ('found["scores"] >= self.options.min_score', 'found["scores"] >= 0',
         "objects of any score are printed", "test_objects"),
        ("probabilities.argmax(0)", "probabilities.argmin(0)",
         "the least probable class of each pixel is shown", "test_shares_of_the_pixels"),
    ),
    *mutate("s3a/training/tasks/detection.py", "tests/tools/test_predict.py",
        ("boxes = found[\"boxes\"] * factors", "boxes = found[\"boxes\"]",
         "boxes are those of the resized image", "test_objects"),
    ),
    *mutate("s3a/weights/quantized_card.py", "tests/weights/test_quantized_card.py",
        ("dataset is not None or data.pipeline_tag in (None, own.pipeline_tag)",
         "data.pipeline_tag == own.pipeline_tag",
         "the Hub is told that the task is None", "test_cards_by_hand"),
        ("ignore_metadata_errors=True", "ignore_metadata_errors=False",
         "scores of another's card that the Hub cannot read forbid to quantize", "test_cards_by_hand"),
    ),
    *mutate("s3a/weights/folder.py", "tests/weights/test_folder.py",
        ("if dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):",
         "if dtype != torch.float8_e4m3fn:",
         "weights of whole numbers are loaded", "test_another_kind_of_numbers[norm.weight-dtype0]"),
        ('return "float8" if dtype.is_floating_point else str(dtype)',
         'return "float" if dtype.is_floating_point else str(dtype)',
         "weights of 8-bit floats are loaded", "test_another_kind_of_numbers[norm.weight-dtype3]"),
        ("surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())",
         "surplus = sorted(expected.keys() - state.keys()), []",
         "surplus tensors are ignored", "test_missing_and_surplus_keys"),
        ("tuple(state[key].shape) != shape", "len(state[key].shape) != len(shape)",
         "tensors of another size are loaded", "test_wrong_shape"),
        ("return model.eval()", "return model.train()",
         "loaded models are in training mode", "test_round_trip"),
        ('partial = path.with_name(path.name + ".partial")', "partial = path",
         "an interrupted write loses the old weights", "test_an_interrupted_save_leaves_the_old_weights"),
        ("tensor.detach().contiguous()", "tensor.detach()",
         "channels-last weights cannot be saved", "test_channels_last_weights_are_saved"),
        ("    if foreign:\n", "    if len(foreign) > 9:\n",
         "a config chooses the file that is loaded", "test_configs_that_no_model_has"),
        ("isinstance(classes, bool) or classes < 0", "isinstance(classes, bool)",
         "a negative number of classes is built", "test_meaningless_number_of_classes"),
        ("{**saved_args, **model_args}", "saved_args",
         "more arguments are ignored", "test_more_arguments_reach_the_model"),
    ),
    *mutate("s3a/weights/official.py", "tests/weights/test_official.py",
        ("    if foreign:\n", "    if len(foreign) > 9:\n",
         "unknown keys of a checkpoint are ignored", "test_surplus_official_keys_are_named"),
        ('    check_state(converted, expected, "the checkpoint is not of this model")\n', "",
         "missing keys of a checkpoint are ignored", "test_every_missing_official_key_is_named"),
        ("if shape is not None and [n for n in shape if n > 1] == [n for n in tensor.shape if n > 1]:",
         "if shape is not None and tensor.numel() == torch.Size(shape).numel():",
         "tensors are reshaped to whatever fits", "test_official_shapes_must_fit"),
        ("weights_only=True", "weights_only=False",
         "objects are unpickled", "test_read_checkpoint_unpickles_no_objects"),
    ),
    *mutate("s3a/weights/pretrained.py", "tests/weights/test_hub.py",
        ("    load_folder(folder)  # what", "    # what",
         "weights are published that cannot be loaded", "test_what_cannot_be_loaded_is_not_published"),
        ("(num_classes)  # every model", "(model.num_classes)  # every model",
         "another number of classes is ignored",
         "tests/weights/test_folder.py::test_other_number_of_classes_keeps_the_body"),
        ("        if revision is not None:\n", "        if revision == '':\n",
         "the revision of a folder is ignored", "test_a_folder_has_no_revisions"),
    ),
    *mutate("s3a/weights/hub.py", "tests/weights/test_hub.py",
        ("            revision = Path(path).parent.name  # the commit, for the other files\n", "",
         "files are of different commits", "test_both_files_are_of_one_commit"),
        ("if cached == revision:", "if cached is not None:",
         "a cached branch is downloaded without a warning that the Hub is out of reach",
         "test_no_network_and_a_warm_cache"),
        ("RETRIED = (408, 429, 500, 502, 503, 504)", "RETRIED = (408, 429, 500, 502, 504)",
         "an overloaded Hub is not asked again", "test_an_overloaded_hub_and_a_warm_cache"),
    ),
    *mutate("s3a/weights/card.py", "tests/weights/test_card.py",
        ("metric_value=value,", "metric_value=100 * value,",
         "the Hub reads percents", "test_the_hub_reads_the_card"),
        ('f"{100 * value:.2f} %"', 'f"{value:.2f} %"',
         "people read fractions as percents", "test_people_read_the_card"),
        ("if kind == facts.weights else", "if kind != facts.weights else",
         "the scores of other weights are called these", "test_people_read_the_card"),
        ('replace("|", "\\\\|")', 'replace("|", "|")',
         "a bar in a cell breaks the table", "test_people_read_the_card"),
    ),
]

# --------------------------------------------------------------------------------------------------------
# Quantization and export
# --------------------------------------------------------------------------------------------------------

DEPLOYMENT = [
    *mutate("s3a/quantization/int8.py", "tests/quantization/test_int8.py",
        ("codes, 1.0, ZERO, pack_weight", "codes, 1.0, ZERO - 1, pack_weight",
         "the product's zero is off by one", "test_a_linear_layer_is_exact_where_rounding_is"),
        (".round() + ZERO)", ".round() + ZERO + 1)",
         "the codes' zero is off by one", "test_a_linear_layer_is_exact_where_rounding_is"),
        ("(rows * (1 / scale)).round()", "(rows * (1 / scale)).floor()",
         "codes are rounded down", "test_a_linear_layer_is_exact_where_rounding_is"),
        ("or found[0] != weight._version", "",
         "a weight that changed is multiplied as it was", "test_products_of_bytes_follow_their_weight"),
        ("abs().amax(-1, keepdim=True)", "abs().amax()",
         "all tokens share a scale", "test_compiled_linear_layers"),
    ),
    *mutate("s3a/quantization/convert.py", "tests/quantization/test_convert.py",
        ("matches(name, layers) and not matches(name, skip)", "matches(name, layers)",
         "layers that are to be skipped are quantized", "test_layers_are_chosen_by_name"),
        ("in_features % group == 0]", "in_features % group >= 0]",
         "layers without whole groups are taken", "test_layers_without_whole_groups_are_left"),
        ("HEAD_DTYPE = torch.float32", "HEAD_DTYPE = torch.bfloat16",
         "logits that are close together become equal", "test_quantized_models_do_nearly_the_same"),
        ("deepcopy(model).eval()", "model.eval()",
         "the float model is changed too", "test_quantized_models_do_nearly_the_same"),
        ("weight.scale.to(DTYPE).to(weight.scale.dtype)  #", "weight.scale  #",
         "a folder gives other logits than the model it was written from",
         "tests/quantization/test_storage.py::test_round_trip"),
        ('torch.int8, "per_channel", is_symmetric=True', 'torch.int4, "per_channel", is_symmetric=True',
         "training rounds otherwise than the weights are", "test_fake_quantization_rounds_and_passes_gradients"),
    ),
    *mutate("s3a/quantization/storage.py", "tests/quantization/test_storage.py",
        ("codes[..., ::2] & 15) | (codes[..., 1::2] << 4)", "codes[..., 1::2] & 15) | (codes[..., ::2] << 4)",
         "the two numbers of a byte are swapped", "test_int4_codes_lie_two_to_a_byte"),
        ("(signed << 4) >> 4", "signed & 15",
         "negative numbers are read as positive ones", "test_int4_codes_lie_two_to_a_byte"),
        ("example.zero_point.clone()", "example.zero_point.clone() + 1",
         "loaded weights are off by one code", "test_round_trip"),
    ),
    *mutate("s3a/quantization/schemes.py", "tests/quantization/test_schemes.py",
        ("if Version(found) < Version(least):", "if found < least:",
         "0.9 is newer than 0.18", "test_old_torchao"),
        ('"float8-weight-only": Scheme(weights="float8")',
         '"float8-weight-only": Scheme(weights="float8", trains=True)',
         "a scheme is trained for that cannot be", "test_schemes_that_cannot_be_trained"),
        ("return None if found >= capability else", "return None if found else",
         "older GPUs are taken", "test_schemes_that_the_machine_cannot_run"),
    ),
    *mutate("s3a/export.py", "tests/test_export.py",
        ("OPEN_BATCHES = (1, 7)", "OPEN_BATCHES = (1, 2)",
         "a file is verified at the batch it was traced for", "test_a_file_for_any_batch_is_run_at_more_than_one[7]"),
        ("OPEN_BATCHES = (1, 7)", "OPEN_BATCHES = (7,)",
         "a file is not verified for one image", "test_a_file_for_any_batch_is_run_at_more_than_one[1]"),
        ("difference = max(verify(model, target.load(partial), torch.randn(size, *shape)) for size in sizes)\n"
         "        partial.replace(path)", "partial.replace(path)\n"
         "        difference = max(verify(model, target.load(path), torch.randn(size, *shape)) for size in sizes)",
         "a file is in place before it is verified", "test_wrong_outcomes_are_not_kept"),
        ("rtol=TOLERANCE, atol=TOLERANCE)", "rtol=TOLERANCE, atol=1.0)",
         "wrong logits are within the tolerance", "test_wrong_outcomes_are_not_kept"),
        ("        partial.unlink(missing_ok=True)\n", "        pass\n",
         "a file that is wrong stays under another name", "test_wrong_outcomes_are_not_kept"),
        ('if format != "pt2" and quantization:', 'if format == "onnx" and quantization:',
         "quantized weights are compiled for another machine", "test_quantized_weights_are_for_programs_alone"),
    ),
]

# --------------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------------

NETWORKS = [
    *mutate("s3a/nn/layers.py", "tests/nn/test_layers.py",
        ("self.fc2(x + self.dwconv(x))", "self.fc2(self.dwconv(x))",
         "the convolution of a feed-forward network is not residual", "test_conv_ffn"),
        ("enumerate((2, 1, 2, 1))", "enumerate((2, 2, 1, 1))",
         "the stem halves the map too early", "test_stem"),
        ("[act, norm] if norm_last else [norm, act]", "[norm, act]",
         "norm_last is ignored", "tests/models/test_svit.py::test_stem"),
        ("(layers if norm_last else layers[:-1])", "(layers)",
         "the stem ends with an activation", "test_stem"),
        ("padding=kernel_size // 2, groups=dim", "padding=kernel_size // 2",
         "depthwise convolutions mix channels", "test_depthwise_conv"),
        ("self.norm(self.reduction(x.permute(0, 3, 1, 2)))", "self.reduction(x.permute(0, 3, 1, 2))",
         "downsampling has no norm", "test_downsample"),
    ),
    *mutate("s3a/nn/compilation.py", "tests/nn/test_compilation.py",
        ("tuple(x.shape)[1:], plan, x.device", "tuple(x.shape)[1:], x.device",
         "scans share code until dynamo gives up", "test_blocks_of_another_scan_have_code_of_their_own"),
        ('any_batch=x.device.type == "cpu")', "any_batch=False)",
         "every batch size compiles anew", "test_blocks_of_another_scan_have_code_of_their_own"),
        ("        module.run_compiled = run_compiled\n", "        pass\n",
         "nothing is compiled", "test_blocks_of_another_scan_have_code_of_their_own"),
        ("    if torch.compiler.is_compiling() or must", "    if must",
         "a model is no single graph", "test_inside_of_a_larger_graph_regions_are_plain"),
        ("@cache_results(maxsize=1024)\ndef compile_region", "def compile_region",
         "blocks do not share code", "test_blocks_of_another_scan_have_code_of_their_own"),
        ("    if any(map(carries_hooks, module.children())):\n", "    if False:\n",
         "hooks inside of a region are lost", "test_hooks_fire_whenever_they_are_registered"),
        ("        or has_global_hooks()\n", "",
         "hooks of every module are lost inside of regions", "test_hooks_of_every_module_fire"),
        ("        or is_transformed()\n", "",
         "torch.func cannot transform a compiled model", "test_functional_transforms_give_what_they_give_uncompiled"),
        ("module.training and x.shape[0] == 1 and max", "False and max",
         "a single value leaves NaN in the statistics", "test_a_batch_of_one_value_is_refused_as_uncompiled"),
        ("        module.run_compiled = None\n", "",
         "every call past the limit tries to compile again",
         "test_past_the_limit_a_block_runs_uncompiled_and_says_so_once"),
        ("        or torch.jit.is_tracing()\n", "",
         "a compiled model cannot be traced", "test_a_compiled_model_is_traced"),
        ("    except TooManyVariantsError as error:", "    except ZeroDivisionError as error:",
         "too many kinds of input are an error", "test_past_the_limit_a_block_runs_uncompiled_and_says_so_once"),
        ("        y.register_hook(refuse_second_order)\n", "        pass\n",
         "second derivatives fail without the remedy", "test_second_derivatives_are_refused_with_the_remedy"),
        ("return module.transform(*arguments)", "return module(*arguments)",
         "a region's own hooks are compiled", "test_a_hook_of_a_region_changes_nothing_in_its_code"),
    ),
    *mutate("s3a/attention/derivatives.py", "tests/attention/test_functional.py",
        ("        raise NotImplementedError(MISSING) from error\n", "        raise\n",
         "forward mode fails without the remedy", "test_fused_attention_says_what_has_the_derivatives_that_it_lacks"),
        ("            tensor.register_hook(refuse_second_order)\n", "            pass\n",
         "second derivatives fail without the remedy",
         "test_fused_attention_says_what_has_the_derivatives_that_it_lacks"),
    ),
    *mutate("s3a/nn/batch_norm.py", "tests/nn/test_batch_norm.py",
        ("variance * (count / (count - 1))", "variance",
         "running variances are those of the sample", "test_processes_give_what_one_gives"),
        ("(counts * means).sum(0) / count", "means.mean(0)",
         "small shares weigh as much as large ones", "test_processes_give_what_one_gives"),
        ("(variances + (means - mean).square())", "variances",
         "what lies between the processes' means is lost", "test_processes_give_what_one_gives"),
        ("        dist.all_reduce(sums)\n", "",
         "gradients do not know of the other processes", "test_processes_give_what_one_gives"),
        ("        self.num_batches_tracked.add_(1)\n", "",
         "batches are not counted", "test_processes_give_what_one_gives"),
        ("not self.training or count_processes() == 1", "count_processes() == 1",
         "evaluation normalises by the batch", "test_alone_and_in_evaluation_it_is_batch_norm"),
        ("            raise ValueError(\n", "            print(\n",
         "batch norms are left with statistics of their own",
         "test_a_batch_norm_that_cannot_be_synchronised_is_refused"),
    ),
    *mutate("s3a/models/regions.py", "tests/models/test_regions.py",
        ("1 / stride, sampling_ratio=0, aligned=True", "1 / stride, sampling_ratio=0, aligned=False",
         "regions lie half a pixel beside their place", "test_regions_are_aligned"),
        ("features.float(), regions[chosen]", "features, regions[chosen].to(features.dtype)",
         "coordinates are rounded to half precision", "test_regions_of_half_precision_keep_their_coordinates"),
        ("torch.floor(2 + torch.log2(", "torch.floor(3 + torch.log2(",
         "regions are read from the map above", "test_levels"),
        ("generator=generator, device", "device",
         "what is drawn of an image depends on its neighbours",
         "tests/models/test_detection.py::test_images_have_the_same_samples_however_the_batch_is_cut"),
        ("(matches >= 0, int(number * fraction))", "(matches >= 0, number)",
         "objects leave no samples for background", "test_samples"),
        ("torch.where(outside & (matches == NEGATIVE)", "torch.where(outside",
         "objects near the border lose their anchors", "test_background_of_the_padding_is_ignored"),
        ("        dist.all_reduce(totals)\n", "        pass\n",
         "processes divide by their own objects", "test_processes_share_what_losses_are_divided_by"),
        ("(read[:, 0] >= 0.5)", "(read[:, 0] > 0)",
         "targets of masks are too large", "test_masks_in_boxes"),
        ("align_corners=False)[0, 0]", "align_corners=True)[0, 0]",
         "masks are stretched to the middle of their outer places",
         "test_masks_are_read_between_the_centres_of_their_places"),
    ),
    *mutate("s3a/models/rcnn.py", "tests/models/test_detection.py",
        ("torch.cat([objects, proposals])", "proposals",
         "objects are not among the samples", "test_what_a_stage_learns_from"),
        ("[own[~each.given] for own", "[own for own",
         "the boxes of objects are refined as if they had been proposed", "test_refined_proposals"),
        ("target[\"masks\"], each.found, own, size", "target[\"masks\"], each.found.flip(0), own, size",
         "boxes learn the mask of another object", "test_losses_of_masks"),
        ("(0.6, 0.5, 0.5), (0.7", "(0.5, 0.5, 0.5), (0.7",
         "the second stage is no stricter than the first", "test_stages_of_the_cascade"),
        ("torch.stack(votes).mean(0).softmax(1)", "votes[-1].softmax(1)",
         "the last stage alone decides on classes", "test_predictions_of_the_cascade_are_means"),
        ("positive=0.7, negative=0.3, lowest=0.3", "positive=0.6, negative=0.3, lowest=0.3",
         "anchors are an object's own from 0.6 on", "test_proposal_losses_are_those_of_torchvision"),
        ("OVERLAP = 0.7  # above which a proposal", "OVERLAP = 0.5  # above which a proposal",
         "proposals suppress too many others", "test_proposals_are_those_of_torchvision"),
        ("            matches = ignore_padding(matches, anchor, size)\n", "",
         "padding is learned from as background", "test_anchors_of_the_padding_are_not_learned_from"),
    ),
    *mutate("s3a/models/detection.py", "tests/models/test_detection.py",
        ("bias=-4.595", "bias=0.0",
         "training begins with half of all anchors as objects", "test_retinanet_begins_with_rare_objects"),
        ("(sigmoid_focal_loss(own_logits, wanted) * counted)", "sigmoid_focal_loss(own_logits, wanted)",
         "anchors between object and background count", "test_retinanet_losses_are_those_of_torchvision"),
        ("topk(min(self.COUNTED, logits[0].numel()))", "topk(min(10, logits[0].numel()))",
         "few of a map's anchors are looked at", "test_retinanet_predictions_are_those_of_torchvision"),
    ),
    *mutate("s3a/models/segmentation.py", "tests/models/test_segmentation.py",
        ('x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)',
         'x = F.interpolate(x, scale_factor=2, mode="nearest")',
         "levels are enlarged by repetition", "test_semantic_fpn_is_that_of_its_paper"),
        ("top = lateral(x) + resize(top, x.shape[2:])", "top = lateral(x)",
         "levels of UperNet do not know of those above", "test_upernet_is_that_of_transformers"),
        ("maps[self.strides.index(AUXILIARY_STRIDE)]", "maps[-1]",
         "the auxiliary head reads the last map", "test_the_auxiliary_head_reads_stride_16_and_may_be_left_out"),
    ),
    *mutate("s3a/models/dense.py", "tests/models/test_dense.py",
        ('faults += [f"{key} is surplus" for key in given if key not in known]', "faults += []",
         "weights of a deeper backbone are taken for this one's", "test_weights_of_another_architecture"),
        ("[norm(maps[index]) for norm, index", "[maps[index] for norm, index",
         "maps are not normalised", "test_maps_are_those_of_the_classification_model"),
    ),
    *mutate("s3a/models/backbone.py", "tests/models/test_backbone.py",
        ("branch_scales[1] * fed", "branch_scales[0] * fed",
         "both branches are dropped together", "test_stochastic_depth"),
        ("last * index / max(total - 1, 1)", "last * index / total",
         "the last block is dropped less than the recipe says", "test_drop_path_rate_reaches_the_model"),
        ("x.mean((2, 3))", "x.amax((2, 3))",
         "pooling takes the largest", "test_pooling_is_the_mean_of_the_map"),
        ("self.act(self.norm(self.proj(x).permute(0, 3, 1, 2)))", "self.norm(self.proj(x).permute(0, 3, 1, 2))",
         "there is no activation in front of the head", "tests/models/test_ssvit.py::test_tiny_logits"),
        ("x = x + self.pos_conv(x)", "x = self.pos_conv(x)",
         "the position encoding is not residual", "tests/models/test_ssvit.py::test_tiny_logits"),
        ("if min(x.shape[2:]) < MIN_IMAGE_SIZE:", "if max(x.shape[2:]) < MIN_IMAGE_SIZE:",
         "images may be too narrow", "test_small_images_are_refused"),
        ('"reduction": 4 * 2**index', '"reduction": 2 * 2**index',
         "features are said to be twice as fine", "tests/models/test_timm_contract.py::test_features_only"),
        ("if self.grad_checkpointing and self.training:", "if False:",
         "activations are kept", "test_grad_checkpointing_gives_the_same_gradients"),
        ("        self.head.apply(init_linear)\n", "",
         "a new head has PyTorch's weights",
         "tests/models/test_timm_contract.py::test_a_new_classifier_is_fresh_and_the_body_is_kept"),
        ("drops = self.training and any(rates)", "drops = any(rates)",
         "evaluation drops branches", "test_stochastic_depth"),
    ),
    *mutate("s3a/nn/stochastic_depth.py", "tests/nn/test_stochastic_depth.py",
        ("torch.rand(len(rates), 2, x.shape[0], 1, 1, 1,", "torch.rand(len(rates), 2, 1, 1, 1, 1,",
         "all images of a batch are dropped together", "tests/models/test_backbone.py::test_stochastic_depth"),
        ("torch.rand(len(rates), 2, x", "torch.rand(1, 2, x",
         "all blocks of a stage are dropped together", "test_every_block_branch_and_image_is_drawn_for"),
        ("/ kept.clamp(min=1e-12)", "",
         "what is kept is not scaled", "test_every_block_branch_and_image_is_drawn_for"),
        ("drawn[:, :, place.first : place.first + x.shape[0]]", "drawn[:, :, : x.shape[0]]",
         "every process draws for the first images", "test_an_image_keeps_its_branches_however_the_batch_is_cut"),
    ),
    *mutate("s3a/models/ssvit.py", "tests/models/test_ssvit.py",
        ("fixed=rule.fixed_of(block),", 'fixed="window",',
         "all blocks fix the window", "test_blocks_alternate_between_window_and_anchors"),
        ("passes=rule.passes,", "",
         "ablations have both passes", "test_scans_of_an_ablation"),
        ("stages.{int(match[1]) + 1}.downsample", "stages.{int(match[1])}.downsample",
         "official downsampling goes to the wrong stage",
         "tests/weights/test_official.py::test_every_official_key_is_accounted_for"),
        ("        trunc_normal_(module.weight, std=0.02)\n", "",
         "convolutions have PyTorch's weights", "test_initialisation"),
        ("head_hidden_size=head_hidden_size,", "head_hidden_size=None,",
         "there is no layer in front of the head", "test_tiny_logits"),
        ("norm1=nn.LayerNorm(dim, eps=1e-6)", "norm1=nn.LayerNorm(dim, eps=1e-2)",
         "the norm's epsilon is another", "test_tiny_logits"),
    ),
    *mutate("s3a/models/svit.py", "tests/models/test_svit.py",
        ("fold(affinity.mT @ cells) / (mass + 1e-12)", "fold(affinity.mT @ cells)",
         "super tokens are sums, not means", "test_super_token_attention_is_the_dense_mathematics"),
        ("cells.shape[-1] ** -0.5", "1",
         "the association has no scale", "test_super_token_attention_is_the_dense_mathematics"),
        ("shift(supers, -row, -column)", "shift(supers, row, column)",
         "super tokens of the other side are seen", "test_super_token_attention_is_the_dense_mathematics"),
        ("associate(cells.detach())", "associate(cells)",
         "the association has a gradient", "test_super_token_attention_is_the_dense_mathematics"),
        ('"b h w (heads three d) -> three', '"b h w (three heads d) -> three',
         "heads are cut otherwise than in official weights", "test_official_logits"),
    ),
    *mutate("s3a/models/vvt.py", "tests/models/test_vvt.py",
        ("[:, None].expand(-1, width) / height", "[:, None].expand(-1, width) / width",
         "row angles follow the width", "test_weights_of_places"),
        ("angles = pi / 2 * torch", "angles = pi * torch",
         "distant keys count negatively", "test_weights_of_places"),
        ("query @ key.sum(2).unsqueeze(3) + 1e-4)", "query @ key.sum(2).unsqueeze(3) + 1e-1)",
         "the attention's sum is of another epsilon", "test_vicinity_attention_is_the_quadratic_one"),
        ("clamp_magnitude(out + out * self.gate", "clamp_magnitude(out * self.gate",
         "the feature-preserving connection is none", "test_vicinity_attention_is_the_quadratic_one"),
        ("x.sign() * x.abs().clamp(SMALLEST, LARGEST)", "x.clamp(SMALLEST, LARGEST)",
         "clamping loses the sign", "test_clamp_keeps_signs_and_zeros"),
    ),
]

# --------------------------------------------------------------------------------------------------------
# Analysis, comparison and support
# --------------------------------------------------------------------------------------------------------

REST = [
    *mutate("s3a/analysis/cost.py", "tests/analysis/test_cost.py",
        ('counter.macs["layers"] / 2**30', 'counter.macs["layers"] / 1e9',
         "published costs are in another unit", "test_cost_is_the_published_one"),
        ("return 2 * dim * sum(", "return dim * sum(",
         "values of a scan are not counted", "test_cost_equals_a_count_by_hand"),
        ("+= flops // 2", "+= flops",
         "a multiply-accumulate counts twice", "test_cost_is_the_published_one"),
        ('1, "window", "local"', 'module.size, module.fixed, module.passes',
         "what a backend runs is counted beside its pairs", "test_cost_equals_a_count_by_hand"),
        ("sum(2 * each.shape.numel() for", "sum(each.shape.numel() for",
         "scores and values of a key are two pairs", "test_pairs_per_token_of_windows_are_those_of_a_window"),
        ("each for each in counter.blocks if each.shape == counter.blocks[0].shape", "each for each in counter.blocks",
         "the first stage is the whole network", "test_pairs_per_token_of_super_tokens"),
        (' - self.products_before.pop()', '',
         "a block has the products of those before", "test_pairs_per_token_of_sparse_scans"),
        ("copies[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty",
         "copies[id(tensor)] = tensor",
         "counting computes with the weights", "test_cost_leaves_the_model_alone"),
    ),
    *mutate("s3a/analysis/attribution.py", "tests/analysis/test_attribution.py",
        ("(to_seen * seen).sum((0, 2, 3)), (to_value * value)", "(to_value * value).sum((0, 2, 3)), (to_seen * seen)",
         "anchors and tokens are swapped", "test_equals_dense_attention"),
        ("attend(query, key, seen, plan", "attend(query, key, value, plan",
         "anchors have not seen their windows", "test_equals_dense_attention"),
        ("for size in reversed(has_both)", "for size in has_both",
         "the finest map is shown", "test_the_deepest_map_with_both_passes"),
        ("        model.train(was_training)\n", "",
         "the model is left in evaluation mode", "test_the_model_is_left_as_it_is"),
        ("label = int(logits.argmax())", "label = 0",
         "the first class is explained", "test_the_class_is_the_most_probable_one"),
        ('each.backend, each.kernel_options = "tiled", ()', "pass",
         "flex attends uncompiled", "test_nothing_is_attended_by_flex"),
        ('torch.compiler.set_stance("force_eager")', 'torch.compiler.set_stance("default")',
         "compiled models are not recorded", "test_compiled_and_frozen_models"),
    ),
    *mutate("s3a/analysis/overlay.py", "tests/analysis/test_overlay.py",
        ("float(anchors[row, column]) / total", "float(anchors[row, column])",
         "shares do not add up to 1", "test_marks_are_what_contributed_to_the_class"),
        ("scan.anchors.clamp(min=0)", "scan.anchors.abs()",
         "anchors that spoke against the class are shown", "test_marks_are_what_contributed_to_the_class"),
        ("(before.height - after.height) / 2 * view.tall", "(before.height - after.height) * view.tall",
         "the crop is not in the middle", "test_what_the_network_sees"),
        ("cell.top + cell.height / 2", "cell.top",
         "anchors lie on the upper edge of their cells", "test_marks_are_the_cells_of_their_tokens"),
        ("alone = not any(do_overlap", "alone = True or any(do_overlap",
         "windows overlap", "test_framed_windows_do_not_overlap_and_are_strong"),
        ("min(self.view.left + (window.last_column + 1) * self.wide, self.view.left + self.view.width)",
         "self.view.left + (window.last_column + 1) * self.wide",
         "windows leave what the network saw", "test_the_last_tokens_of_an_odd_picture_are_cut"),
    ),
    *mutate("s3a/analysis/explain.py", "tests/analysis/test_explain.py",
        ("100 * self.num_pairs / self.num_tokens**2", "100 * self.num_pairs / self.num_tokens",
         "a density is above 100 %", "test_scans_of_an_ablation"),
        ("head_dim, training), find_costs", "head_dim, False), find_costs",
         "training is explained as inference", "test_the_backend_has_its_reasons"),
    ),
    *mutate("s3a/comparison/scores.py", "tests/tools/test_compare.py",
        ('summarise_seeds([history[-1]["val_top1"] for',
         'summarise_seeds([max(line["val_top1"] for line in history) for',
         "top-1 is that of the best epoch", "test_a_row_has_the_last_epoch_and_the_best_one_apart"),
        ("deviation / math.sqrt(len(difference", "deviation / (len(difference",
         "the standard error falls with the number of seeds", "test_spreads"),
        ("[own - its for own, its in", "[its - own for own, its in",
         "differences have the wrong sign", "test_differences_are_paired_by_seed"),
        ("statistics.stdev(figures)", "statistics.pstdev(figures)",
         "deviations are of a whole population", "test_spreads"),
        ("if not is_finished(recipe, data):", "if True:",
         "a finished run is begun again", "test_a_comparison_and_what_goes_on_from_it"),
    ),
    *mutate("s3a/comparison/candidates.py", "tests/tools/test_compare.py",
        ("reference_gmacs / cost.gmacs) if", "cost.gmacs / reference_gmacs) if",
         "the dearer a candidate, the longer it is trained", "test_equal_compute"),
        ("size=None if sizes == {self.size} else self.size", "size=self.size",
         "runs of the plain model are not shared", "test_what_is_the_models_own_is_the_plain_model"),
    ),
    *mutate("s3a/comparison/speed.py", "tests/tools/test_compare.py",
        ("more * (side / large) **", "more * (large / side) **",
         "larger images need less memory", "test_memory_is_extrapolated_and_what_would_not_fit_is_said"),
        ("tracker.track_external(*held)", "pass",
         "weights are left out of the memory", "test_peak_memory"),
        ("1e3 * batch_size / time for", "1e3 / time for",
         "throughput is of batches", "test_throughput_is_of_images"),
    ),
    *mutate("s3a/comparison/growth.py", "tests/tools/test_benchmark.py",
        ("if own[side] <= peer[side]:", "if own[side] < peer[side]:",
         "an equal cost is a larger one", "test_a_crossing_is_where_all_larger_images_cost_more"),
        ("for side in sorted(own.keys() & peer.keys(), reverse=True):",
         "for side in sorted(own.keys() & peer.keys()):",
         "a crossing is looked for from the smallest image on", "test_a_crossing_is_where_all_larger_images_cost_more"),
        ('times[swin, side] / each["ms"]', 'each["ms"] / times[swin, side]',
         "slow models are many times faster than Swin", "test_growth_rows_are_sides_and_models_beside_swin"),
        ("for side in sorted(sides):", "for side in sides:",
         "memory is extrapolated from larger images", "test_growth_rows_are_sides_and_models_beside_swin"),
    ),
    *mutate("s3a/robustness/corruptions.py", "tests/robustness/test_corruptions.py",
        ("100 * fmean(of_name) / ALEXNET_ERRORS[name]", "100 * max(of_name) / ALEXNET_ERRORS[name]",
         "the error of a corruption is the largest", "test_each_corruption_counts_the_same_and_each_severity_does"),
        ("return fmean(compute_corruption_errors(errors).values())",
         "return fmean(map(fmean, errors.values())) / fmean(ALEXNET_ERRORS.values()) * 100",
         "hard corruptions weigh more", "test_each_corruption_counts_the_same_and_each_severity_does"),
    ),
    *mutate("s3a/robustness/images.py", "tests/robustness/test_images.py",
        ("self._show(decode_image(row.encoded, self.mode))",
         "decode_image(row.encoded, self.mode).resize((32, 32))",
         "images are corrupted at another size", "test_images_are_what_the_library_makes_of_the_models_view"),
        ('("glass_blur", "impulse_noise")', "()",
         "two corruptions are others in every run", "test_noise_is_the_rows_whoever_reads_it"),
        ("mix_seeds(self.seed, ALL.index(self.part.corruption), row.index)",
         "mix_seeds(self.seed, ALL.index(self.part.corruption))",
         "all images have one noise", "test_noise_is_the_rows_whoever_reads_it"),
        ("mix_seeds(self.seed, ALL.index(self.part.corruption), row.index)",
         "mix_seeds(self.seed, ALL.index(self.part.corruption), row.index, self.part.severity)",
         "a severity has a noise of its own", "test_severities_scale_one_noise"),
        ("self.images.read_rows(self.rows[indices].tolist())",
         "[Row(i, r.encoded, r.label) for i, r in zip(indices, self.images.read_rows(self.rows[indices].tolist()))]",
         "the noise of some images is that of others among all", "test_noise_is_the_rows_whoever_reads_it"),
        ('if part.corruption != "spatter":\n            raise\n        return image',
         "return Image.new(image.mode, image.size)",
         "images without a drop are black", "test_an_image_on_which_no_drop_falls_stays_as_it_is"),
        ("with keep_generators(), use_one_thread(), silence_pillow():", "with use_one_thread(), silence_pillow():",
         "whoever evaluates draws other numbers afterwards", "test_generators_are_left_as_they_are"),
    ),
    *mutate("s3a/robustness/evaluation.py", "tests/robustness/test_evaluation.py",
        ("(CONFIG_NAME, WEIGHTS_NAME))", "(CONFIG_NAME,))",
         "other tensors are taken for the same weights", "test_other_weights_have_another_digest"),
        ("np.reshape(sums, (len(self.names), -1))", "np.reshape(sums, (-1, len(self.names))).T",
         "weights get the sums of others", "test_top1_is_what_plain_code_counts"),
        ("json.dumps(candidate.data_config, sort_keys=True, default=str)", "candidate.path",
         "every weights' images are corrupted anew", "test_those_that_see_the_same_images_are_together"),
    ),
    *mutate("s3a/robustness/results.py", "tests/tools/test_robustness.py",
        ("if found.conditions.get(key) != conditions[key]]", "if key not in found.conditions]",
         "scores of several seeds and data are in one table", "test_other_conditions_are_refused"),
    ),
    *mutate("s3a/robustness/lines.py", "tests/robustness/test_report.py",
        ("key=read_seeds", "key=str",
         "the seed 10 is paired with the seed 9", "test_labels_are_what_tells_lines_apart"),
        ("if not SEED.fullmatch(part)", "if True",
         "every seed is a line", "test_labels_are_what_tells_lines_apart"),
        ('if len(own["seeds"]) == len(reference["seeds"]):', "if True:",
         "seeds without a partner end the report", "test_other_numbers_of_seeds_are_not_paired"),
    ),
    *mutate("s3a/robustness/report.py", "tests/robustness/test_report.py",
        ('results.conditions["knows_imagenet"] and complete', "complete",
         "other classes have a mean corruption error", "test_the_mean_corruption_error_is_of_imagenet_alone"),
        ("[1 - top1[name]", "[top1[name]",
         "the mean corruption error is of what is right", "test_the_mean_corruption_error_is_of_imagenet_alone"),
    ),
    *mutate("s3a/support/compiler.py", "tests/support/test_compiler.py",
        ("    except FailOnRecompileLimitHit as error:", "    except ZeroDivisionError as error:",
         "too many kinds of input say little", "test_past_the_limit_it_is_an_error_and_not_run_uncompiled"),
        ("get_dynamic_layer_stack_depth() > 0", "peek_interpreter_stack() is not None",
         "dynamo takes every trace for one under torch.func",
         "tests/nn/test_compilation.py::test_compiled_tokens_lie_as_uncompiled_ones"),
        ("    tensor._dynamo_static_indices = set(range(first, tensor.ndim))  # type: ignore[attr-defined]\n", "",
         "the sizes of plans vary for dynamo", "tests/nn/test_compilation.py::test_s3a_compiles_with_open_sizes"),
        ("    return torch.compile(copy, fullgraph=True, **settings)\n", "    return torch.compile(copy, **settings)\n",
         "what cannot be compiled runs uncompiled in silence", "test_a_copy_is_one_graph_or_an_error"),
        ("    with torch.inference_mode(False), _disable_current_modes():\n", "    with _disable_current_modes():\n",
         "plans of inference cannot be trained on",
         "tests/attention/test_plan.py::test_plans_survive_the_mode_they_are_built_in"),
    ),
    *mutate("s3a/support/caches.py", "tests/attention/test_plan.py",
        ("        CACHES.append(cached)\n", "",
         "clear_caches forgets nothing", "test_cleared_caches_build_anew"),
    ),
    *mutate("s3a/support/timing.py", "tests/support/test_timing.py",
        ("statistics.median(each)", "statistics.fmean(each)",
         "a slow turn spoils the figure", "test_a_slow_turn_leaves_the_median_as_it_is"),
        ("return 1e3 * (time.perf_counter() - started)", "return time.perf_counter() - started",
         "times are seconds", "test_times_are_milliseconds"),
    ),
    *mutate("s3a/support/command_line.py", "tests/training/test_processes.py",
        ("sys.exit(RESUME_STATUS)", "sys.exit(1)",
         "schedulers do not start a stopped run again", "test_the_command_that_a_signal_stops_ends_with_75"),
    ),
]

MUTATIONS = [*OPERATOR, *BLIND, *TRAINING, *DATA, *WEIGHTS, *DEPLOYMENT, *NETWORKS, *REST]
# fmt: on


# --------------------------------------------------------------------------------------------------------
# Trials
# --------------------------------------------------------------------------------------------------------

Verdict = Literal["killed", "survived", "fault of the list"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Mutations that are applied at once, and the tests that are run with them.

    Attributes:
        mutations: none for the library as it is.
        tests: ids.
    """

    mutations: tuple[Mutation, ...]
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.mutations[0]) if len(self.mutations) == 1 else f"{len(self.mutations)} mutations together"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What pytest said of a trial.

    Attributes:
        status: of pytest; None where it took too long.
        failed: ids of tests that failed, with their parameters.
        output: all that was printed.
        seconds: that it took.
    """

    status: int | None
    failed: tuple[str, ...] = ()
    output: str = ""
    seconds: float = 0.0


def make_trial(*mutations: Mutation) -> Trial:
    """The trial of some mutations with their tests."""
    return Trial(mutations=mutations, tests=tuple(dict.fromkeys(each.test for each in mutations)))


def list_green(trial: Trial, report: Report) -> list[str]:
    """The tests of a trial of which no case failed."""
    failed = {*report.failed, *(test.partition("[")[0] for test in report.failed)}
    return [test for test in trial.tests if test not in failed]


def judge(trial: Trial, report: Report) -> Verdict:
    """Whether the tests saw the mutations: killed if each of them failed.

    pytest has to end with the status of failed tests: a test that cannot be collected, is deselected as a slow one, or
    does not end shows nothing.
    """
    if report.status == 0:
        return "survived"
    if report.status != 1:
        return "fault of the list"
    return "survived" if list_green(trial, report) else "killed"


def apply_mutations(root: Path, mutations: Sequence[Mutation]) -> None:
    """Applies mutations to the files under a folder."""
    for mutation in mutations:
        path = root / mutation.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise ValueError(f"{mutation}: the old text stands there {text.count(mutation.old)} times, must be once")
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def copy_repository(target: Path) -> None:
    """Copies what tests read of the repository."""
    for entry in ROOT.iterdir():
        if entry.name in PARTS:
            shutil.copytree(entry, target / entry.name, ignore=IGNORED)
        elif entry.is_file():
            shutil.copy2(entry, target)
    for folder in (".ci", ".github"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, target / folder)


# --------------------------------------------------------------------------------------------------------
# Workers
# --------------------------------------------------------------------------------------------------------


def start_worker(home: str) -> None:
    """Prepares a worker process: everything is imported that a child would otherwise import again for every trial.

    Some libraries read the environment when they are imported. So the Hub of the tests gets its address here, and a
    child serves it there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(Path(home) / f"hub-{os.getpid()}"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_WAIT_POLICY": "passive",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(home) / "inductor"),  # generated code is found by what it is made of
    }
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao makes it warn
    for name in LIBRARIES:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)  # a forked process has no threads but one
    gc.freeze()  # a child would look through all that was imported again and again
    atexit.register(gc.unfreeze)
    assert "s3a" not in sys.modules


def run_trial(trial: Trial, seconds: float) -> Report:
    """Runs the tests of a trial in a forked process, on a copy of the repository with its mutations."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="s3a-mutation-") as name:
        folder = Path(name)
        (folder / "tree").mkdir()
        (folder / "temporary").mkdir()
        copy_repository(folder / "tree")
        apply_mutations(folder / "tree", trial.mutations)
        child = os.fork()
        if child == 0:
            run_child(folder, trial)
        status = wait_for(child, seconds)
        found = json.loads((folder / "failed.json").read_text()) if (folder / "failed.json").exists() else []
        output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    return Report(status=status, failed=tuple(found), output=output, seconds=time.monotonic() - started)


def wait_for(child: int, seconds: float) -> int | None:
    """The exit status of a forked process; None if it did not end in time, and was killed with all that it started."""
    deadline, ended, status = time.monotonic() + seconds, 0, 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # or what a test has left behind
    if ended:
        return os.waitstatus_to_exitcode(status)
    os.waitpid(child, 0)
    return None


def run_child(folder: Path, trial: Trial) -> None:
    """Runs the tests in this process and ends it with pytest's status."""
    status = BROKEN
    try:
        os.setsid()
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(output, stream)
        enter_tree(folder)
        recorder = Recorder()
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:randomly", f"--rootdir={folder / 'tree'}"]
        options += ["-n", "0"] if importlib.util.find_spec("xdist") else []
        options += ["-x"] if len(trial.tests) == 1 else []
        status = sys.modules["pytest"].main([*options, *trial.tests], plugins=[recorder])
        (folder / "failed.json").write_text(json.dumps(recorder.failed))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def enter_tree(folder: Path) -> None:
    """Makes this process, and those that it starts, import `s3a` and the tests from the copy."""
    tree = folder / "tree"
    os.chdir(tree)
    sys.path[:] = [str(tree), str(tree / "tests"), *(each for each in sys.path if not is_inside(each, ROOT))]
    importlib.invalidate_caches()
    os.environ |= {"PYTHONPATH": str(tree), "TMPDIR": str(folder / "temporary")}
    tempfile.tempdir = None
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)  # of the last trial
    hub = importlib.import_module("helpers.hub_server").HUB
    hub.stop()
    hub.port = int(os.environ["HF_ENDPOINT"].rpartition(":")[2])
    hub.start()


def is_inside(path: str, folder: Path) -> bool:
    """Whether an entry of sys.path is a folder or in it; an empty one is the working directory."""
    return Path(path or ".").resolve().is_relative_to(folder)


class Recorder:
    """A plugin of pytest that notes which tests failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: object) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


# --------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs the selected mutations; see the head of this file."""
    options = parse_options()
    selected = select(options.paths, options.words or [""])
    if options.list:
        print("\n".join(f"{each}\n    {each.test}" for each in selected))
        return
    trials = [make_trial(each) for each in selected]
    if set(BLIND) <= set(selected):
        trials.append(make_trial(*BLIND))
    with tempfile.TemporaryDirectory(prefix="s3a-mutations-") as home:
        spawn = multiprocessing.get_context("spawn")  # workers must not have what this process has imported
        with ProcessPoolExecutor(options.jobs, spawn, start_worker, (home,)) as pool:
            check_unmutated(pool, selected, options)
            verdicts = list(run_trials(pool, trials, options.timeout))
    survived, faults = verdicts.count("survived"), verdicts.count("fault of the list")
    print(f"{len(trials)} trials: {verdicts.count('killed')} killed, {survived} survived, {faults} faults of the list")
    sys.exit(2 if faults else 1 if survived else 0)


def parse_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="files or folders of the library whose mutations are run")
    parser.add_argument("-k", dest="words", action="append", help="only those with this text; or that of another -k")
    parser.add_argument("--list", action="store_true", help="print the mutations, run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a test does not end")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests on the library as it is first")
    return parser.parse_args()


def select(paths: Sequence[str], words: Sequence[str]) -> list[Mutation]:
    """The mutations of some files or folders (of all, where none is given) that have one of the words in them."""
    wanted = [Path(path).resolve().relative_to(ROOT) for path in paths] or [Path()]
    return [
        each
        for each in MUTATIONS
        if any(Path(each.file).is_relative_to(path) for path in wanted)
        and any(word.lower() in f"{each} {each.test}".lower() for word in words)
    ]


def check_unmutated(pool: ProcessPoolExecutor, selected: list[Mutation], options: argparse.Namespace) -> None:
    """Runs all tests on the library as it is; ends with status 2 where one fails, since it would prove nothing."""
    if options.unchecked:
        return
    by_file: dict[str, list[str]] = {}
    for each in selected:
        by_file.setdefault(each.test.partition("::")[0], []).append(each.test)
    trials = [Trial(mutations=(), tests=tuple(dict.fromkeys(tests))) for tests in by_file.values()]
    started = [pool.submit(run_trial, trial, options.timeout + 60 * len(trial.tests)) for trial in trials]
    broken = [done.result() for done in as_completed(started) if done.result().status != 0]
    if broken:
        print("these fail without any mutation:", *(report.output for report in broken), sep="\n", file=sys.stderr)
        sys.exit(2)


def run_trials(pool: ProcessPoolExecutor, trials: list[Trial], timeout: float) -> Iterator[Verdict]:
    """Runs trials and prints a line for each as it ends; gives the verdicts."""
    started = {pool.submit(run_trial, trial, timeout): trial for trial in trials}
    for done in as_completed(started):
        trial, report = started[done], done.result()
        verdict = judge(trial, report)
        print(f"{verdict:<17} {trial} ({report.seconds:.0f} s)", flush=True)
        if verdict == "survived":
            print(*(f"    green: {test}" for test in list_green(trial, report)), sep="\n", flush=True)
        elif verdict != "killed":
            reason = "did not end" if report.status is None else f"pytest's status is {report.status}"
            print(f"    {' '.join(trial.tests)}: {reason}\n{report.output[-3000:]}", flush=True)
        yield verdict


if __name__ == "__main__":
    main()
