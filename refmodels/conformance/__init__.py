"""Is an accelerator, or one kernel, right? Examples drawn from the ops' annotations, judged by their error models.

    from refmodels.conformance import check_op
    check_op(layer_norm, my_layer_norm, "float32", tiles=(16,))     # AssertionError: the smallest example that is wrong

`refmodels check --accelerator NAME` is the same for everything. What is drawn and which laws are held is in
`spec/conformance.md`. `cases` is a strategy for Hypothesis, which nothing else here needs.
"""

from refmodels.conformance.check import EXAMPLES, Checked, Failure, cases, check_accelerator, check_op, reproduce, searched
from refmodels.conformance.examine import Wrong, examine

__all__ = [
    "EXAMPLES",
    "Checked",
    "Failure",
    "Wrong",
    "cases",
    "check_accelerator",
    "check_op",
    "examine",
    "reproduce",
    "searched",
]
