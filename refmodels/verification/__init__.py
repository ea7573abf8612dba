"""Verify somebody else's T5, OPT or BLOOM: which step is the first that is wrong, how wrong, why (`spec/verification.md`)."""
