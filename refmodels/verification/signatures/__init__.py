"""Faults by name: what people get wrong in these models (`spec/verification-signatures.md`).

Most are edits of our own steps: a step of theirs that disagrees is judged once more under every hypothesis that could touch
it. Where our step with the fault in it gives what theirs gives, within the same bound, that is the name of what is wrong. The
others are seen in the arrays: an overflow, a permutation, a constant factor.
"""

from refmodels.verification.signatures import attention, embeddings, feedforward, heads, masks, norms, rules, weights
from refmodels.verification.signatures.diagnosis import Finding, diagnose
from refmodels.verification.signatures.fault import Fault, Variant

__all__ = ["FAULTS", "Fault", "Finding", "Variant", "diagnose", "table"]

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


def table() -> str:
    """The table of `spec/verification-signatures.md`: every name, the models that it can happen in, and what it says."""
    rows = [
        f"| `{fault.name}` | {', '.join(fault.families)} | {'seen' if not fault.ops else 'tried'} | {fault.says} |"
        for fault in FAULTS
    ]
    return "\n".join(["| name | models | how | what it says |", "|---|---|---|---|", *rows, ""])
