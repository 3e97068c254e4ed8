"""The model itself with its linear layers exchanged for sparse ones: any control flow, any number of tokens.

For what is not traced: key-value caches, lengths that nobody has planned. Whether a layer runs sparse or dense is
measured for one, eight and many tokens; a call takes what was measured for the next larger number.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetwin.kernels import Pool, SparseLinear
from sparsetwin.runtime._timing import shortest

_TOKENS = (1, 8, 128)  # that each layer is measured with


class FastLinear(nn.Module):
    """A linear layer that runs sparse for as many tokens as it is faster; it has no parameters.

    Args:
        weight: (out, in), float32.
        bias: (out,), float32.
        shown: ``weight`` as the exchanged layer has it, for models that compute with it themselves.
        threads: Of the kernel.
        reduced: Whether weights may be rounded to bfloat16 for one to eight tokens.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, shown: Tensor, threads: int, reduced: bool) -> None:
        super().__init__()
        self.weight, self.bias = shown, bias
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self._pool = Pool(threads) if threads > 1 else None
        self._weight = weight
        self._sparse = SparseLinear(weight, bias=bias, value="bfloat16" if reduced else "float32")
        self.sparse_for = {tokens: self._is_faster(tokens) for tokens in _TOKENS}

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        tokens = x.numel() // self.in_features
        measured = next((count for count in _TOKENS if count >= tokens), _TOKENS[-1])
        if x.dtype == torch.float32 and tokens and self.sparse_for[measured]:
            return self._sparse(x.detach(), pool=self._pool)
        return F.linear(x, self._weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        """Tell for how many tokens it runs sparse."""
        found = ", ".join(f"{count}: {'sparse' if sparse else 'dense'}" for count, sparse in self.sparse_for.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, tokens {{{found}}}"

    @torch.no_grad()
    def _is_faster(self, tokens: int) -> bool:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(tokens, self.in_features, generator=generator, dtype=torch.float32, device="cpu")
        threads = self._pool.threads if self._pool else 1
        dense = shortest(lambda: F.linear(x, self._weight, self.bias), threads=threads)
        return shortest(lambda: self._sparse(x, pool=self._pool), threads=threads) < dense


def swapped_linears(model: nn.Module, *, threads: int, reduced: bool) -> nn.Module:
    """Return a copy of a model with fast linears in place, or the model itself if none is worth it.

    Linear layers and the ``Conv1D`` of transformers are exchanged, where at most half of the weights are kept and the
    sparse layer is faster for some number of tokens. Other parameters are shared with the model.
    """
    memory: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    swapped = copy.deepcopy(model, memory)
    made: dict[int, FastLinear] = {}
    for parent in list(swapped.modules()):
        for name, child in list(parent.named_children()):
            weight = _linear_weight(child)
            if weight is None or 2 * int(weight.count_nonzero()) > weight.numel():
                continue
            if id(child) not in made:
                shown, bias = child.weight, child.bias
                assert isinstance(shown, Tensor)
                assert bias is None or isinstance(bias, Tensor)
                made[id(child)] = FastLinear(
                    weight.detach().contiguous(),
                    None if bias is None else bias.detach(),
                    shown=shown.detach(),
                    threads=threads,
                    reduced=reduced,
                )
            if any(made[id(child)].sparse_for.values()):
                setattr(parent, name, made[id(child)])
    return swapped if any(any(fast.sparse_for.values()) for fast in made.values()) else model


def _linear_weight(module: nn.Module) -> Tensor | None:
    """Return the (out, in) weight of a layer that can be exchanged: of exactly these classes, without hooks."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype != torch.float32 or weight.dim() != 2:
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.Linear:
        return weight
    return weight.t() if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None
