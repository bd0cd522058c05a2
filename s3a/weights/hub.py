"""Files on the Hugging Face Hub: fetched of one commit, published in one commit, every failure in one line.

Knows nothing of models: `weights` says which files make a folder.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

from httpx2 import ConnectError, TransportError
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

logger = logging.getLogger(__name__)

MAIN = "main"
OVERLOADED = (408, 429, 500, 502, 503, 504)  # statuses after which huggingface_hub tries again

# What huggingface_hub raises, the particular before the general: what it means, and what helps.
LOG_IN = "log in with `hf auth login`, or pass token="
MEANINGS: dict[type[Exception], str] = {
    GatedRepoError: f"it is gated: ask for access on its page, then {LOG_IN}",
    DisabledRepoError: "it is disabled by the Hub: use another",
    RepositoryNotFoundError: f"it does not exist or is private: check the name, or {LOG_IN}",
    RevisionNotFoundError: "it has no revision {revision!r}: pass a branch, tag or commit that it has",
    EntryNotFoundError: "it has no {file} at revision {revision!r}: {remedy}",
    HFValidationError: "its name is not valid: it must be ORG/NAME, of letters, digits, '-', '_' and '.'",
    LocalTokenNotFoundError: f"token=True finds no stored token: {LOG_IN}",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE forbids to ask the Hub: unset it",
    FileMetadataError: "what answers is no Hub: check HF_ENDPOINT and the proxy",
    JSONDecodeError: "what answers is no Hub: check HF_ENDPOINT and the proxy",
    HfHubHTTPError: "the Hub answers {status}: try again later, and check HF_ENDPOINT",
    TransportError: "the Hub cannot be reached ({error}): check the network, or try again later",
}
STATUSES = {
    401: f"the Hub does not know the token, or wants one (401): {LOG_IN}",
    403: f"the token gives no right to that (403): {LOG_IN} of somebody who has it",
}


# --------------------------------------------------------------------------------------------------------
# Fetching
# --------------------------------------------------------------------------------------------------------


def download(
    repo: str,
    files: Mapping[str, str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The cache's folder with files of a repository, all of one commit, whatever is pushed meanwhile.

    A commit that the cache holds is taken without a request, and a branch or tag that has not moved after a single
    one. Where the Hub cannot be reached, what the cache holds is taken, and a warning is logged.

    Args:
        repo: ORG/NAME.
        files: their names, each with what helps where the repository lacks it.
        revision: branch, tag or commit; None is the main branch.
        token: None sends the stored one where there is one, True insists on it, False sends none.
        cache_dir: None is huggingface_hub's own.
        local_files_only: send no request.

    Raises:
        FileNotFoundError: where a file cannot be had; says why, and what helps.
    """
    if repo.count("/") != 1:  # a name alone would be looked up, and retried, on the network
        raise FileNotFoundError(f"{repo!r} is neither a local folder nor a Hub repository ORG/NAME")
    asked = f"{repo!r} is no local folder, and as a Hub repository"
    revision, cache_dir = revision or MAIN, None if cache_dir is None else Path(cache_dir).expanduser()
    offline = "local_files_only=True forbids to ask the Hub: leave it out" if local_files_only else None
    with worded(FileNotFoundError, asked, revision, files):
        if offline is None:
            revision, offline = settle(repo, next(iter(files)), revision, token, cache_dir)
        for name in files:
            options = {"token": token, "cache_dir": cache_dir, "local_files_only": offline is not None}
            try:
                path = Path(hf_hub_download(repo, name, revision=revision, **options))
            except LocalEntryNotFoundError as error:
                reason = offline or explain(error.__cause__, revision, files)
                raise FileNotFoundError(f"{asked} its {name} is not in the cache, and {reason}") from error
            revision = path.parent.name
    return path.parent


def settle(
    repo: str, name: str, revision: str, token: str | bool | None, cache_dir: Path | None
) -> tuple[str, str | None]:
    """The revision to fetch, and why the cache alone can give it, if that is so."""
    cached = cached_commit(repo, name, revision, cache_dir)
    if cached == revision:
        return revision, None
    try:
        newest = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=token).commit_hash
    except (TransportError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in OVERLOADED:
            raise
        if cached is None and not isinstance(error, (ConnectError, OfflineModeIsEnabled)):
            return revision, None  # huggingface_hub tries again for a while
        reason = explain(error, revision)
        if cached is not None and not isinstance(error, OfflineModeIsEnabled):
            logger.warning("%s; meanwhile %s is loaded from the cache, as of commit %s", reason, repo, cached)
        return cached or revision, reason
    return (cached if newest == cached else revision), None


def cached_commit(repo: str, name: str, revision: str, cache_dir: Path | None) -> str | None:
    """The commit of which the cache holds the file for that revision, if any."""
    path = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


# --------------------------------------------------------------------------------------------------------
# Publishing
# --------------------------------------------------------------------------------------------------------


def upload(
    paths: Sequence[Path],
    repo: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    message: str = "Upload model",
) -> str:
    """Commits files to the main branch of a repository, all at once; returns the commit's URL.

    Args:
        paths: of the files; they keep their names.
        repo, token, private: see `create_repository`.
        message: of the commit.

    Raises:
        ValueError: where they cannot be published; says why, and what helps.
    """
    create_repository(repo, token=token, private=private)
    with worded(ValueError, f"cannot publish to the Hub repository {repo!r}:"):
        operations = [CommitOperationAdd(path.name, path) for path in paths]
        return HfApi(token=token).create_commit(repo, operations, commit_message=message).commit_url


def create_repository(repo: str, *, token: str | bool | None = None, private: bool | None = None) -> None:
    """Makes a repository where there is none; so it also tells, before long work, whether one may publish there.

    Args:
        repo: ORG/NAME.
        token: of somebody who may write there; None is the stored one.
        private: of a new repository; None is the organisation's default.

    Raises:
        ValueError: where it cannot be made; says why, and what helps.
    """
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} is no Hub repository: it must be ORG/NAME")
    with worded(ValueError, f"cannot publish to the Hub repository {repo!r}:"):
        HfApi(token=token).create_repo(repo, private=private, exist_ok=True)


# --------------------------------------------------------------------------------------------------------
# Failures
# --------------------------------------------------------------------------------------------------------


@contextmanager
def worded(
    kind: type[ValueError] | type[FileNotFoundError],
    problem: str,
    revision: str = MAIN,
    remedies: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line of ours, by the table of meanings."""
    try:
        yield
    except tuple(MEANINGS) as error:
        raise kind(f"{problem} {explain(error, revision, remedies)}") from error


def explain(error: BaseException, revision: str, remedies: Mapping[str, str] | None = None) -> str:
    """What an error means, and what helps.

    Args:
        error: of one of the kinds in the table.
        revision: that was asked for.
        remedies: for each file, what helps where the repository lacks it.
    """
    kind, meaning = next((kind, meaning) for kind, meaning in MEANINGS.items() if isinstance(error, kind))
    response = error.response if isinstance(error, HfHubHTTPError) else None
    status = response.status_code if response is not None else None
    if kind is HfHubHTTPError:
        meaning = STATUSES.get(status, meaning)
    file = str(response.url).rpartition("/")[2] if response is not None else None
    remedy = (remedies or {}).get(file, "pass another revision")
    return meaning.format(revision=revision, file=file, remedy=remedy, status=status, error=error)
