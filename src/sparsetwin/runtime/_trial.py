"""One node on planes, run to be timed."""

import torch
from torch import Tensor

from sparsetwin.kernels import Panels, Pool, SparseConvolution, Tiling, host_target, lanes_of, max_vectors
from sparsetwin.runtime._layouts import lay_out
from sparsetwin.runtime._lowering import Lowered
from sparsetwin.runtime._products import Packed
from sparsetwin.runtime._segments import PlaneKernel, bind_all, panel_bytes
from sparsetwin.runtime._steps import Mean, Pack, Product, Step
from sparsetwin.runtime._steps import Pool as PoolStep
from sparsetwin.runtime._timing import shortest

_REPEATED = 6  # times that several threads run a node in one chain, to which they come late


class Trial:
    """One node's steps on planes of one image, with random activations."""

    def __init__(self, lowered: Lowered, packed: Packed, pool: Pool | None, generator: torch.Generator) -> None:
        self.lowered, self.packed, self.pool = lowered, packed, pool
        self.layouts = lay_out(lowered, packed.dtype)
        self.planes = {sheet: layout.empty(1) for sheet, layout in self.layouts.items()}
        self.values: dict[int, Tensor] = {}
        self.kernels: dict[Step, PlaneKernel] = {}
        for step in lowered.steps:
            if isinstance(step, Pack):
                layout = self.layouts[step.sheet]
                shape = (1, layout.channels, layout.height, layout.width)
                images = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
                layout.pack(images, out=self.planes[step.sheet])
            elif isinstance(step, Mean):
                sheet = lowered.sheets[step.source]
                self.values[step.value] = torch.empty(sheet.images, sheet.channels, dtype=torch.float32, device="cpu")
            elif isinstance(step, PoolStep):
                self.kernels[step] = step.kernel(self.layouts)

    def seconds(self, tiling: Tiling, *, dense: bool = False) -> float:
        """Return the seconds of one image, by a sparse kernel or the dense one in bfloat16."""
        steps = [step for step in self.lowered.steps if not isinstance(step, Pack)]
        for step in steps:
            if isinstance(step, Product):
                source, destination = self.layouts[step.source], self.layouts[step.sheet]
                if dense:
                    self.kernels[step] = self.packed.dense_convolution(
                        step.node, step.geometry, tiling=tiling, source=source, destination=destination
                    )
                else:
                    self.kernels[step] = self.packed.for_step(step, source, destination, tiling)
        times = _REPEATED if self.pool else 1
        panels = Panels(panel_bytes(self.kernels.values()))
        bound = bind_all(
            steps * times,
            sheets=self.lowered.sheets,
            layouts=self.layouts,
            planes=self.planes.__getitem__,
            kernels=self.kernels,
            panels=panels,
            threads=self.pool.threads if self.pool else 1,
            pool=self.pool,
        )

        def run() -> None:
            for one in bound:
                one(self.values, 0)

        return shortest(run, threads=self.pool.threads if self.pool else 1) / times

    def other_tilings(self) -> list[Tiling]:
        """Return what to try beside the default: other widths of a tile, other blocks of channels."""
        (step,) = [step for step in self.lowered.steps if isinstance(step, Product)]
        kernel = self.kernels[step]
        assert isinstance(kernel, SparseConvolution)
        geometry = step.geometry
        per_group = geometry.in_channels // geometry.groups
        block = kernel.matrix.block_columns // (geometry.kernel[0] * geometry.kernel[1])
        blocks = {block // 2, 2 * block, per_group} - {block, 0} if geometry.groups == 1 else set()
        found = [Tiling(block=min(other, per_group)) for other in sorted(blocks)]
        columns = kernel.destination.pitch * geometry.out_size[0]
        half = self.packed.half
        target = host_target() if half is None else half.target
        lanes = lanes_of(target, "float32" if half is None else "float16")
        for vectors in (6, 10) if half is None else (2, 4):
            if vectors * lanes < columns + lanes and vectors <= max_vectors(target):
                found.append(Tiling(vectors=vectors, block=block if geometry.groups == 1 else None))
        return found
