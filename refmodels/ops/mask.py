"""Which keys a query may look at. A mask is boolean: True permits."""

import numpy as np

from refmodels.numerics import exact
from refmodels.op import Array, Bool, Int, op


@op(error=exact())
def causal_mask(positions: Int[Array, "#b t"], key_mask: Bool[Array, "#b s"]) -> Bool[Array, "b 1 t s"]:
    """Permit the real keys that are not after the query. Key number s is at position s."""
    not_after = np.arange(key_mask.shape[1]) <= positions[:, :, None]
    return (not_after & key_mask[:, None, :])[:, None]


@op(error=exact())
def key_mask(padding_mask: Bool[Array, "b s"]) -> Bool[Array, "b 1 1 s"]:
    """Permit the real keys to every query."""
    return padding_mask[:, None, None, :]
