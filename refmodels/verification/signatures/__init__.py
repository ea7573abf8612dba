"""Faults by name: what people get wrong in these models (`spec/verification-signatures.md`).

Most are edits of our own steps: a step of theirs that disagrees is judged once more under every hypothesis that could touch
it. Where our step with the fault in it gives what theirs gives, within the same bound, that is the name of what is wrong. The
others are seen in the arrays: an overflow, a permutation, a constant factor.
"""

from refmodels.verification.signatures import attention, embeddings, feedforward, heads, masks, norms, rules, weights
from refmodels.verification.signatures.diagnosis import Finding, diagnose
from refmodels.verification.signatures.fault import Fault, Variant

__all__ = ["FAULTS", "Fault", "Finding", "Variant", "diagnose"]

FAULTS: list[Fault] = [
    *embeddings.FAULTS,
    *norms.FAULTS,
    *attention.FAULTS,
    *masks.FAULTS,
    *heads.FAULTS,
    *weights.FAULTS,
    *feedforward.FAULTS,
    *rules.FAULTS,
]
