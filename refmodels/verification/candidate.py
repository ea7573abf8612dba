"""What is verified: anything that takes a model's inputs and gives arrays by the names of our steps.

The forms that are ready are in `forms` (a Python function, a process, a directory of dumps) and `adaptors` (packages).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from refmodels.op import Array

OUTPUTS = {
    "logits": ("t5_logits", "opt_logits", "bloom_logits"),
    "hidden": ("t5_decoder", "opt_backbone", "bloom_backbone"),
    "encoder_sequence_output": ("t5_encoder",),
    "decoder_sequence_output": ("t5_decoder",),
}
"""Names that a candidate may give its outputs -> the steps of ours that they stand for, one for each family."""


class CandidateError(RuntimeError):
    """A candidate that cannot be run or that does not give what it is asked for; the message says what it did."""


class Candidate(ABC):
    """An implementation under test.

    name       what reports call it
    dtype      the type it computes in: float32, float16, bfloat16 or float64
    products   `tf32` or `bfloat16` where it says that it rounds the inputs of its float32 products so, else empty
    injects    steps of ours at which it lets its value be replaced, such as `layers.0:opt_decoder_layer`
    """

    name: str
    dtype: str
    products: str = ""
    injects: frozenset[str] = frozenset()

    @abstractmethod
    def run(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """Run it on a model's inputs (`token_ids`, `padding_mask`, or T5's four); its steps by our names and in our layout.

        At the steps that `inject` names, it goes on with these arrays in place of its own, and gives its own all the same.
        CandidateError if it fails.
        """

    def chunked(self, inputs: Mapping[str, Array], sizes: Sequence[int]) -> Array | None:
        """Its logits (b, t, v) with its cache, the (decoder's) tokens taken in chunks of these sizes; None without a cache."""
        return None

    def generate(self, inputs: Mapping[str, Array], count: int) -> Array | None:
        """The `count` tokens (b, count) that it chooses greedily after these inputs, stopping at none; None if it cannot."""
        return None

    def facts(self) -> dict[str, str]:
        """Versions and settings that a report should show."""
        return {}

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Give up processes and files."""
