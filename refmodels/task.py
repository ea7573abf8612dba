"""Tasks: a backbone, a tokenizer, and `generate` from text to text."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from refmodels.backbone import Backbone, check_batches, is_integer
from refmodels.generate import Sampling, beam_search, decode, padded
from refmodels.op import Array, Params

DEFAULT_MAX_LENGTH = 1024
"""What generate takes for max_length of text, as KerasHub's preprocessors do; less if the model has fewer positions."""

Tokenizer = Any  # a refmodels.tokenizers.Tokenizer, a module that is imported only with a preset


@dataclass(frozen=True)
class Batch:
    """What decoding starts from: for each row the tokens to go on from and how many may follow; for T5 the encoder's input."""

    prompts: list[list[int]]
    limits: list[int]
    encoder_ids: Array | None = None
    encoder_mask: Array | None = None

    def rows(self) -> "Iterator[Batch]":
        """Each row as a batch of its own."""
        for i in range(len(self.prompts)):
            row = slice(i, i + 1)
            if self.encoder_ids is None or self.encoder_mask is None:
                yield Batch(self.prompts[row], self.limits[row])
            else:
                yield Batch(self.prompts[row], self.limits[row], self.encoder_ids[row], self.encoder_mask[row])


class Task(ABC):
    """What `CausalLM` and `Seq2SeqLM` share. `tokenizer` may be None: then inputs are token dictionaries."""

    backbone_class: ClassVar[type[Backbone]]

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer = None) -> None:
        if not hasattr(self, "backbone_class"):
            raise TypeError(f"{type(self).__name__} is a base class: use a model's, or from_preset")
        if not isinstance(backbone, self.backbone_class):
            wanted, got = self.backbone_class.__name__, type(backbone).__name__
            raise TypeError(f"{type(self).__name__} takes {wanted}, got {got}")
        self.backbone: Any = backbone
        self.tokenizer = tokenizer

    @classmethod
    def from_preset(cls, preset: Any, load_weights: bool = True, **kwargs: Any) -> Self:
        """The backbone and the tokenizer of a preset. `kwargs` go to the backbone.

        On `CausalLM`, `Seq2SeqLM` or `Task` itself the class comes from the preset.
        """
        from refmodels.loading import load_task

        task: Self = load_task(cls, preset, load_weights=load_weights, **kwargs)
        return task

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
        **sampling: Any,
    ) -> Any:
        """Continue (OPT, BLOOM) or answer (T5) each input.

        inputs          a string, a list of strings, or a dictionary of token ids and padding mask (b, t)
        max_length      most tokens of the whole sequence, prompt included; `max_new_tokens` counts the new ones alone
        stop_token_ids  "auto" is the tokenizer's end token; None goes on to the limit; or ids of your own
        strip_prompt    give only what is new
        sampling        `sampler`, `temperature`, `top_k`, `top_p`, `num_beams`, `length_penalty`, `seed`: see
                        `refmodels.generate.Sampling`. Without any of them the search is greedy.

        Gives a string, a list of strings or a dictionary, like the input. A batch gives exactly what each prompt gives alone.
        """
        settings, stop = Sampling.of(sampling), self._stop_ids(stop_token_ids)
        _check_limits(max_length=max_length, max_new_tokens=max_new_tokens)
        if isinstance(inputs, Mapping):
            self.backbone.warn_of_unknown(inputs)
            batch = self._batch_of_ids(inputs, max_length, max_new_tokens)
            return self._as_ids(batch, self.run(batch, stop, settings), strip_prompt)
        texts: Any = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError("inputs must be a string, a list of strings or a dictionary of token ids")
        batch = self._batch_of_texts(list(texts), max_length, max_new_tokens)
        new = self.run(batch, stop, settings)
        shown = [prompt * (not strip_prompt) + ids for prompt, ids in zip(batch.prompts, new, strict=True)]
        answers = [self.tokenizer.detokenize(ids) for ids in shown]
        return answers[0] if isinstance(inputs, str) else answers

    def stream(
        self,
        prompt: str,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        *,
        max_new_tokens: int | None = None,
        **sampling: Any,
    ) -> "TextStream":
        """The new text of `generate` for one prompt, piece by piece, as it comes about."""
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")
        settings, stop = Sampling.of(sampling), self._stop_ids(stop_token_ids)
        _check_limits(max_length=max_length, max_new_tokens=max_new_tokens)
        return TextStream(self, self._batch_of_texts([prompt], max_length, max_new_tokens), stop, settings)

    def run(self, batch: Batch, stop: frozenset[int], settings: Sampling) -> list[list[int]]:
        """The new tokens of every row, a stop token included."""
        if settings.kind == "beam":
            return [
                beam_search(self.backbone, self.new_cache(row), row.prompts[0], row.limits[0], stop, settings)
                for row in batch.rows()
            ]
        new: list[list[int]] = [[] for _ in batch.prompts]
        for tokens in decode(self.backbone, self.new_cache(batch), batch.prompts, batch.limits, stop, settings):
            for ids, token in zip(new, tokens, strict=True):
                if token is not None:
                    ids.append(token)
        return new

    def new_cache(self, batch: Batch) -> Params:
        """A cache with room for every row's limit; for T5 the inputs are encoded into it."""
        capacity = max(len(prompt) + limit for prompt, limit in zip(batch.prompts, batch.limits, strict=True))
        with self.backbone.running():
            if batch.encoder_ids is None:
                cache: Params = self.backbone.new_cache(len(batch.prompts), capacity)
            else:
                ids, mask = self.backbone.on_device(batch.encoder_ids), self.backbone.on_device(batch.encoder_mask)
                cache = self.backbone.new_cache(ids, mask, capacity)
        return cache

    @abstractmethod
    def _batch_of_texts(self, texts: list[str], max_length: int | None, max_new_tokens: int | None) -> Batch:
        """Tokenize."""

    @abstractmethod
    def _batch_of_ids(self, inputs: Mapping[str, Any], max_length: int | None, max_new_tokens: int | None) -> Batch:
        """Check the arrays and take the real tokens of each row."""

    @abstractmethod
    def _as_ids(self, batch: Batch, new: list[list[int]], strip_prompt: bool) -> dict[str, Array]:
        """Prompts and new tokens as padded arrays."""

    def _padded(self, batch: Batch, new: list[list[int]], strip_prompt: bool) -> tuple[Array, Array]:
        rows = [prompt * (not strip_prompt) + ids for prompt, ids in zip(batch.prompts, new, strict=True)]
        kept = [0 if strip_prompt else len(prompt) for prompt in batch.prompts]
        width = max(count + limit for count, limit in zip(kept, batch.limits, strict=True))
        ids, mask = padded(rows, width, fill=0 if self.tokenizer is None else self.tokenizer.pad_token_id)
        return ids, mask.astype(np.int64)

    def _limits(self, prompts: list[list[int]], max_length: int, max_new_tokens: int | None) -> list[int]:
        """How many tokens each row may add."""
        longest = max(len(prompt) for prompt in prompts)
        if longest > max_length:
            raise ValueError(f"the prompt has {longest} tokens, more than max_length {max_length}")
        room = [max_length - len(prompt) for prompt in prompts]
        return room if max_new_tokens is None else [min(space, max_new_tokens) for space in room]

    def _stop_ids(self, stop_token_ids: Any) -> frozenset[int]:
        if stop_token_ids is None:
            return frozenset()
        if isinstance(stop_token_ids, str):
            if stop_token_ids != "auto":
                raise ValueError(f"stop_token_ids must be 'auto', None or token ids, got {stop_token_ids!r}")
            return frozenset([int(self._need_tokenizer("stop_token_ids='auto'").end_token_id)])
        listed = sorted(stop_token_ids) if isinstance(stop_token_ids, set | frozenset) else stop_token_ids
        ids = self.backbone.check_ids("stop_token_ids", np.atleast_2d(np.asarray(listed)))
        return frozenset(ids[0].tolist())

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and this {type(self).__name__} has none: pass token ids instead")
        return self.tokenizer

    def _real_tokens(self, inputs: Mapping[str, Any], prefix: str = "") -> tuple[Array, Array]:
        """Checked ids and mask of a token dictionary."""
        ids, mask = self.backbone.check_pair(inputs, f"{prefix}token_ids", f"{prefix}padding_mask")
        if not ids.size:
            raise ValueError(f"{prefix}token_ids has shape {ids.shape}: there is nothing to go on from")
        if not mask.any(-1).all():
            raise ValueError(f"{prefix}padding_mask row {int(mask.any(-1).argmin())} has no real token")
        return ids, mask


def _check_limits(**limits: int | None) -> None:
    for name, value in limits.items():
        if value is not None and not is_integer(value):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _default_length(max_length: int | None, max_new_tokens: int | None) -> int:
    """max_length if given; else, without any limit at all, the default."""
    if max_length is not None:
        return max_length
    return DEFAULT_MAX_LENGTH if max_new_tokens is None else sys.maxsize


class TextStream(Iterator[str]):
    """An iterator over the new text of one prompt: a piece for each token as soon as it is known, then a last one.

    A piece is empty while a character is not complete. A beam search gives its text in one piece.
    Attributes: `prompt_ids`, what the model reads; `prompt_text`, what stands before the new text (nothing for T5, which
    answers); `tokens`, the new ids so far, a stop token included.
    """

    def __init__(self, task: Task, batch: Batch, stop: frozenset[int], settings: Sampling) -> None:
        self.prompt_ids: list[int] = batch.prompts[0] if batch.encoder_ids is None else batch.encoder_ids[0].tolist()
        self.prompt_text: str = task.tokenizer.detokenize(batch.prompts[0])
        self.tokens: list[int] = []
        self._pieces = self._run(task, batch, stop, settings)

    def _run(self, task: Task, batch: Batch, stop: frozenset[int], settings: Sampling) -> Iterator[str]:
        text = task.tokenizer.stream_decoder()
        if settings.kind == "beam":
            (self.tokens,) = task.run(batch, stop, settings)
            yield "".join(map(text.push, self.tokens)) + text.finish()
            return
        for (token,) in decode(task.backbone, task.new_cache(batch), batch.prompts, batch.limits, stop, settings):
            if token is not None:
                self.tokens.append(token)
                yield text.push(token)
        yield text.finish()

    def __next__(self) -> str:
        return next(self._pieces)


class CausalLM(Task):
    """A decoder with its head: text is continued."""

    def _batch_of_texts(self, texts: list[str], max_length: int | None, max_new_tokens: int | None) -> Batch:
        tokenizer = self._need_tokenizer("text")
        prompts = [[tokenizer.start_token_id, *tokenizer.tokenize(text)] for text in texts]
        return self._bounded(prompts, _default_length(max_length, max_new_tokens), max_length, max_new_tokens)

    def _batch_of_ids(self, inputs: Mapping[str, Any], max_length: int | None, max_new_tokens: int | None) -> Batch:
        ids, mask = self._real_tokens(inputs)
        prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        width = ids.shape[1] if max_new_tokens is None else ids.shape[1] + max_new_tokens
        return self._bounded(prompts, width if max_length is None else max_length, max_length, max_new_tokens)

    def _bounded(self, prompts: list[list[int]], length: int, asked: int | None, max_new_tokens: int | None) -> Batch:
        """Limits within the model's table of positions; asking for more than it has is an error, not having asked is not."""
        positions = getattr(self.backbone.config, "max_sequence_length", None)
        if positions is not None and asked is not None and asked > positions:
            raise ValueError(f"max_length {asked} is more than the model's max_sequence_length {positions}")
        length = length if positions is None else min(length, positions)
        return Batch(prompts, self._limits(prompts, length, max_new_tokens))

    def _as_ids(self, batch: Batch, new: list[list[int]], strip_prompt: bool) -> dict[str, Array]:
        ids, mask = self._padded(batch, new, strip_prompt)
        return {"token_ids": ids, "padding_mask": mask}


class Seq2SeqLM(Task):
    """An encoder and a decoder with its head: text is answered. The decoder starts from the padding token."""

    def _batch_of_texts(self, texts: list[str], max_length: int | None, max_new_tokens: int | None) -> Batch:
        tokenizer = self._need_tokenizer("text")
        rows = [[*tokenizer.tokenize(text), tokenizer.end_token_id] for text in texts]
        ids, mask = padded(rows, max(map(len, rows)), fill=tokenizer.pad_token_id)
        prompts = [[int(tokenizer.pad_token_id)]] * len(rows)
        return Batch(prompts, self._limits(prompts, _default_length(max_length, max_new_tokens), max_new_tokens), ids, mask)

    def _batch_of_ids(self, inputs: Mapping[str, Any], max_length: int | None, max_new_tokens: int | None) -> Batch:
        encoder_ids, encoder_mask = self._real_tokens(inputs, "encoder_")
        if "decoder_token_ids" in inputs:
            ids, mask = self._real_tokens(inputs, "decoder_")
            check_batches({"encoder_token_ids": encoder_ids, "decoder_token_ids": ids})
            prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
            width = ids.shape[1] if max_new_tokens is None else ids.shape[1] + max_new_tokens
        else:
            start = 0 if self.tokenizer is None else int(self.tokenizer.pad_token_id)
            prompts, width = [[start]] * len(encoder_ids), _default_length(max_length, max_new_tokens)
        limits = self._limits(prompts, width if max_length is None else max_length, max_new_tokens)
        return Batch(prompts, limits, encoder_ids, encoder_mask)

    def _as_ids(self, batch: Batch, new: list[list[int]], strip_prompt: bool) -> dict[str, Array]:
        ids, mask = self._padded(batch, new, strip_prompt)
        return {"decoder_token_ids": ids, "decoder_padding_mask": mask}
