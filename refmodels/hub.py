"""Downloads: `hf://org/name[@revision]` by huggingface_hub, `kaggle://org/model/keras/variant[/version]` by kagglehub.

The clients keep the files in their own caches, take up what was interrupted, show progress on a terminal, and read their own
environment variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE; KAGGLEHUB_CACHE, KAGGLE_API_TOKEN and so on). Here it is
decided which files are asked for, in which order, and what an error means.
"""

import errno
import io
import logging
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

from refmodels.files import CheckpointError, read_json
from refmodels.weights.shards import read_index


class DownloadError(OSError):
    """A preset that could not be downloaded and is not in the cache; the message starts with its handle."""


class MissingDownloadError(DownloadError, FileNotFoundError):
    """A handle whose repository, revision or version does not exist, or is not shown to this user."""


KERAS_WEIGHTS = ("model.weights.h5", "model.weights.json")
HUGGING_FACE_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Of these files the first that a repository has is downloaded, and the shards it names if it is an index."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


def fetch(handle: str, weights: bool = True) -> Path:
    """The local directory with the files of a handle that a loader opens, downloaded where the cache lacks them.

    With `weights=False` there is no weight file among them. Without a network the newest copy in the cache serves.
    ImportError names the package that is missing; `DownloadError` says what else went wrong; CheckpointError is an index
    of shards that is not what it should be.
    """
    try:
        with redirect_stdout(sys.stderr):  # where results go, no client writes
            repository = (_HuggingFace if handle.startswith("hf://") else _Kaggle)(handle)
            with repository.progress():
                repository.get_small_files()
                if weights and repository.has("config.json"):
                    repository.get_weights()
        return repository.directory
    except (ImportError, DownloadError, CheckpointError):
        raise
    except Exception as error:  # the clients' own, which have no base in common
        raise DownloadError(f"{handle}: {_reason(error)}") from error


class _Repository(ABC):
    """The files behind a handle. `directory` is where they are, once `get_small_files` has run."""

    directory: Path
    problem: DownloadError | None = None
    """Why the network does not serve, so that the cache has to."""

    def __init__(self, handle: str) -> None:
        self.handle = handle

    @abstractmethod
    def get_small_files(self) -> None:
        """Fetch the configuration and the tokenizer."""

    @abstractmethod
    def get(self, *names: str) -> None:
        """Fetch those of these files that the repository has."""

    @abstractmethod
    def progress(self) -> AbstractContextManager[None]:
        """Within it, progress is shown on a terminal only."""

    def has(self, name: str) -> bool:
        """Whether this file is there, fetched."""
        return (self.directory / name).is_file()

    def get_weights(self) -> None:
        """Fetch the weights, in the one form that a loader takes."""
        keras = "registered_name" in read_json(self.directory, "config.json")
        forms = KERAS_WEIGHTS if keras else HUGGING_FACE_WEIGHTS
        for name in forms:
            self.get(name)
            if self.has(name):
                return self._get_shards(name) if name.endswith(".json") else None
        raise self.problem or MissingDownloadError(f"{self.handle}: has no weight file, wanted {' or '.join(forms)}")

    def _get_shards(self, index: str) -> None:
        shards = _shards(self.directory, index)
        self.get(*shards)
        if absent := [shard for shard in shards if not self.has(shard)]:
            raise self.problem or MissingDownloadError(f"{self.handle}: has no file {absent[0]}, which {index} names")


def _shards(directory: Path, index: str) -> list[str]:
    """The files that an index names: plain names, of which none can be a path out of the directory or a pattern."""
    shards = sorted({shard for shards in read_index(directory, index).values() for shard in shards})
    for shard in shards:
        if not re.fullmatch(r"\w[\w.-]{0,250}", shard, re.ASCII):
            found = f"field 'weight_map' names {shard[:300]!r}, wanted a plain file name"
            raise CheckpointError(f"{directory / index}: {found}")
    return shards


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in _DISK:
        place = f" to {error.filename}" if error.filename else ""
        said = f"cannot write{place}: {os.strerror(error.errno or 0)}"
    else:
        lines = str(error).strip().splitlines()
        said = f"the download failed: {type(error).__name__}{f': {lines[0]}' if lines else ''}"
    return f"{said}; the files that are complete are kept"


def _client(name: str, handle: str) -> ModuleType:
    try:
        if name == "kagglehub":
            import kagglehub  # type: ignore[import-not-found,import-untyped,unused-ignore]

            return kagglehub
        import huggingface_hub

        return huggingface_hub
    except ImportError:
        raise ImportError(
            f"downloading {handle} needs {name}: pip install {name}; a local directory with the preset's files works without"
        ) from None


# -- Hugging Face ----------------------------------------------------------------------------------------------------


class _HuggingFace(_Repository):
    """`org/name` or `org/name@revision`: a branch, a tag or a commit, by default `main`."""

    SMALL = (
        *("config.json", "adapter_config.json", "preprocessor.json", "task.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model"),
        *(f"assets/tokenizer/{name}" for name in ("vocabulary.json", "merges.txt", "vocabulary.spm")),
    )

    def __init__(self, handle: str) -> None:
        super().__init__(handle)
        self._client = _client("huggingface_hub", handle)
        self._name, _, revision = handle.removeprefix("hf://").partition("@")
        self._revision = revision or "main"
        try:
            self._client.model_info(self._name, revision=self._revision, timeout=10)
        except Exception as error:  # some is requests' or httpx's, depending on the client's version
            self.problem = self._explain(error)

    @contextmanager
    def progress(self) -> Iterator[None]:
        utils = self._client.utils
        if _on_terminal() or utils.are_progress_bars_disabled():
            yield
            return
        utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.enable_progress_bars()

    def get_small_files(self) -> None:
        self.get(*self.SMALL)
        if not self.has("config.json") and not self.has("adapter_config.json"):
            raise self.problem or MissingDownloadError(f"{self.handle}: has no config.json, so it is no model to load")
        self._revision = self.directory.name  # the commit: whatever becomes of the branch, all files are of one

    def get(self, *names: str) -> None:
        from huggingface_hub import errors

        try:
            found = self._client.snapshot_download(
                self._name,
                revision=self._revision,
                allow_patterns=["config.json", *names],  # if no file matches, it warns
                local_files_only=self.problem is not None,
            )
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
            raise self.problem or self._explain(error) from error
        self.directory = Path(found)

    def _explain(self, error: Exception) -> DownloadError:
        from huggingface_hub import constants, errors

        site = constants.ENDPOINT
        status = _status(error) or _status(error.__cause__)
        if isinstance(error, errors.RevisionNotFoundError):
            return MissingDownloadError(f"{self.handle}: {self._name} has no revision {self._revision!r}")
        if isinstance(error, errors.GatedRepoError) or status == 403:
            where = f"accept the licence at {site}/{self._name} and set HF_TOKEN to a token that may read it"
            return DownloadError(f"{self.handle}: access is restricted: {where}")
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            hint = "check the name, or set HF_TOKEN"
            return MissingDownloadError(f"{self.handle}: {site} has no such repository, or it is private: {hint}")
        reason = f"the connection to {site} failed ({type(error).__name__})"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        elif status is not None:
            reason = f"{site} answers with status {status}"
        return DownloadError(f"{self.handle}: {reason}, and the cache {constants.HF_HUB_CACHE} does not have all of it")


# -- Kaggle ----------------------------------------------------------------------------------------------------------


class _Kaggle(_Repository):
    """`org/model/keras/variant` or `org/model/keras/variant/version`, by default the newest version.

    Files are asked for one by one: kagglehub's download of a whole version brings everything there is, and writes a file
    whose name holds `..` where that leads.
    """

    def __init__(self, handle: str) -> None:
        super().__init__(handle)
        self._client = _client("kagglehub", handle)
        organisation, model, framework, variant, *version = handle.removeprefix("kaggle://").split("/")
        self._model = f"{organisation}/{model}/{framework}/{variant}"
        self._version = "".join(version)

    @contextmanager
    def progress(self) -> Iterator[None]:
        # Its bars appear wherever standard error leads, and its messages on standard output if it was imported before.
        logger = logging.getLogger("kagglehub")
        level = logger.level
        if "KAGGLEHUB_VERBOSITY" not in os.environ:
            logger.setLevel(max(level, logging.WARNING))
        try:
            with nullcontext() if _on_terminal() else redirect_stderr(io.StringIO()):
                yield
        finally:
            logger.setLevel(level)

    def get_small_files(self) -> None:
        self.get("config.json")
        if not hasattr(self, "directory"):
            raise self.problem or MissingDownloadError(f"{self.handle}: no such model or version, or no config.json in it")
        self.get("tokenizer.json", "preprocessor.json")
        if self.has("preprocessor.json"):  # KerasHub writes both or none
            self.get("task.json")
        if self.has("tokenizer.json"):
            kind = str(read_json(self.directory, "tokenizer.json").get("class_name"))
            assets = ["vocabulary.spm"] if kind.startswith("T5") else ["vocabulary.json", "merges.txt"]
            self.get(*(f"assets/tokenizer/{name}" for name in assets))

    def get(self, *names: str) -> None:
        for name in names:
            if (file := self._download(name)) is not None:
                self.directory = file.parents[name.count("/")]
                self._version = self.directory.name if self.directory.name.isdecimal() else self._version

    def _download(self, name: str) -> Path | None:
        """This file, None if the version (without a network: its copy in the cache) does not have it."""
        if self.problem is not None:
            return self._cached(name)
        try:
            return Path(self._client.model_download("/".join(filter(None, (self._model, self._version))), path=name))
        except OSError as error:
            if not hasattr(error, "response"):  # of the disk, not of the network
                raise
            status = _status(error)
            if status == 404:
                return None
            if status in (401, 403):
                raise DownloadError(
                    f"{self.handle}: Kaggle has no such model, or access is restricted: check the name, accept the licence at "
                    f"https://www.kaggle.com/models/{self._model} and set KAGGLE_API_TOKEN"
                ) from error
            silent = f"the connection to Kaggle failed ({type(error).__name__})"
            reason = silent if status is None else f"Kaggle answers with status {status}"
            cache = self._client.config.get_cache_folder()
            self.problem = DownloadError(f"{self.handle}: {reason}, and the cache {cache} does not have all of it")
            return self._cached(name)

    def _cached(self, name: str) -> Path | None:
        """This file in the newest version (or the one asked for) that kagglehub's cache has it of, completely."""
        model = Path(self._client.config.get_cache_folder(), "models", *self._model.split("/"))
        versions = {int(path.name) for path in model.glob("*") if path.name.isdecimal()}
        for version in [self._version] if self._version else map(str, sorted(versions, reverse=True)):
            complete = [model / f"{version}.complete", model / ".complete" / version / f"{name}.complete"]
            file = model / version / name
            if file.is_file() and any(marker.exists() for marker in complete):
                return file
            if file.is_file() and self._version:
                raise self.problem or DownloadError(f"{self.handle}: {file} is not complete")
        return None


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error of either client."""
    return getattr(getattr(error, "response", None), "status_code", None)
