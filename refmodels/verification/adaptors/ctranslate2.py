"""CTranslate2: the logits of a converted OPT, BLOOM or T5.

    TransformersConverter(place).convert(directory)
    candidate = CTranslate2Candidate(directory, "opt")

It gives no intermediate values. Its batches have no mask: of each row the real tokens are run, and the logits are put where
they belong. T5's decoder is given its tokens as a prefix, and says the logits on its way through them.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from refmodels.files import read_json
from refmodels.op import Array
from refmodels.verification.candidate import Candidate, CandidateError

FAMILIES = ("opt", "bloom", "t5")


class CTranslate2Candidate(Candidate):
    """The model that CTranslate2's converter has written to `directory`, of this family.

    `compute_type` is CTranslate2's: float32, float16, bfloat16, or an integer type, which is held to what float32 allows.
    """

    def __init__(self, directory: str | Path, family: str, *, compute_type: str = "float32", name: str = "") -> None:
        import ctranslate2

        if family not in FAMILIES:
            raise CandidateError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
        self.family, self.compute_type = family, compute_type
        self.name = name or f"{family} of CTranslate2"
        self.dtype = compute_type if compute_type in ("float16", "bfloat16") else "float32"
        self._own: Path | None = None
        try:
            if family == "t5":
                self._vocabulary: list[str] = json.loads((Path(directory) / "shared_vocabulary.json").read_text("utf-8"))
                self._own = _without_start(Path(directory))
                self._engine = ctranslate2.Translator(str(self._own), compute_type=compute_type)
            else:
                self._engine = ctranslate2.Generator(str(directory), compute_type=compute_type)
        except (OSError, RuntimeError, ValueError) as error:
            self.close()
            raise CandidateError(f"{directory}: CTranslate2 cannot load it: {error}") from error

    def run(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        known = {"token_ids", "padding_mask"}
        if self.family == "t5":
            known = {f"{side}_{name}" for side in ("encoder", "decoder") for name in known}
        if set(inputs) - known:
            raise CandidateError(f"{self.name} takes token ids and masks alone, got {', '.join(sorted(set(inputs) - known))}")
        try:
            logits = self._translated(inputs) if self.family == "t5" else self._generated(inputs)
        except RuntimeError as error:
            raise CandidateError(f"{self.name} failed: {error}") from error
        return {f"{self.family}_logits": logits}

    def _generated(self, inputs: Mapping[str, Array]) -> Array:
        import ctranslate2

        rows = _real_rows(inputs, "")
        if self.family == "opt" and any(len(places) and places[0] > 0 for _, places in rows):
            raise CandidateError(f"{self.name} counts positions from the first real token: no padding on the left")
        longest = max(len(ids) for ids, _ in rows)
        packed = np.array([[*ids, *([0] * (longest - len(ids)))] for ids, _ in rows], np.int32)
        lengths = np.array([len(ids) for ids, _ in rows], np.int32)
        views = [ctranslate2.StorageView.from_array(array) for array in (packed, lengths)]
        found = np.array(self._engine.forward_batch(*views), np.float32)
        logits = np.zeros((*np.shape(inputs["token_ids"]), found.shape[-1]), np.float32)
        for row, (_, places) in enumerate(rows):
            logits[row, places] = found[row, : len(places)]
        return logits

    def _translated(self, inputs: Mapping[str, Array]) -> Array:
        sources, targets = (_real_rows(inputs, f"{side}_") for side in ("encoder", "decoder"))
        longest = max(len(ids) for ids, _ in targets)
        results = self._engine.translate_batch(
            [self._tokens(ids) for ids, _ in sources],
            target_prefix=[self._tokens(ids) for ids, _ in targets],
            max_decoding_length=longest,  # the prefix counts
            min_decoding_length=0,
            max_input_length=0,
            beam_size=1,
            return_logits_vocab=True,
        )
        shape = np.shape(inputs["decoder_token_ids"])
        logits = np.zeros((*shape, np.array(results[0].logits[0][0]).size), np.float32)
        for row, ((_, places), result) in enumerate(zip(targets, results, strict=True)):
            for place, step in zip(places, result.logits[0], strict=False):  # a row that is done may have gone on
                logits[row, place] = np.array(step, np.float32).reshape(-1)
        return logits

    def _tokens(self, ids: list[int]) -> list[str]:
        return [self._vocabulary[token] for token in ids]

    def facts(self) -> dict[str, str]:
        import ctranslate2

        return {"ctranslate2": ctranslate2.__version__, "compute type": self.compute_type, "device": self._engine.device}

    def close(self) -> None:
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
            self._own = None


def _real_rows(inputs: Mapping[str, Array], prefix: str) -> list[tuple[list[int], Array]]:
    """Of each row the real tokens, and where they stand."""
    ids = np.asarray(inputs[f"{prefix}token_ids"])
    mask = np.asarray(inputs.get(f"{prefix}padding_mask", np.ones(ids.shape, bool))).astype(bool)
    return [(row[real].tolist(), np.flatnonzero(real)) for row, real in zip(ids, mask, strict=True)]


def _without_start(directory: Path) -> Path:
    """A copy, by links, of the directory of a T5 whose decoder does not put a token of its own before those it is given."""
    config = read_json(directory, "config.json") | {"decoder_start_token": None}
    own = Path(tempfile.mkdtemp(prefix="refmodels-"))
    for path in directory.iterdir():
        if path.name != "config.json":
            with suppress(FileExistsError):
                (own / path.name).symlink_to(path.resolve())
    (own / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return own
