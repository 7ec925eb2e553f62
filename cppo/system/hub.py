"""Files of the Hugging Face hub at a pinned commit, or one line that says how to do without the hub."""

from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

SECONDS = 10.0
"""How long the hub may take to say that it is there."""


def fetch(repo: str, kind: Literal["model", "dataset"], revision: str, patterns: list[str], remedy: str) -> Path:
    """The folder with the files of a repository that match `patterns`, from the local cache or downloaded into it.

    Raises ValueError at once, ending in `remedy`, when they are neither cached nor to be had.
    """
    try:
        cached = snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=patterns, local_files_only=True
        )
        return Path(cached)
    except LocalEntryNotFoundError:
        pass
    try:
        # Asked first because it fails at once; the download itself would retry for half a minute.
        HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=SECONDS)
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=patterns))
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{repo}: this {kind} at commit {revision[:10]} is not in the local cache and cannot be had from the hub "
            f"({reason}); {remedy}"
        ) from None
