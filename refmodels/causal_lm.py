"""The task of a decoder alone: text is continued."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refmodels.generate import padded
from refmodels.op import Array
from refmodels.scoring import Score, score_tokens
from refmodels.task import Batch, Task


class CausalLM(Task):
    """A decoder with its head: text is continued."""

    kind = "causal_lm"

    def embed(self, inputs: Any) -> dict[str, Array]:
        prompts = self._prompts(inputs)
        ids, mask = padded(prompts, max(map(len, prompts)))
        return {"embeddings": self.backbone.token_embedding(ids), "padding_mask": mask.astype(np.int64)}

    def score(self, inputs: Any, targets: Any = None) -> Score:
        """The log-probability of each token of a text but the first, given those before it; with `targets`, of their tokens
        alone, which go on from the inputs.

        inputs, targets  a string, a list of strings, or a dictionary of `token_ids` and `padding_mask` (b, t)

        What is before a text is what `generate` puts there: behind a start token the first token of the text is scored, too.
        No end token is added. What padding holds, and where it stands, is of no account.
        """
        if isinstance(inputs, Mapping):
            self.backbone.warn_of_unknown(inputs)
        rows = self._prompts(inputs)
        given = [1] * len(rows)
        if targets is not None:
            more = self._target_tokens(targets, len(rows))
            given = [max(1, len(row)) for row in rows]
            rows = [row + new for row, new in zip(rows, more, strict=True)]
        length = max(map(len, rows))
        ids, mask = padded(rows, max(2, length))
        hidden = self.backbone({"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]})
        scored = mask & (np.arange(mask.shape[1]) >= np.array([[count] for count in given]))
        return score_tokens(self.backbone, hidden, ids[:, 1:], scored[:, 1:])

    def _prompts(self, inputs: Any) -> list[list[int]]:
        """The tokens of each row to go on from."""
        if not isinstance(inputs, Mapping):
            texts, _ = self._texts(inputs)
            self._need_tokenizer("text")
            prompts: list[list[int]] = self.preprocessor.prompts(texts)
            return prompts
        self._refuse_vectors(inputs)
        ids, mask = self._real_tokens(inputs)
        return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]

    def _batch_of_texts(self, texts: list[Any], max_length: int | None, max_new_tokens: int | None) -> Batch:
        self._need_tokenizer("text")
        length = self._default_length(max_length, max_new_tokens)
        return self._bounded(self.preprocessor.prompts(texts), length, max_length, max_new_tokens)

    def _batch_of_ids(self, inputs: Mapping[str, Any], max_length: int | None, max_new_tokens: int | None) -> Batch:
        ids, mask = self._real_tokens(self._with_placeholders(inputs))
        prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        width = ids.shape[1] if max_new_tokens is None else ids.shape[1] + max_new_tokens
        batch = self._bounded(prompts, width if max_length is None else max_length, max_length, max_new_tokens)
        if inputs.get("embeddings") is None:
            return batch
        given = self.backbone.check_embeddings("embeddings", inputs["embeddings"], ids.shape)
        vectors = np.zeros((len(ids), max(map(len, prompts)), given.shape[2]), given.dtype)
        vectors[np.arange(vectors.shape[1]) < mask.sum(-1)[:, None]] = given[mask]
        return replace(batch, embeddings=vectors, tokens_known=inputs.get("token_ids") is not None)

    def _bounded(self, prompts: list[list[int]], length: int, asked: int | None, max_new_tokens: int | None) -> Batch:
        """Limits within the model's table of positions; asking for more than it has is an error, not having asked is not."""
        positions = getattr(self.backbone.config, "max_sequence_length", None)
        if positions is not None and asked is not None and asked > positions:
            raise ValueError(f"max_length {asked} is more than the model's max_sequence_length {positions}")
        length = length if positions is None else min(length, positions)
        return Batch(prompts, self._limits(prompts, length, max_new_tokens))

    def _as_ids(self, batch: Batch, new: list[list[int]], strip_prompt: bool) -> dict[str, Array]:
        ids, mask = self._padded(batch, new, strip_prompt or not batch.tokens_known)
        return {"token_ids": ids, "padding_mask": mask}
