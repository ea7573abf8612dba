"""Tokenizers from files: KerasHub's preset directories and Hugging Face's model directories."""

import base64
import re
import struct
from pathlib import Path
from typing import Any

from refmodels.files import CheckpointError, inside, read_json, write_bytes
from refmodels.tokenizers import (
    FAMILIES,
    BloomTokenizer,
    T5Tokenizer,
    Tokenizer,
    argument_names,
    checked_vocabulary,
    quoted,
)


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory holds a tokenizer of either form."""
    return any((directory / name).exists() for name in ("tokenizer.json", "vocab.json", "spiece.model"))


def load_tokenizer(directory: str | Path, family: str | None = None, **options: Any) -> Tokenizer:
    """The tokenizer of a KerasHub preset directory or of a Hugging Face model directory.

    Args:
        directory: path. KerasHub's has tokenizer.json with a "class_name" and assets/tokenizer/; Hugging Face's has
            spiece.model (T5), or tokenizer.json with a "model", or vocab.json and merges.txt (OPT, BLOOM).
            config.json may say "mt5", which has T5's tokenizer.
        family: "t5", "opt" or "bloom"; by default what tokenizer.json or config.json says.
        options: arguments of the tokenizer that replace those in the files.

    Raises FileNotFoundError for a missing directory or file, ValueError for one that does not hold what it should,
    for a file over 64 MiB and for a link that leads out of the directory.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {quoted(FAMILIES)}, not {family!r}")
    root = Path(directory).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    data = _optional_json(root, "tokenizer.json")
    if data and not data.keys() & {"class_name", "model"}:
        raise CheckpointError(f'{root / "tokenizer.json"} has neither "class_name" (KerasHub) nor "model" (Hugging Face)')
    load = _load_keras_hub if "class_name" in data else _load_hugging_face
    try:
        return load(root, data, family, options)
    except CheckpointError:
        raise
    except ValueError as error:  # a tokenizer's own words for what is wrong with its files
        raise CheckpointError(str(error)) from error


def _load_keras_hub(root: Path, data: dict[str, Any], family: str | None, options: dict[str, Any]) -> Tokenizer:
    file = root / "tokenizer.json"
    found = {c.__name__: c for c in FAMILIES.values()}.get(str(data["class_name"]))
    wanted = [c.__name__ for c in FAMILIES.values() if family in (None, c.family)]
    if found is None or found.__name__ not in wanted:
        raise CheckpointError(f"{file} describes a {str(data['class_name'])[:100]}, wanted {quoted(wanted)}")
    config: Any = data.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f'{file} must hold "config" as an object, found {type(config).__name__}')
    dtype = config.get("dtype", "int32")
    while isinstance(dtype, dict):  # a serialized DTypePolicy; the oldest files have a plain string
        dtype = dtype.get("config", dtype.get("name"))
    of_keras = ("trainable", "config_file", "proto", "vocabulary", "merges")  # the assets are files of their own
    beside = {"extra_ids": data["extra_ids"]} if found is T5Tokenizer and "extra_ids" in data else {}
    arguments = {k: v for k, v in config.items() if k not in of_keras} | beside
    if surplus := arguments.keys() - set(argument_names(found)):
        raise CheckpointError(f"{file} has the unknown setting {quoted(sorted(surplus))} for {found.__name__}")
    assets = ["vocabulary.spm"] if found is T5Tokenizer else ["vocabulary.json", "merges.txt"]
    paths: list[Any] = [inside(root, "assets", "tokenizer", name) for name in assets]
    return found(*paths, **(arguments | {"dtype": dtype} | options))


def _load_hugging_face(root: Path, data: dict[str, Any], family: str | None, options: dict[str, Any]) -> Tokenizer:
    settings = _optional_json(root, "tokenizer_config.json")
    config = _optional_json(root, "config.json")
    # "opt" in Hugging Face's config.json, "keras_hub>OPTBackbone" in KerasHub's
    name = str(config.get("model_type") or config.get("registered_name") or "nothing")
    stated = {"mt5": "t5"}.get(name, name.split(">")[-1].removesuffix("Backbone").lower())
    if (family or stated) not in FAMILIES or (family and stated in FAMILIES and stated != family):
        wanted = repr(family) if family else f"{quoted(FAMILIES)}: pass family="
        raise CheckpointError(f"{root / 'config.json'} names {name!r} as the family, wanted {wanted}")
    family, added = family or stated, _added_tokens(root, data, settings)
    if family == "t5" and "model" in data and not (root / "spiece.model").exists():  # as Transformers 5 saves it
        return _load_unigram(root / "tokenizer.json", data, options)
    if family == "t5":
        proto = inside(root, "spiece.model")
        if "extra_ids" not in options:
            special = str(_optional_json(root, "special_tokens_map.json").get("additional_special_tokens"))
            listed = len(set(re.findall(r"<extra_id_\d+>", " ".join([special, *added]))))
            default = 100 if T5Tokenizer(proto).vocabulary_size() == 32000 else 0
            options = options | {"extra_ids": settings.get("extra_ids", listed or default)}
        tokenizer = T5Tokenizer(proto, **options)
        pieces = set(tokenizer.get_vocabulary())
        if other := [name for name in added if name not in pieces and not re.fullmatch(r"<extra_id_\d+>", name)]:
            raise CheckpointError(
                f"{root}: the added token {other[0][:100]!r} is no piece of spiece.model, and T5Tokenizer has no others"
            )
        return tokenizer
    options = {"add_prefix_space": bool(settings.get("add_prefix_space", False))} | options
    found: type[Any] = FAMILIES[family]
    ids = {name: token.get("id") for name, token in added.items()}
    for name, token in added.items():
        if flag := next((flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)), None):
            raise CheckpointError(f"{root}: the added token {name[:100]!r} has {flag!r}, which {found.__name__} does not do")
    options = {"unsplittable_tokens": list(added)} | options
    if not data:
        file = root / "vocab.json"
        return found(checked_vocabulary(read_json(root, file.name) | ids, str(file)), inside(root, "merges.txt"), **options)
    file, model = root / "tokenizer.json", data["model"]
    if not isinstance(model, dict) or not {"vocab", "merges"} <= model.keys() or model.get("type", "BPE") != "BPE":
        raise CheckpointError(f'{file} must hold a BPE "model" with "vocab" and "merges" for {found.__name__}')
    if found is BloomTokenizer and (data.get("normalizer") is not None or not _splits_as_bloom(data)):
        raise CheckpointError(f"{file}: its normalizer and its pre_tokenizer are not BLOOM's, and BloomTokenizer has no others")
    try:
        return found(checked_vocabulary(model["vocab"], "vocab") | ids, model["merges"], **options)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _splits_as_bloom(data: dict[str, Any]) -> bool:
    """Whether the text is split by BLOOM's rule in this tokenizer.json, and each piece then put into the byte alphabet."""
    words = {"type": "Split", "pattern": {"Regex": BloomTokenizer.splitting_pattern}, "behavior": "Isolated", "invert": False}
    into_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = _steps(data, "pre_tokenizer", "pretokenizers")
    return len(steps) == 2 and all(
        isinstance(step, dict) and wanted.items() <= step.items()
        for wanted, step in zip((words, into_bytes), steps, strict=True)
    )


def _added_tokens(root: Path, data: dict[str, Any], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a Hugging Face directory adds to its vocabulary: each token with its "id" and what else is said of it.

    tokenizer.json has them all. Without it tokenizer_config.json has, and before Transformers 4.34 added_tokens.json.
    """
    if data:
        return _checked_added(data, str(root / "tokenizer.json"))
    file, listed = root / "tokenizer_config.json", settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(re.fullmatch("[0-9]{1,9}", i) for i in listed):
        raise CheckpointError(f'{file} must hold "added_tokens_decoder" as an object from ids to tokens')
    older = [{"content": name, "id": i} for name, i in _optional_json(root, "added_tokens.json").items()]
    newer = [token | {"id": int(i)} if isinstance(token, dict) else token for i, token in listed.items()]
    return _checked_added({"added_tokens": [*older, *newer]}, str(file))


def _checked_added(data: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in added):
        raise CheckpointError(f'{source} must hold "added_tokens" as a list of objects with "content" and "id"')
    return {token["content"]: token for token in added}


def _load_unigram(file: Path, data: dict[str, Any], options: dict[str, Any]) -> Tokenizer:
    try:
        proto, extra_ids = sentencepiece_model(data, str(file))
        return T5Tokenizer(proto, **({"extra_ids": extra_ids} | options))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


_NORMALIZERS = {"Precompiled", "Strip", "Replace"}
_PRE_TOKENIZERS = {"WhitespaceSplit", "Metaspace"}
"""The steps of a tokenizer.json that do together what sentencepiece always does: one space between words, one in front."""


def sentencepiece_model(data: dict[str, Any], source: str) -> tuple[bytes, int]:
    """The sentencepiece model that the Unigram model of a tokenizer.json was made from, and how many <extra_id_n> follow it.

    CheckpointError, naming the file `source`, for a step or a token that sentencepiece does not have.
    """
    model = data["model"]
    vocabulary = model.get("vocab") if isinstance(model, dict) and model.get("type") == "Unigram" else None
    if not isinstance(vocabulary, list) or not all(_is_entry(entry) for entry in vocabulary):
        raise CheckpointError(f'{source} must hold a Unigram "model" with "vocab" as a list of [piece, score] for T5Tokenizer')
    added = _checked_added(data, source)
    normalizers, others = _steps(data, "normalizer", "normalizers"), _steps(data, "pre_tokenizer", "pretokenizers")
    for step, known in [*((s, _NORMALIZERS) for s in normalizers), *((s, _PRE_TOKENIZERS) for s in others)]:
        kind = step.get("type") if isinstance(step, dict) else None
        if not isinstance(kind, str) or kind not in known:
            raise CheckpointError(
                f"{source}: step {str(kind)[:100]!r} is none of {quoted(sorted(known))}: put spiece.model beside"
            )
    special = {name for name, token in added.items() if token.get("special") is True}
    ids = {piece: i for i, (piece, _) in enumerate(vocabulary)} | {name: token.get("id") for name, token in added.items()}
    extra = sorted((name for name in ids if re.fullmatch(r"<extra_id_[0-9]{1,4}>", name)), key=lambda name: int(name[10:-1]))
    own = [entry for entry in vocabulary if entry[0] not in extra]
    wanted = {piece: i for i, (piece, _) in enumerate(own)}
    wanted |= {f"<extra_id_{n}>": len(own) + len(extra) - 1 - n for n in range(len(extra))}
    if wrong := sorted(name for name, i in ids.items() if wanted.get(name) != i):
        raise CheckpointError(
            f"{source}: token {wrong[0][:100]!r} has id {str(ids[wrong[0]])[:100]}, wanted {wanted.get(wrong[0])}"
        )
    unknown, bytewise = model.get("unk_id"), model.get("byte_fallback") is True
    if type(unknown) is not int or not 0 <= unknown < len(own):
        raise CheckpointError(f'{source} must hold "unk_id" as an id of its "vocab", found {str(unknown)[:100]}')
    charsmap = [step.get("precompiled_charsmap") for step in normalizers if step["type"] == "Precompiled"]
    try:
        rules = b"".join(base64.b64decode(text, validate=True) for text in charsmap)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f'{source}: "precompiled_charsmap" is not base64') from error
    pieces = []
    for i, (piece, score) in enumerate(own):
        byte = bytewise and re.fullmatch("<0x[0-9A-F]{2}>", piece)
        kind = 2 if i == unknown else 3 if piece in special else 6 if byte else 1  # unknown, control, byte, normal
        pieces.append(protobuf(1, protobuf(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + protobuf(3, kind)))
    trainer = protobuf(35, int(bytewise)) + protobuf(40, unknown)
    return b"".join([*pieces, protobuf(2, trainer), protobuf(3, protobuf(2, rules))]), len(extra)


def _is_entry(entry: Any) -> bool:
    """Whether this is a piece and its score."""
    sound = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) in (int, float)
    return sound and abs(entry[1]) < 1e9


def _steps(data: dict[str, Any], kind: str, several: str) -> list[Any]:
    """The steps of this kind in a tokenizer.json, one after the other."""
    found = data.get(kind)
    listed = found.get(several) if isinstance(found, dict) and found.get("type") == "Sequence" else found
    return listed if isinstance(listed, list) else [] if listed is None else [listed]


def protobuf(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message: an integer from 0 on, or bytes with their length."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def save_hugging_face(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the files of Hugging Face's form: spiece.model or tokenizer.json, tokenizer_config.json, special_tokens_map.json,
    for OPT vocab.json and merges.txt, too. ValueError for a tokenizer that Transformers cannot have."""
    for name, content in tokenizer.hugging_face_files().items():
        write_bytes(directory / name, content)


def _optional_json(root: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file."""
    return read_json(root, name) if (root / name).exists() else {}
