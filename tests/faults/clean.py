"""Correct models, awkward ones among them, on which the gradient check must stay silent."""

import torch
from faults.clean_attention import ATTENTION
from faults.clean_case import Clean
from faults.clean_images import IMAGES
from faults.clean_layers import LAYERS
from faults.clean_losses import LOSSES
from faults.clean_rows import CLEAN_ROWS
from faults.clean_sequences import SEQUENCES
from faults.clean_structures import STRUCTURES

__all__ = ["CLEAN", "Clean", "count_tensors"]

CLEAN: tuple[Clean, ...] = (
    *IMAGES,
    *SEQUENCES,
    *ATTENTION,
    *LAYERS,
    *LOSSES,
    *STRUCTURES,
    *CLEAN_ROWS,
)


def count_tensors() -> int:
    """How many parameter tensors the clean models hold together."""
    with torch.random.fork_rng(devices=[]):
        return sum(len(list(case.build().parameters())) for case in CLEAN)
