"""The task of an encoder and a decoder: text is answered."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from refmodels.backbone import check_batches
from refmodels.generate import padded
from refmodels.op import Array
from refmodels.scoring import Score, score_tokens
from refmodels.task import Batch, Task


class Seq2SeqLM(Task):
    """An encoder and a decoder with its head: text is answered. The decoder starts from the padding token."""

    kind = "seq_2_seq_lm"

    def embed(self, inputs: Any) -> dict[str, Array]:
        ids, mask = self._encoder_arrays(inputs)
        return {"encoder_embeddings": self.backbone.token_embedding(ids), "encoder_padding_mask": mask.astype(np.int64)}

    def score(self, inputs: Any, targets: Any = None) -> Score:
        """The log-probability of each token of the targets, given the inputs and the tokens before it.

        inputs   a string, a list of strings, or a dictionary of `encoder_token_ids` and `encoder_padding_mask`
        targets  the same, its dictionary of `token_ids` and `padding_mask`; left out, the inputs hold them as `decoder_text`
                 or as `decoder_token_ids` (and `decoder_padding_mask`), whose first token is not scored

        The decoder starts from the padding token. The end token is added to text, and is scored; ids are taken as they are.
        What padding holds, and where it stands in the targets, is of no account.
        """
        if isinstance(inputs, Mapping) and "encoder_text" not in inputs:
            self.backbone.warn_of_unknown(inputs)
        ids, mask = self._encoder_arrays(inputs)
        within = sorted({"decoder_text", "decoder_token_ids"} & inputs.keys()) if isinstance(inputs, Mapping) else []
        if len(within) + (targets is not None) != 1:
            found = "both" if within else "none of these"
            raise ValueError(f"score needs targets, or decoder_text or decoder_token_ids among the inputs; there are {found}")
        if within == ["decoder_token_ids"]:
            rows = self._decoder_rows(inputs, ids)
        else:
            answers = [answer for _, answer in self._texts(inputs)[0]] if targets is None else targets
            rows = [[self._start, *row] for row in self._target_tokens(answers, len(ids))]
        new, real = padded(rows, max(2, *map(len, rows)))
        outputs = self.backbone(
            {
                "encoder_token_ids": ids,
                "encoder_padding_mask": mask,
                "decoder_token_ids": new[:, :-1],
                "decoder_padding_mask": real[:, :-1],
            }
        )
        return score_tokens(self.backbone, outputs["decoder_sequence_output"], new[:, 1:], real[:, 1:])

    @property
    def _after_target(self) -> list[int]:
        return [int(self.tokenizer.end_token_id)]

    @property
    def _start(self) -> int:
        """The padding token, from which the decoder starts."""
        return 0 if self.preprocessor is None else int(self.tokenizer.pad_token_id)

    def _encoder_arrays(self, inputs: Any) -> tuple[Array, Array]:
        """Ids and mask for the encoder, from text or a token dictionary."""
        if isinstance(inputs, Mapping) and "encoder_text" not in inputs:
            self._refuse_vectors(inputs, "encoder_")
            return self._real_tokens(inputs, "encoder_")
        texts, _ = self._texts(inputs)
        self._need_tokenizer("text")
        rows = self.preprocessor.encoder_rows([source for source, _ in texts])
        return padded(rows, max(map(len, rows)), fill=self.tokenizer.pad_token_id)

    def _decoder_rows(self, inputs: Mapping[str, Any], encoder_ids: Array) -> list[list[int]]:
        ids, mask = self._real_tokens(inputs, "decoder_")
        check_batches({"encoder_token_ids": encoder_ids, "decoder_token_ids": ids})
        return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]

    def _texts(self, inputs: Any) -> tuple[list[Any], bool]:
        """Pairs: what the encoder reads, and what the decoder goes on from."""
        if not isinstance(inputs, Mapping):
            texts, single = super()._texts(inputs)
            return [(text, "") for text in texts], single
        sources, single = super()._texts(inputs["encoder_text"])
        starts, alone = super()._texts(inputs.get("decoder_text", "" if single else [""] * len(sources)))
        if (single, len(sources)) != (alone, len(starts)):
            raise ValueError(f"encoder_text holds {len(sources)} texts and decoder_text {len(starts)}, wanted as many")
        if surplus := sorted(inputs.keys() - {"encoder_text", "decoder_text"}):
            raise ValueError(f"inputs with encoder_text take decoder_text and nothing else, got {surplus[0]!r}")
        return list(zip(sources, starts, strict=True)), single

    def _batch_of_texts(self, texts: list[Any], max_length: int | None, max_new_tokens: int | None) -> Batch:
        self._need_tokenizer("text")
        rows = self.preprocessor.encoder_rows([source for source, _ in texts])
        ids, mask = padded(rows, max(map(len, rows)), fill=self.tokenizer.pad_token_id)
        prompts = self.preprocessor.prompts([start for _, start in texts])
        limits = self._limits(prompts, self._default_length(max_length, max_new_tokens), max_new_tokens)
        return Batch(prompts, limits, ids, mask)

    def _batch_of_ids(self, inputs: Mapping[str, Any], max_length: int | None, max_new_tokens: int | None) -> Batch:
        encoder_ids, encoder_mask = self._real_tokens(self._with_placeholders(inputs, "encoder_"), "encoder_")
        if "decoder_token_ids" in inputs:
            prompts = self._decoder_rows(inputs, encoder_ids)
            width = np.shape(inputs["decoder_token_ids"])[1] + (max_new_tokens or 0)
        else:
            prompts, width = [[self._start]] * len(encoder_ids), self._default_length(max_length, max_new_tokens)
        limits = self._limits(prompts, width if max_length is None else max_length, max_new_tokens)
        vectors = inputs.get("encoder_embeddings")
        if vectors is not None:
            vectors = self.backbone.check_embeddings("encoder_embeddings", vectors, encoder_ids.shape)
        return Batch(prompts, limits, encoder_ids, encoder_mask, vectors)

    def _as_ids(self, batch: Batch, new: list[list[int]], strip_prompt: bool) -> dict[str, Array]:
        ids, mask = self._padded(batch, new, strip_prompt)
        return {"decoder_token_ids": ids, "decoder_padding_mask": mask}
