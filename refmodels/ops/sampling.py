"""From scores to the next token."""

import numpy as np

from refmodels.numerics import exact
from refmodels.op import Array, Float, Int, op
from refmodels.ops.precision import wide


@op(laws=("shift invariant",))
def log_softmax(logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
    """Logarithm of softmax, in float32 or wider: x - max - log(sum(exp(x - max)))."""
    shifted = wide(logits) - wide(logits).max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@op(error=exact(), laws=("rowwise",))
def greedy_token(logits: Float[Array, "b v"]) -> Int[Array, "b"]:
    """The token with the highest score; of equal ones the first."""
    return logits.argmax(-1)


@op(error=exact(), laws=("rowwise",), source="Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p)")
def sample_token(
    logits: Float[Array, "b v"],
    uniform: Float[Array, "b"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "b"]:
    """Draw from softmax(logits / temperature), row i at the point uniform[i] in [0, 1) of its cumulative distribution.

    Tokens are laid out from the most to the least likely (equal ones by id). `top_k` keeps the first k, `top_p` the shortest
    start whose probability exceeds p; what is kept is drawn from in proportion.
    """
    order = np.argsort(-wide(logits), axis=-1, kind="stable")[:, :top_k]
    kept = np.take_along_axis(wide(logits), order, -1)
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the most likely token alone
        probability = np.exp((kept - kept[:, :1]).astype(np.float64) / temperature)
    probability /= probability.sum(-1, keepdims=True)
    if top_p is not None:
        before = np.cumsum(probability, -1) - probability
        probability = np.where(before <= top_p, probability, 0.0)  # before the first token is 0: it always stays
    cumulative = np.cumsum(probability, -1)
    place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    last = (probability > 0).sum(-1) - 1  # rounding may put the point behind the last kept token
    return np.take_along_axis(order, np.minimum(place, last)[:, None], -1)[:, 0]


@op()
def beam_candidates(logits: Float[Array, "b v"], scores: Float[Array, "b"], count: int) -> tuple[Array, Array, Array]:
    """The `count` best continuations of b beams: their scores (sums of log probabilities), beams and tokens, best first."""
    total = scores[:, None] + log_softmax.reference(logits)
    best = np.argsort(-total, axis=None, kind="stable")[:count]
    beams, tokens = np.divmod(best, logits.shape[1])
    return total[beams, tokens], beams, tokens
