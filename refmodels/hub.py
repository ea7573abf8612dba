"""Downloads: `hf://org/name` through huggingface_hub, `kaggle://org/model/keras/variant[/version]` through kagglehub."""

from pathlib import Path


def fetch(handle: str) -> Path:
    """The local directory with the files of a handle. ImportError names the package that is missing."""
    scheme, _, rest = handle.partition("://")
    try:
        if scheme == "kaggle":
            import kagglehub  # type: ignore[import-not-found,import-untyped,unused-ignore]

            return Path(kagglehub.model_download(rest))
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(rest))
    except ImportError:
        package = {"kaggle": "kagglehub", "hf": "huggingface_hub"}[scheme]
        raise ImportError(
            f"downloading {handle} needs {package}: pip install {package}; "
            "a local directory with the preset's files works without"
        ) from None
