"""A sparse linear layer on PyTorch's layout, tokens by features, for any number of tokens.

Kernels want features by tokens. Tokens are taken a chunk at a time, so that both transpositions stay in the cache; one
to eight tokens have kernels of their own.
"""

import threading
from functools import partial

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._blocks import check_float32, packed
from sparsetwin.kernels._kept import KeptWeight
from sparsetwin.kernels._launch import Tiling, default_vectors, run_pieces, worth_threads
from sparsetwin.kernels._pool import Piece, Pool
from sparsetwin.kernels._product import SparseProduct, padded_pitch, product_block
from sparsetwin.kernels._specification import Activation, ValueFormat
from sparsetwin.kernels._target import checked_target
from sparsetwin.kernels._tokens import COLUMNS_LIMIT, MAX_TOKENS, TokenProduct
from sparsetwin.kernels._transpose import Transpose

_CHUNK = 128  # tokens transposed at a time


class SparseLinear:
    """``y = activation(linear(x, W, bias) + residual)`` for a sparse W and any number of tokens.

    Pruned weights pass nothing on, as in `SparseProduct`. A token's result may differ in the last bits with the number
    of tokens in the call, never with that of the threads. Calls may run at once.

    Args:
        weight: (M, K), float32; zeros are pruned. Or a `KeptWeight` of it.
        bias: (M,), float32.
        activation: Fused at the store.
        value: How weights are stored for one to eight tokens; more tokens take float32, or what ``tiling`` leaves.
        chunk: Tokens that are transposed at a time.
        tiling: How a chunk's product is cut; chosen by the sizes by default.

    Raises:
        ConfigError: If something does not fit, or no kernel can be made here.
    """

    def __init__(
        self,
        weight: KeptWeight | Tensor,
        *,
        bias: Tensor | None = None,
        activation: Activation | None = None,
        value: ValueFormat = "float32",
        chunk: int = _CHUNK,
        tiling: Tiling | None = None,
    ) -> None:
        self._tiling = tiling = tiling or Tiling()
        target = checked_target(tiling.target)
        if len(weight.shape) != 2 or chunk < 1:
            raise ConfigError(f"weight of shape {tuple(weight.shape)}, chunk={chunk}; expected (M, K), at least 1")
        self._lanes = target.lanes
        self.chunk = -(-chunk // self._lanes) * self._lanes
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        vectors = tiling.vectors or default_vectors(self.chunk, target)
        block = tiling.block or product_block(weight, vectors, target)
        self.matrix = packed(weight, block, narrow=tiling.narrow)
        self._bias, self._activation, self._value = bias, activation, value
        self._products: dict[tuple[int, bool], SparseProduct] = {}
        self._token_products: dict[int, TokenProduct] = {}
        self._few = self.matrix  # in one block, made when it is first needed
        self._local = threading.local()
        self._transpose = Transpose(target)
        self._product(self.chunk, False)  # whatever does not fit is refused now

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, pool: Pool | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., K), float32, any strides.
            residual: (..., M), float32, added before the activation.
            pool: Threads; the caller's alone by default.

        Returns:
            (..., M), float32, contiguous.

        Raises:
            ConfigError: If a tensor's shape or dtype is another one.
        """
        check_float32(x, "x")
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ConfigError(f"x has shape {tuple(x.shape)}; expected (..., {self.in_features})")
        shape = (*x.shape[:-1], self.out_features)
        if residual is not None and tuple(residual.shape) != shape:
            raise ConfigError(f"the residual has shape {tuple(residual.shape)}; expected {shape}")
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        tokens = flat.shape[0]
        if residual is not None:
            check_float32(residual, "the residual")
            residual = residual.reshape(-1, self.out_features)
        if self._has_token_product(tokens, with_residual=residual is not None):
            y = self._token_product(tokens)(flat.contiguous(), pool=pool)
            if residual is not None:
                y += residual.detach()
            return y if flat is x else y.reshape(shape)
        out = torch.empty(tokens, self.out_features, dtype=torch.float32, device="cpu")
        pieces: list[Piece] = [
            partial(self._run_chunk, flat, residual, out, start) for start in range(0, tokens, self.chunk)
        ]
        if len(pieces) == 1:
            self._run_chunk(flat, residual, out, 0, pool=pool)
        else:
            run_pieces(pieces, pool if worth_threads(self.matrix, tokens) else None)
        return out if flat is x else out.reshape(shape)

    @torch.no_grad()
    def _run_chunk(
        self, x: Tensor, residual: Tensor | None, out: Tensor, start: int, *, pool: Pool | None = None
    ) -> None:
        """Transpose a chunk of tokens, multiply, transpose back. Columns behind the last token are never read back."""
        stop = min(start + self.chunk, x.shape[0])
        columns = -(-(stop - start) // self._lanes) * self._lanes
        source, destination, added = self._workspace(residual is not None)
        self._across(x[start:stop], source[:, : stop - start])
        if added is not None and residual is not None:
            self._across(residual[start:stop], added[:, : stop - start])
            added = added[:, :columns]
        product = self._product(columns, residual is not None)
        product(source[:, :columns], residual=added, out=destination[:, :columns], pool=pool)
        self._transpose(destination[:, : stop - start], out=out[start:stop])

    def _across(self, rows: Tensor, out: Tensor) -> None:
        if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]:
            self._transpose(rows, out=out)
        else:
            out.copy_(rows.t())

    def _workspace(self, with_residual: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return this thread's buffers, (features, chunk) at a padded pitch; zero where no token was ever written."""
        found: dict[str, Tensor] = self._local.__dict__
        pitch = padded_pitch(self.chunk)
        if "source" not in found:
            found["source"] = torch.zeros(self.in_features, pitch, dtype=torch.float32, device="cpu")
            found["destination"] = torch.empty(self.out_features, pitch, dtype=torch.float32, device="cpu")
        if with_residual and "added" not in found:
            found["added"] = torch.zeros(self.out_features, pitch, dtype=torch.float32, device="cpu")
        return found["source"], found["destination"], found["added"] if with_residual else None

    def _product(self, columns: int, residual: bool) -> SparseProduct:
        key = (columns, residual)
        if key not in self._products:
            self._products[key] = SparseProduct(
                self.matrix,
                columns=columns,
                pitch=padded_pitch(self.chunk),
                bias=self._bias,
                activation=self._activation,
                residual=residual,
                tiling=self._tiling,
            )
        return self._products[key]

    def _has_token_product(self, tokens: int, *, with_residual: bool) -> bool:
        """Return whether so few tokens have a kernel of their own, which applies the activation before any residual."""
        few = 1 <= tokens <= MAX_TOKENS and self.in_features <= COLUMNS_LIMIT
        return few and not (with_residual and self._activation is not None)

    def _token_product(self, tokens: int) -> TokenProduct:
        if tokens not in self._token_products:
            if not self._token_products and self.matrix.blocks > 1:
                self._few = self.matrix.in_one_block()
            self._token_products[tokens] = TokenProduct(
                self._few,
                tokens=tokens,
                bias=self._bias,
                activation=self._activation,
                value=self._value,
                target=self._tiling.target,
            )
        return self._token_products[tokens]
