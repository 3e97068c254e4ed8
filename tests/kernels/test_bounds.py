"""No kernel reads or writes outside its arrays: each array lies between pages that may not be touched."""

import subprocess
import sys

import pytest

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="protects pages with mprotect")

FENCE = """
import ctypes, mmap, sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from sparsetwin.kernels import *
from sparsetwin.kernels import _tokens
from sparsetwin.kernels._tokens import padded as _padded

PAGE, alive = mmap.PAGESIZE, []
libc = ctypes.CDLL(None, use_errno=True)

def fenced(tensor, end):
    # a copy that ends where a forbidden page begins, or begins where one ends
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + pages):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    offset = PAGE + (pages - size if end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, offset=offset, count=tensor.numel()).view(tensor.shape)
    alive.append(memory)
    return copy.copy_(tensor)

def sparse(*shape):
    weight = torch.randn(*shape) * (torch.rand(*shape) < 0.3)
    weight.view(-1)[-1] = 1.0  # at least one
    return weight

def with_padding(array, end):
    # what kernels for a few tokens may read behind an array, but not more
    return fenced(torch.as_strided(array, (array.numel() + 16,), (1,)), end)[: array.numel()]

def fence_matrix(matrix, end, fence=fenced):
    pointers = fenced(matrix.row_pointers, end)
    return replace(matrix, row_pointers=pointers, values=fence(matrix.values, end))

def token_product(matrix, end, **options):
    # what the product makes of the matrix is fenced as it is made, before a kernel is told where it lies
    made, _tokens.padded = _tokens.padded, lambda array: with_padding(_padded(array), end)
    try:
        return TokenProduct(matrix, **options)
    finally:
        _tokens.padded = made
"""

PRODUCTS = """
for target in (None, "generic"):
    for end in (True, False):
        for rows, length, columns in ((1, 1, 1), (5, 13, 7), (8, 30, 64), (9, 17, 71), (3, 40, 129)):
            matrix = fence_matrix(CSRBlocks.from_dense(sparse(rows, length), block_columns=11), end)
            tiling = Tiling(vectors=4, target=target)
            bias = fenced(torch.randn(rows), end)
            product = SparseProduct(matrix, columns=columns, pitch=columns, bias=bias, residual=True, tiling=tiling)
            x, out = fenced(torch.randn(length, columns), end), fenced(torch.empty(rows, columns), end)
            product(x, residual=fenced(torch.randn(rows, columns), end), out=out)
"""

TOKENS = """
for target in (None, "generic"):
    for end in (True, False):
        for layout in ("columns", "bitmask"):
            for rows, length in ((1, 1), (5, 13), (8, 32), (9, 100)):
                for tokens in (1, 3, 8):
                    matrix = fence_matrix(CSRBlocks.from_dense(sparse(rows, length)), end, with_padding)
                    bias = fenced(torch.randn(rows), end)
                    for value in ("float32", "bfloat16"):
                        product = token_product(
                            matrix, end, tokens=tokens, bias=bias, layout=layout, target=target, value=value
                        )
                        product(fenced(torch.randn(tokens, length), end))
"""

CONVOLUTIONS = """
for end in (True, False):
    for kernel, stride, padding, groups in ((3, 1, 1, 1), (1, 1, 0, 1), (3, 2, 1, 2), (5, 1, 4, 1), (2, 3, 0, 4)):
        for size in ((5, 9), (14, 14), (3, 15), (2, 63)):
            pair = lambda number: (number, number)
            geometry = ConvolutionGeometry(
                in_channels=4, out_channels=8, kernel=pair(kernel), height=size[0], width=size[1],
                stride=pair(stride), padding=pair(padding), groups=groups,
            )
            weight = sparse(8, 4 // groups, kernel, kernel)
            weight = weight + 1 if size[0] == 14 else weight  # nothing pruned: rows are worked on together
            matrix = fence_matrix(CSRBlocks.from_dense(weight, block_columns=2 * kernel * kernel), end)
            convolution = SparseConvolution(matrix, geometry=geometry, residual=True)
            convolution._keep = fenced(convolution._keep, end)
            planes = fenced(convolution.source.pack(torch.randn(2, 4, *size)), end)
            out = fenced(convolution.destination.empty(2), end)
            convolution(planes, residual=fenced(convolution.destination.empty(2), end), out=out)
"""

WINDOWS = """
for end in (True, False):
    for kernel, stride, padding in ((3, 2, 1), (2, 2, 0), (3, 1, 1), (1, 2, 0)):
        for height, width in ((5, 9), (14, 14), (3, 15), (3, 63), (4, 16)):
            window = Window(kernel=(kernel, kernel), stride=(stride, stride), padding=(padding, padding))
            pitch = window.least_pitch(width)
            source = make_layout(
                channels=3, height=height, width=width, pitch=pitch, lead=window.lead(pitch),
                body=window.body(height, width, pitch),
            )
            rows, columns = window.out_size(height, width)
            destination = make_layout(channels=3, height=rows, width=columns, pitch=columns)
            planes = fenced(source.pack(torch.rand(2, 3, height, width)), end)
            out = fenced(destination.empty(2), end)
            PlaneWindow(window, source=source, destination=destination)(planes, out=out)
"""
NARROW = """
for target in (None, "generic"):
    for end in (True, False):
        for dtype in (torch.int8, torch.float16, torch.bfloat16):
            for rows, length, columns in ((1, 1, 1), (5, 13, 7), (9, 17, 71)):
                found = KeptWeight.from_dense(sparse(rows, length))
                found = replace(found, values=found.values.to(dtype), scales=torch.ones(rows).double())
                for block in (11, length):
                    matrix = CSRBlocks.from_kept(found, block_columns=block, narrow=True)
                    matrix = replace(fence_matrix(matrix, end), scales=fenced(matrix.scales, end))
                    tiling = Tiling(vectors=4, target=target)
                    product = SparseProduct(matrix, columns=columns, pitch=columns, tiling=tiling)
                    x, out = fenced(torch.randn(length, columns), end), fenced(torch.empty(rows, columns), end)
                    product(x, out=out)
                matrix = CSRBlocks.from_kept(found, narrow=True)
                matrix = replace(fence_matrix(matrix, end, with_padding), scales=fenced(matrix.scales, end))
                for tokens in (1, 3):
                    for layout in ("columns", "bitmask"):
                        product = token_product(matrix, end, tokens=tokens, layout=layout, target=target)
                        product(fenced(torch.randn(tokens, length), end))
"""
DENSE = """
from sparsetwin.kernels._dot import emulated_dot
for name in ("amx", "avx512bf16"):
    for end in (True, False):
        for kernel, stride, padding, groups in ((3, 1, 1, 1), (1, 1, 0, 1), (3, 2, 1, 2), (2, 3, 0, 1)):
            for size, tiling in (((5, 9), Tiling()), ((14, 14), Tiling(vectors=3, block=7)), ((2, 63), Tiling())):
                pair = lambda number: (number, number)
                geometry = ConvolutionGeometry(
                    in_channels=10, out_channels=38, kernel=pair(kernel), height=size[0], width=size[1],
                    stride=pair(stride), padding=pair(padding), groups=groups,
                )
                with emulated_dot(name) as dot:
                    tiles = DenseTiles.from_dense(sparse(38, 10 // groups, kernel, kernel), groups=groups, dot=dot)
                    tiles = replace(tiles, tiles=fenced(tiles.tiles, end))
                    bias = fenced(torch.randn(38), end)
                    convolution = DenseConvolution(tiles, geometry=geometry, bias=bias, residual=True, tiling=tiling)
                for part in ("_keep", "_offsets"):
                    setattr(convolution, part, fenced(getattr(convolution, part), end))
                planes = fenced(convolution.source.pack(torch.randn(2, 10, *size)), end)
                residual, out = (fenced(convolution.destination.empty(2), end) for _ in range(2))
                for threads in (1, 3):
                    panels, parts = Panels(convolution.panel_bytes), 64 if threads > 1 else 1
                    memory = torch.empty(panels.byte_count, dtype=torch.uint8)
                    panels._parts = [fenced(memory, end) for _ in range(parts)]
                    for piece in convolution.bound(planes, residual=residual, out=out, panels=panels, threads=threads):
                        piece()
                    assert len(panels._parts) == parts
"""
CASES = {
    "dense": DENSE,
    "narrow": NARROW,
    "products": PRODUCTS,
    "tokens": TOKENS,
    "convolutions": CONVOLUTIONS,
    "windows": WINDOWS,
}


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_nothing_is_touched_beyond_either_end_of_any_array(cases):
    done = subprocess.run([sys.executable, "-c", FENCE + cases + "\nprint('done')"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_the_fence_would_catch_a_kernel_that_reads_too_far():
    script = "x = fenced(torch.ones(4), True)\nprint(ctypes.string_at(x.data_ptr() + 16, 1))"
    done = subprocess.run([sys.executable, "-c", FENCE + script], capture_output=True, text=True)
    assert done.returncode < 0  # killed by the signal
