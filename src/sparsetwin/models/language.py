"""A small GPT: a decoder-only transformer that predicts the next token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetwin.errors import ConfigError


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and the positions before it."""

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        batch, time, width = hidden.shape
        split = self.qkv(hidden).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return out


class GPTBlock(nn.Module):
    """Layer norm and attention, then layer norm and a GELU network of four times the width, each beside a shortcut."""

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads=heads, dropout=dropout)
        self.ln2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        hidden = hidden + self.dropout(self.attention(self.ln1(hidden)))
        hidden = hidden + self.dropout(self.contract(self.gelu(self.expand(self.ln2(hidden)))))
        return hidden


class GPT(nn.Module):
    """The network that `gpt` builds; its last layer, not tied to the token embedding, is ``head``."""

    def __init__(self, vocabulary: int, *, context: int, layers: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.context = context
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads=heads, dropout=dropout) for _ in range(layers)))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        _initialise_(self, residual_branches=2 * layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each position's next token.

        Args:
            tokens: (batch, time), int64, ``time <= context``.

        Returns:
            (batch, time, vocabulary), float.

        Raises:
            ConfigError: If there are more tokens than the context holds.
        """
        time = tokens.shape[1]
        if time > self.context:
            raise ConfigError(f"this GPT has a context of {self.context} tokens, got {time}")
        positions = torch.arange(time, device=tokens.device)
        hidden = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        logits: Tensor = self.head(self.ln(self.blocks(hidden)))
        return logits


def _initialise_(model: nn.Module, *, residual_branches: int) -> None:
    """Draw all weights with deviation 0.02, less for layers that end a residual branch; zero the biases."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            ends_branch = name.endswith((".out", ".contract"))
            nn.init.normal_(module.weight, std=0.02 / residual_branches**0.5 if ends_branch else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def gpt(
    vocabulary: int, *, context: int = 128, layers: int = 4, heads: int = 4, width: int = 128, dropout: float = 0.0
) -> GPT:
    """Build a small GPT.

    >>> gpt(65, context=16, layers=1, heads=2, width=8)(torch.zeros(1, 5, dtype=torch.int64)).shape
    torch.Size([1, 5, 65])

    Args:
        vocabulary: Number of tokens.
        context: Most tokens that it can see.
        layers: Transformer blocks.
        heads: Attention heads of a block; divides ``width``.
        width: Size of a token's representation.
        dropout: Chance that an activation is dropped in training.

    Raises:
        ConfigError: If ``heads`` does not divide ``width``, or a size is less than 1.

    Source: Radford et al., 2019, "Language models are unsupervised multitask learners"; there the output layer is the
        token embedding, here it has weights of its own.
    """
    sizes = {"vocabulary": vocabulary, "context": context, "layers": layers, "heads": heads, "width": width}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} needs to be at least 1, got {size}")
    if width % heads:
        raise ConfigError(f"heads needs to divide width, got {heads} heads and width {width}")
    return GPT(vocabulary, context=context, layers=layers, heads=heads, width=width, dropout=dropout)
