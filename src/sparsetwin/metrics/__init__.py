"""What a run costs and what its masks look like: FLOPs, exact zeros, mask change, agreement of two models."""

from sparsetwin.metrics.agreement import Agreement, compare_logits
from sparsetwin.metrics.flops import ForwardFlops, LayerFlops, count_forward_flops
from sparsetwin.metrics.ledger import FlopsLedger, training_flops
from sparsetwin.metrics.mask_change import MaskChange, mask_change
from sparsetwin.metrics.sparsity import LayerSparsity, nonzero_counts, sparsity_table

__all__ = [
    "Agreement",
    "FlopsLedger",
    "ForwardFlops",
    "LayerFlops",
    "LayerSparsity",
    "MaskChange",
    "compare_logits",
    "count_forward_flops",
    "mask_change",
    "nonzero_counts",
    "sparsity_table",
    "training_flops",
]
