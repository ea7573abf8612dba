"""Scores of given text: the log-probability that a model gives each token, as `task.score` returns them."""

from dataclasses import dataclass

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import Array
from refmodels.ops.sampling import token_log_probs

CHUNK = 2**22
"""Most logits that exist at a time: 16 MB in float32, 16 tokens of BLOOM's vocabulary."""


@dataclass(frozen=True, eq=False)
class Score:
    """Log-probabilities (natural logarithms) of the scored tokens of each row, from the left, padded on the right.

    token_ids   int64 (b, t), the scored tokens; 0 in padding
    mask        boolean (b, t), False in padding
    log_probs   float64 (b, t), log p(token | all before it); 0 in padding
    """

    token_ids: Array
    mask: Array
    log_probs: Array

    @property
    def counts(self) -> Array:
        """How many tokens of each row are scored, (b,)."""
        return np.asarray(self.mask.sum(-1))

    @property
    def total(self) -> Array:
        """The log-probability of each row's scored tokens together, (b,)."""
        return np.asarray(self.log_probs.sum(-1))

    @property
    def perplexity(self) -> Array:
        """exp(-total / counts), (b,); NaN for a row without a scored token."""
        counts = np.where(self.counts, self.counts, np.nan)
        return np.asarray(np.exp(-self.total / counts))


def score_tokens(backbone: Backbone, hidden: Array, token_ids: Array, scored: Array) -> Score:
    """Score token_ids[i, j] by the logits of hidden[i, j], wherever `scored`; a chunk of logits at a time.

    hidden (b, t, n), token_ids and scored (b, t) are NumPy arrays. The probabilities are the softmax, in float32 or wider, of
    the very logits that `generate` sees, which are rounded to the compute type.
    """
    states, ids = hidden[scored], token_ids[scored]
    log_probs = np.zeros(len(ids))
    step = max(1, CHUNK // backbone.config.vocabulary_size)
    with backbone.running():
        for start in range(0, len(ids), step):
            chunk = slice(start, start + step)
            logits = backbone.logits(backbone.on_device(states[chunk]))
            log_probs[chunk] = backbone.on_host(token_log_probs(logits, backbone.on_device(ids[chunk])))
    counts = scored.sum(-1)
    mask = np.arange(counts.max(initial=0)) < counts[:, None]  # as `scored` does, it runs through the rows one by one
    score = Score(np.zeros(mask.shape, np.int64), mask, np.zeros(mask.shape))
    score.token_ids[mask], score.log_probs[mask] = ids, log_probs
    return score
