"""From scores to the next token."""

import numpy as np

from refmodels.numerics import exact, ulps
from refmodels.op import Array, Bool, Float, Int, op
from refmodels.ops.precision import wide


@op(laws=("shift invariant",))
def log_softmax(logits: Float[Array, "*b v"], temperature: float = 1.0) -> Float[Array, "*b v"]:
    """Logarithm of softmax(logits / temperature), in float32 or wider: y - log(sum(exp(y))), y = (x - max) / temperature."""
    shifted = (wide(logits) - wide(logits).max(-1, keepdims=True)) / temperature
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@op(error=ulps(2), laws=("rowwise",), source="Keskar et al. 2019, section 4.1; negative scores as in Transformers")
def penalise_repetition(
    logits: Float[Array, "b v"], token_ids: Int[Array, "b s"], mask: Bool[Array, "b s"], penalty: Float[Array, "b"]
) -> Float[Array, "b v"]:
    """Make the tokens that row i holds (token_ids where mask is true) less likely, all by the same factor penalty[i].

    A score from 0 on is divided by it, a negative one multiplied. Once is as good as often. float32 or wider.
    """
    scores, held = wide(logits), np.zeros(logits.shape, bool)
    rows, places = np.nonzero(mask)
    held[rows, token_ids[rows, places]] = True
    factor = np.where(held, penalty[:, None], 1.0).astype(scores.dtype)
    return np.where(scores < 0, scores * factor, scores / factor)


@op(error=exact(), laws=("rowwise",), source="Paulus et al. 2018, section 2.5")
def forbid_ngrams(
    logits: Float[Array, "b v"], token_ids: Int[Array, "b s"], mask: Bool[Array, "b s"], size: Int[Array, "b"]
) -> Float[Array, "b v"]:
    """-inf for each token that would complete a run of size[i] tokens that row i (token_ids where mask is true) already holds.

    Size 1 forbids every token that the row holds, size 0 none. float32 or wider.
    """
    scores = np.array(wide(logits))
    for i, n in enumerate(size):
        held = token_ids[i, mask[i]]
        if 0 < n <= len(held):
            runs = np.lib.stride_tricks.sliding_window_view(held, n)
            completed = (runs[:, :-1] == held[len(held) - n + 1 :]).all(-1)
            scores[i, runs[completed, -1]] = -np.inf
    return scores


@op(error=exact(), laws=("rowwise",))
def allow_tokens(logits: Float[Array, "b v"], allowed: Bool[Array, "b v"]) -> Float[Array, "b v"]:
    """-inf for each token that is not allowed. float32 or wider."""
    return np.where(allowed, wide(logits), -np.inf).astype(wide(logits).dtype)


@op(error=exact(), laws=("rowwise",))
def has_choice(logits: Float[Array, "b v"]) -> Bool[Array, "b"]:
    """Whether a row has any token with a score above -inf."""
    return np.asarray((wide(logits) > -np.inf).any(-1))


@op(laws=("rowwise",))
def token_log_probs(logits: Float[Array, "*b v"], token_ids: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """The logarithm of each row's probability of one token, log_softmax(logits)[token], in float32 or wider."""
    return np.take_along_axis(log_softmax.reference(logits), token_ids[..., None], -1)[..., 0]


@op(error=exact(), laws=("rowwise",))
def greedy_token(logits: Float[Array, "b v"]) -> Int[Array, "b"]:
    """The token with the highest score; of equal ones the first."""
    return logits.argmax(-1)


@op(
    error=exact(),
    laws=("rowwise",),
    source="Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p); Nguyen et al. 2025 (min-p)",
)
def sample_token(
    logits: Float[Array, "b v"],
    uniform: Float[Array, "b"],
    *,
    temperature: Float[Array, "b"] | None = None,
    top_k: Int[Array, "b"] | None = None,
    top_p: Float[Array, "b"] | None = None,
    min_p: Float[Array, "b"] | None = None,
) -> Int[Array, "b"]:
    """Draw from softmax(logits / temperature), row i at the point uniform[i] in [0, 1) of its cumulative distribution.

    Tokens are laid out from the most to the least likely (equal ones by id). `top_k` keeps the first k, then `top_p` the
    shortest start whose probability exceeds p, then `min_p` what has at least p times the probability of the first; what is
    kept is drawn from in proportion.
    """
    order = np.argsort(-wide(logits), axis=-1, kind="stable")
    ranked = np.take_along_axis(wide(logits), order, -1)
    below = (ranked - ranked[:, :1]).astype(np.float64)
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the most likely token alone
        relative = np.exp(below if temperature is None else below / temperature[:, None])
    kept = relative  # nothing is cut off the row, so that its sums are the same bits whatever other rows ask for
    if top_k is not None:
        kept = np.where(np.arange(kept.shape[1]) < top_k[:, None], kept, 0.0)
    if top_p is not None:
        probability = kept / kept.sum(-1, keepdims=True)
        before = np.cumsum(probability, -1) - probability
        kept = np.where(before <= top_p[:, None], kept, 0.0)  # before the first token is 0: it always stays
    if min_p is not None:
        kept = np.where(relative >= min_p[:, None], kept, 0.0)
    cumulative = np.cumsum(kept, -1)
    place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    last = (kept > 0).sum(-1) - 1  # rounding may put the point behind the last kept token
    return np.take_along_axis(order, np.minimum(place, last)[:, None], -1)[:, 0]


@op()
def beam_candidates(
    log_probabilities: Float[Array, "b v"], scores: Float[Array, "b"], count: int
) -> tuple[Array, Array, Array]:
    """The `count` best continuations of b beams: their scores (sums of log probabilities), beams and tokens, best first."""
    total = scores[:, None] + log_probabilities
    best = np.argsort(-total, axis=None, kind="stable")[:count]
    beams, tokens = np.divmod(best, log_probabilities.shape[1])
    return total[beams, tokens], beams, tokens


@op()
def likeliest_tokens(logits: Float[Array, "b v"], count: int, *, temperature: float = 1.0) -> tuple[Array, Array]:
    """The probabilities of the `count` most likely tokens of each row, and the tokens, [b, count]; of equal ones the first."""
    tokens = np.argsort(-wide(logits), axis=-1, kind="stable")[:, :count]
    return np.take_along_axis(np.exp(log_softmax.reference(logits, temperature)), tokens, -1), tokens


@op(error=exact(), source="Su et al. 2022, eq. 5")
def contrastive_choice(
    probabilities: Float[Array, "1 b"], hidden: Float[Array, "b n"], earlier: Float[Array, "1 s n"], *, alpha: float
) -> Int[Array, "1"]:
    """The best of b candidates: (1 - alpha) * probability - alpha * (largest cosine of its hidden state with an earlier one).

    Of equal ones the first. A candidate of probability 0 is none. A zero vector has cosine 0 with every other.
    """
    candidates, past = hidden.astype(np.float64), earlier[0].astype(np.float64)  # squares of float32's extremes
    lengths = np.sqrt((candidates**2).sum(-1))[:, None] * np.sqrt((past**2).sum(-1))
    cosine = candidates @ past.T / np.where(lengths > 0, lengths, 1.0)
    score = (1.0 - alpha) * probabilities - alpha * cosine.max(-1)
    return np.where(probabilities > 0, score, -np.inf).argmax(-1)
