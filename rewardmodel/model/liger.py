"""A loaded classifier -> the same, with the kernels of liger for norms, rotary embeddings and gated MLPs.

liger-kernel (Hsu et al. 2024, arXiv:2410.10989) computes each of them in one operation, forward and backward, where
transformers takes about ten. On a GPU that is a fifth of the time of a step.
"""

import sys
from collections.abc import Callable
from typing import Any

ROTARY = "apply_rotary_pos_emb"
"""Function of transformers' modules by which attention rotates queries and keys."""


def use_liger(model: Any) -> None:
    """Let the decoder of a classifier compute by liger's kernels, in place.

    liger replaces classes and functions of transformers' module, too, and the forward pass of a whole classifier by
    that of a language model. Other models of this process, on a CPU perhaps, keep what they have: only modules of
    this decoder change, and how queries and keys on GPUs are rotated.

    Args:
        model: of one of `model.families.LIGER_FAMILIES`, on a GPU.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # here, because it needs a GPU

    decoder = getattr(model, model.base_model_prefix)
    module = sys.modules[type(decoder).__module__]
    before = dict(vars(module))
    _apply_liger_kernel_to_instance(decoder, cross_entropy=False, fused_linear_cross_entropy=False)
    fused = getattr(module, ROTARY)
    for name, value in before.items():
        setattr(module, name, value)
    plain = before[ROTARY]
    setattr(module, ROTARY, plain if hasattr(plain, "without_liger") else _on_gpus(fused, plain))


def _on_gpus(fused: Callable, plain: Callable) -> Callable:
    """Return a rotation of queries and keys that is `fused` on GPUs and `plain` elsewhere."""

    def rotate(queries: Any, *args: Any, **kwargs: Any) -> Any:
        return (fused if queries.is_cuda else plain)(queries, *args, **kwargs)

    rotate.without_liger = plain  # type: ignore[attr-defined]
    return rotate
