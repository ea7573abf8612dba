"""Tasks: a backbone, a preprocessor, and `generate` from text to text."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from refmodels.arguments import is_integer
from refmodels.backbone import Backbone
from refmodels.files import keras_object
from refmodels.generate import (
    Answer,
    Constraint,
    Request,
    Restriction,
    Sampling,
    StopText,
    beam_search,
    contrastive_search,
    decode,
    derived_seed,
    padded,
)
from refmodels.op import Array, Params
from refmodels.preprocessors import CausalLMPreprocessor, T5Seq2SeqLMPreprocessor
from refmodels.samplers import Sampler, chosen_settings, get
from refmodels.scoring import Score
from refmodels.tokenizers import Tokenizer

DEFAULT_MAX_LENGTH = 1024
"""What generate takes for max_length of an answer without a preprocessor, whose sequence length it is otherwise."""


@dataclass(frozen=True)
class Batch:
    """What decoding starts from: for each row the tokens to go on from and how many may follow; for T5 the encoder's input.

    `embeddings` (b, t, n) are vectors in place of the prompts', for T5 of the encoder's tokens, padded on the right. Without
    `tokens_known` those tokens are placeholders that say nothing but how many there are.
    """

    prompts: list[list[int]]
    limits: list[int]
    encoder_ids: Array | None = None
    encoder_mask: Array | None = None
    embeddings: Array | None = None
    tokens_known: bool = True

    def take(self, rows: Sequence[int]) -> "Batch":
        """These rows, in this order, as a batch."""
        index = list(rows)
        arrays = {name: getattr(self, name) for name in ("encoder_ids", "encoder_mask", "embeddings")}
        parts: dict[str, Any] = {name: None if array is None else array[index] for name, array in arrays.items()}
        return replace(self, prompts=[self.prompts[i] for i in index], limits=[self.limits[i] for i in index], **parts)


class SoftPrompt:
    """A backbone whose prefill starts from vectors in place of the prompts' own; otherwise it is the backbone itself."""

    def __init__(self, backbone: Any, embeddings: Array) -> None:
        self._backbone, self._embeddings = backbone, embeddings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def prefill(self, token_ids: Array, padding_mask: Array, lengths: Array, cache: Params) -> Array:
        """`Backbone.prefill` with the vectors."""
        vectors = self._embeddings[:, : token_ids.shape[1]]  # these rows may be shorter than others that they came with
        scores: Array = self._backbone.prefill(token_ids, padding_mask, lengths, cache, embeddings=vectors)
        return scores

    def hidden_states(self, token_ids: Array, padding_mask: Array, start: Array | None, cache: Params) -> Array:
        """`hidden_states` of the backbone, with the vectors where it begins."""
        vectors = self._embeddings[:, : token_ids.shape[1]] if start is None else None
        hidden: Array = self._backbone.hidden_states(token_ids, padding_mask, start, cache, embeddings=vectors)
        return hidden


class Task(ABC):
    """What `CausalLM` and `Seq2SeqLM` share.

    `preprocessor` may be None: then inputs are token dictionaries. `tokenizer=` is short for its preprocessor with defaults.
    """

    backbone_class: ClassVar[type[Backbone]]
    kind: ClassVar[str]
    """The end of the name of KerasHub's module: opt_`causal_lm`."""

    preprocessor_class: ClassVar[type[CausalLMPreprocessor] | type[T5Seq2SeqLMPreprocessor]]

    def __init__(self, backbone: Backbone, preprocessor: Any = None, *, tokenizer: Tokenizer | None = None) -> None:
        if not hasattr(self, "backbone_class"):
            raise TypeError(f"{type(self).__name__} is a base class: use a model's, or from_preset")
        if not isinstance(backbone, self.backbone_class):
            wanted, got = self.backbone_class.__name__, type(backbone).__name__
            raise TypeError(f"{type(self).__name__} takes {wanted}, got {got}")
        if tokenizer is not None and preprocessor is not None:
            raise TypeError(f"{type(self).__name__} takes a preprocessor or a tokenizer, got both")
        if tokenizer is not None:
            preprocessor = self.preprocessor_class(tokenizer)
        if preprocessor is not None and not isinstance(preprocessor, self.preprocessor_class):
            wanted, got = self.preprocessor_class.__name__, type(preprocessor).__name__
            raise TypeError(f"{type(self).__name__} takes {wanted} or None, got {got}")
        self.backbone: Any = backbone
        self.preprocessor: Any = preprocessor
        self.sampler: Sampler | None = None

    @property
    def tokenizer(self) -> Any:
        """The preprocessor's tokenizer; None without one."""
        return None if self.preprocessor is None else self.preprocessor.tokenizer

    @classmethod
    def from_preset(cls, preset: str | Path, load_weights: bool = True, **kwargs: Any) -> Self:
        """The backbone and the preprocessor of a preset. `preprocessor=` replaces the latter, other `kwargs` go to the former.

        On `CausalLM`, `Seq2SeqLM` or `Task` itself the class comes from the preset.
        """
        from refmodels.loading import load_task

        task: Self = load_task(cls, preset, load_weights=load_weights, **kwargs)
        return task

    def keras_object(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        """KerasHub's object in task.json; `backbone` is the one in config.json."""
        name = f"{self.backbone.family}_{self.kind}"
        preprocessor = None if self.preprocessor is None else self.preprocessor.keras_object()
        config = {"backbone": dict(backbone), "preprocessor": preprocessor, "name": name.replace("seq_2_seq", "seq2_seq")}
        return keras_object(f"keras_hub.src.models.{self.backbone.family}.{name}", type(self).__name__, config)

    def save_to_preset(self, preset_dir: str | Path, max_shard_size: float = 10) -> None:
        """Write backbone and preprocessor as KerasHub's files; see `refmodels.saving.save_to_preset`."""
        from refmodels.saving import save_to_preset

        save_to_preset(self, preset_dir, max_shard_size)

    def save_to_hf(self, directory: str | Path, max_shard_size: float = 5, dtype: str | None = None) -> None:
        """Write backbone and tokenizer as Transformers' files; see `refmodels.saving.save_to_hf`."""
        from refmodels.saving import save_to_hf

        save_to_hf(self, directory, max_shard_size, dtype)

    def quantize(self, mode: str, *, block_size: int | None = None, weight_only: bool | None = None) -> None:
        """Turn the backbone's matrices into integers: see `Backbone.quantize`."""
        self.backbone.quantize(mode, block_size=block_size, weight_only=weight_only)

    def compile(
        self,
        optimizer: Any = None,
        loss: Any = None,
        *,
        weighted_metrics: Any = None,
        sampler: Any = "top_k",
        run_eagerly: Any = None,
        jit_compile: Any = None,
    ) -> None:
        """Say which sampler `generate` uses when it is not told: a name, or an object of `refmodels.samplers`, or its config.

        Before this the search is greedy. The other arguments are KerasHub's, for training, and mean nothing here.
        """
        self.sampler = get(sampler)

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
        stop: Any = (),
        num_return_sequences: int | None = None,
        constraint: Constraint | None = None,
        **sampling: Any,
    ) -> Any:
        """Continue (OPT, BLOOM) or answer (T5) each input.

        inputs          a string, a list of strings, or a dictionary of token ids and padding mask (b, t); T5 also takes
                        `{"encoder_text", "decoder_text"}`, the latter to go on from. Vectors may stand in place of token
                        ids: `embeddings` (b, t, n), for T5 `encoder_embeddings`; `embed` makes them from text
        max_length      most tokens of the whole sequence, prompt included; `max_new_tokens` counts the new ones alone. For text
                        the default without either is the preprocessor's sequence length
        stop_token_ids  "auto" is the tokenizer's end token; None goes on to the limit; or ids of your own
        strip_prompt    give only what is new
        stop            a string, or several, before which the new text is cut; the tokens given for a dictionary end with the
                        one that completes it
        constraint      constraint(row, token_ids) gives the tokens that may follow: ids, booleans (v,), or None for all
        num_return_sequences  that many answers to each input: draws of their own, or the best beams
        sampling        `sampler`, `temperature`, `top_k`, `top_p`, `min_p`, `num_beams`, `length_penalty`, `penalty_alpha`,
                        `repetition_penalty`, `no_repeat_ngram_size`, `seed`: see `refmodels.generate.Sampling`; a list has
                        one entry for each row. `sampler` is a name or an object of `refmodels.samplers`. Without any of
                        those that choose a sampler it is the one of `compile`, or greedy search.

        Gives a string, a list of strings or a dictionary, like the input; several answers to an input are a list of strings, or
        rows that follow each other. A batch gives exactly what each prompt gives alone. The rules: spec/generation.md.
        After `embeddings` without token ids there is no prompt to show: the dictionary holds the new tokens.
        """
        request = self._request(stop_token_ids, stop, sampling, num_return_sequences, constraint)
        _check_limits(max_length=max_length, max_new_tokens=max_new_tokens)
        if isinstance(inputs, Mapping) and "encoder_text" not in inputs:
            self.backbone.warn_of_unknown(inputs)
            batch = self._batch_of_ids(inputs, max_length, max_new_tokens)
            found = self.run(batch, request)
            repeated = batch.take([i for i, answers in enumerate(found) for _ in answers])
            output = self._as_ids(repeated, [answer.tokens for answers in found for answer in answers], strip_prompt)
            if request.all_beams:
                output["log_probs"] = np.array([answer.log_probability for answers in found for answer in answers])
            return output
        texts, single = self._texts(inputs)
        batch = self._batch_of_texts(texts, max_length, max_new_tokens)
        found = self.run(batch, request)
        shown = [[] if strip_prompt else prompt for prompt in batch.prompts]
        answers: list[Any] = [
            [self.text(prompt, answer) for answer in answers] for prompt, answers in zip(shown, found, strict=True)
        ]
        if (request.answers or 1) == 1 and not request.all_beams:
            answers = [answer for (answer,) in answers]
        return answers[0] if single else answers

    def stream(
        self,
        prompt: str,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        *,
        max_new_tokens: int | None = None,
        stop: Any = (),
        num_return_sequences: int | None = None,
        constraint: Constraint | None = None,
        **sampling: Any,
    ) -> "TextStream":
        """The new text of `generate` for one prompt, piece by piece, as it comes about."""
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")
        request = self._request(stop_token_ids, stop, sampling, num_return_sequences, constraint)
        _check_limits(max_length=max_length, max_new_tokens=max_new_tokens)
        return TextStream(self, self._batch_of_texts(self._texts(prompt)[0], max_length, max_new_tokens), request)

    @abstractmethod
    def embed(self, inputs: Any) -> dict[str, Array]:
        """The vectors of a text, of several or of token ids, as `generate` takes them in place of these: with their mask.

        A text alone is a batch of one. Rows are padded on the right.
        """

    @abstractmethod
    def score(self, inputs: Any, targets: Any = None) -> Score:
        """The log-probability of each token of given text."""

    def run(self, batch: Batch, request: Request) -> list[list[Answer]]:
        """The answers to every row; their tokens include a stop token that ended them."""
        rows = request.rows(len(batch.prompts))
        found: list[list[Answer]] = [[] for _ in rows]
        draws: list[tuple[int, Sampling]] = []
        for i, row in enumerate(rows):
            if row.kind == "beam":
                found[i] = self._beams(batch.take([i]), row, request, i)
            elif row.kind == "contrastive":
                found[i] = self._answers(batch.take([i]), [row], request, [i])
            else:
                seeds = [None if row.seed is None else derived_seed(row.seed, n) for n in range(request.several(row))]
                draws += [(i, replace(row, seed=seed)) for seed in seeds]
        if draws:
            inputs, settings = [i for i, _ in draws], [row for _, row in draws]
            for i, answer in zip(inputs, self._answers(batch.take(inputs), settings, request, inputs), strict=True):
                found[i].append(answer)
        return found

    def _answers(self, batch: Batch, rows: list[Sampling], request: Request, inputs: list[int]) -> list[Answer]:
        """One answer to each row, token by token; `inputs` are the numbers by which the constraint knows the rows."""
        texts = [self.stop_text(request) for _ in rows] if request.stop_texts else None
        new: list[list[int]] = [[] for _ in rows]
        for tokens in self.steps(batch, rows, request, texts, inputs):
            for ids, token in zip(new, tokens, strict=True):
                if token is not None:
                    ids.append(token)
        return [Answer(ids, self._cut(ids, request)) for ids in new]

    def steps(
        self, batch: Batch, rows: list[Sampling], request: Request, texts: list[StopText] | None, inputs: list[int]
    ) -> Iterator[list[int | None]]:
        """The next token of every row, again and again; a contrastive search has one row."""
        decoder, cache, stop = self.decoder(batch), self.new_cache(batch), request.stop_ids
        restrict = Restriction(decoder, request.constraint, inputs=inputs, prompts_known=batch.tokens_known)
        if rows[0].kind != "contrastive":
            yield from decode(decoder, cache, batch.prompts, batch.limits, stop, rows, texts=texts, restrict=restrict)
            return
        prompt, limit, text = batch.prompts[0], batch.limits[0], texts[0] if texts else None
        for token in contrastive_search(decoder, cache, prompt, limit, stop, rows[0], text=text, restrict=restrict):
            yield [token]

    def _beams(self, batch: Batch, row: Sampling, request: Request, number: int) -> list[Answer]:
        """The best beams for one row."""
        decoder, wanted = self.decoder(batch), request.several(row)
        restrict = Restriction(decoder, request.constraint, inputs=[number] * row.beams, prompts_known=batch.tokens_known)

        def ended(tokens: Sequence[int]) -> bool:
            text = self.stop_text(request)
            return any(text.push(token) for token in tokens)

        beams = beam_search(
            decoder,
            self.new_cache(batch),
            batch.prompts[0],
            batch.limits[0],
            request.stop_ids,
            row,
            ended=ended if request.stop_texts else None,
            restrict=restrict,
        )
        if len(beams) < wanted:
            raise ValueError(f"row {number}: the beam search found {len(beams)} of {wanted} sequences, the others are excluded")
        return [Answer(beam.tokens, self._cut(beam.tokens, request), beam.log_probability) for beam in beams[:wanted]]

    def _cut(self, tokens: list[int], request: Request) -> str | None:
        """The text of new tokens up to a stop string; None without one."""
        if not request.stop_texts:
            return None
        text = self.stop_text(request)
        for token in tokens:
            text.push(token)
        rest = text.finish()
        return rest if text.found else None

    def stop_text(self, request: Request) -> StopText:
        """A new row's text, cut at the request's stop strings."""
        return StopText(self._need_tokenizer("stop").stream_decoder(), request.stop_texts)

    def decoder(self, batch: Batch) -> Any:
        """What the loops of `refmodels.generate` run on."""
        if batch.embeddings is None or batch.encoder_ids is not None:  # the encoder's are in the cache
            return self.backbone
        return SoftPrompt(self.backbone, batch.embeddings)

    def text(self, prompt: list[int], answer: Answer) -> str:
        """The text of these tokens with the answer behind them."""
        tokenizer = self.tokenizer
        if answer.cut is None:
            return str(tokenizer.detokenize(prompt + answer.tokens))
        return str(tokenizer.detokenize(prompt)) + answer.cut

    def _request(
        self, stop_token_ids: Any, stop: Any, sampling: dict[str, Any], answers: int | None, constraint: Constraint | None
    ) -> Request:
        """The arguments of `generate`, checked as far as they can be without the inputs."""
        stops = tuple(stop) if isinstance(stop, list | tuple) else () if stop is None else (stop,)
        if not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"stop must be a string that is not empty, or several of them, got {stop!r}")
        if stops:
            self._need_tokenizer("stop")
        if constraint is not None and not callable(constraint):
            raise TypeError(f"constraint must be callable with (row, token_ids), got {constraint!r}")
        _check_limits(num_return_sequences=answers)
        settings = chosen_settings(sampling, self.sampler)
        all_beams = settings.pop("return_all_beams", False)
        if all_beams and answers is not None:
            raise ValueError("return_all_beams says how many answers there are: leave num_return_sequences out")
        return Request(settings, self._stop_ids(stop_token_ids), stops, answers, all_beams, constraint)

    def new_cache(self, batch: Batch) -> Params:
        """A cache with room for every row's limit; for T5 the inputs are encoded into it."""
        capacity = max(len(prompt) + limit for prompt, limit in zip(batch.prompts, batch.limits, strict=True))
        with self.backbone.running():
            if batch.encoder_ids is None:
                cache: Params = self.backbone.new_cache(len(batch.prompts), capacity)
            else:
                ids, mask = self.backbone.on_device(batch.encoder_ids), self.backbone.on_device(batch.encoder_mask)
                cache = self.backbone.new_cache(ids, mask, capacity, embeddings=batch.embeddings)
        return cache

    def _texts(self, inputs: Any) -> tuple[list[Any], bool]:
        """A list of what to start from, an entry for each row, and whether the caller gave just one."""
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            wanted = "a string, a list of strings or a dictionary of token ids"
            raise TypeError(f"inputs must be {wanted}, got {inputs!r:.100}")
        return list(texts), isinstance(inputs, str)

    @abstractmethod
    def _batch_of_texts(self, texts: list[Any], max_length: int | None, max_new_tokens: int | None) -> Batch:
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

    def _default_length(self, max_length: int | None, max_new_tokens: int | None) -> int:
        """max_length if given; else, without any limit at all, the preprocessor's."""
        if max_length is not None or max_new_tokens is not None:
            return max_length or sys.maxsize
        return DEFAULT_MAX_LENGTH if self.preprocessor is None else int(self.preprocessor.sequence_length)

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

    def _need_tokenizer(self, what: str) -> Any:
        if self.preprocessor is None:
            raise ValueError(f"{what} needs a tokenizer, and this {type(self).__name__} has none: pass token ids instead")
        return self.tokenizer

    def _with_placeholders(self, inputs: Mapping[str, Any], prefix: str = "") -> Mapping[str, Any]:
        """The inputs; with a token id, no matter which, for each vector where there are vectors alone."""
        vectors, name = inputs.get(f"{prefix}embeddings"), f"{prefix}token_ids"
        if vectors is None or inputs.get(name) is not None:
            return inputs
        if np.ndim(vectors) != 3:
            wanted = f"(batch, length, {self.backbone.embedding_dim})"
            raise ValueError(f"{prefix}embeddings has shape {np.shape(vectors)}, wanted {wanted}")
        return {**inputs, name: np.zeros(np.shape(vectors)[:2], int)}

    def _refuse_vectors(self, inputs: Mapping[str, Any], prefix: str = "") -> None:
        if inputs.get(f"{prefix}embeddings") is not None:
            raise ValueError(f"{prefix}embeddings go into generate alone: pass text or {prefix}token_ids")

    def _target_tokens(self, targets: Any, count: int) -> list[list[int]]:
        """The tokens of each of `count` rows of targets, from text or a token dictionary."""
        if isinstance(targets, Mapping):
            ids, mask = self.backbone.check_pair(targets, "token_ids", "padding_mask")
            rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        else:
            texts, _ = Task._texts(self, targets)
            rows = self._need_tokenizer("text").tokenize(texts)
            rows = [row + self._after_target for row in rows]
        if len(rows) != count:
            raise ValueError(f"there are {len(rows)} targets, wanted one for each of {count} inputs")
        return rows

    @property
    def _after_target(self) -> list[int]:
        """What ends a text that is scored."""
        return []

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


class TextStream(Iterator[str]):
    """An iterator over the new text of one prompt: a piece for each token as soon as it is known, then a last one.

    A piece is empty while a character is not complete, or while the text may become a stop string. A beam search gives its text
    in one piece.
    Attributes: `prompt_ids`, what the model reads; `prompt_text`, what stands before the new text (nothing for T5, which
    answers); `tokens`, the new ids so far, a stop token included.
    """

    def __init__(self, task: Task, batch: Batch, request: Request) -> None:
        (settings,) = request.rows(1)
        self._task, self._batch, self._request = task, batch, request
        self.prompt_ids: list[int] = batch.prompts[0] if batch.encoder_ids is None else batch.encoder_ids[0].tolist()
        self.prompt_text: str = task.tokenizer.detokenize(batch.prompts[0])
        self.tokens: list[int] = []
        self._pieces = self._run(task, batch, request, settings)

    def _run(self, task: Task, batch: Batch, request: Request, settings: Sampling) -> Iterator[str]:
        if request.several(settings) > 1:
            raise ValueError("a stream has the pieces of one answer: see TextStream.answers for several")
        text = task.stop_text(request)
        if settings.kind == "beam":
            (((self.tokens, *_),),) = task.run(batch, request)
            for id in self.tokens:
                text.push(id)
            yield text.finish()
            return
        for (token,) in task.steps(batch, [settings], request, [text], [0]):
            if token is not None:
                self.tokens.append(token)
                yield text.take()
        yield text.finish()

    def __next__(self) -> str:
        return next(self._pieces)

    def answers(self) -> list[tuple[str, list[int]]]:
        """The new text and the tokens of every answer that was asked for, at once."""
        (found,) = self._task.run(self._batch, self._request)
        return [(self._task.text([], answer), answer.tokens) for answer in found]
