"""Downloads files of a Hub repository from one commit, uploads files in one commit; every failure is one line.

Knows nothing of models: `pretrained` says which files a repository must have.
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
RETRIED = (408, 429, 500, 502, 503, 504)  # statuses after which huggingface_hub tries again

# What the errors of huggingface_hub mean, and what helps; subclasses come before their base.
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
# Downloading
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
    """The folder of the cache that holds files of a repository, all from one commit, even if somebody pushes meanwhile.

    A commit that is in the cache costs no request, and a branch or tag that has not moved costs one. If the Hub cannot
    be reached, the files in the cache are used, and a warning is logged.

    Args:
        repo: ORG/NAME.
        files: their names, each with what helps if the repository lacks it.
        revision: branch, tag or commit; None for the main branch.
        token: None sends the stored token if there is one, True requires one, False sends none.
        cache_dir: None for huggingface_hub's own.
        local_files_only: use the cache alone, without a request.

    Raises:
        FileNotFoundError: if a file cannot be downloaded, with the reason and the remedy.
    """
    if repo.count("/") != 1:  # a name alone would be looked up, and retried, on the network
        raise FileNotFoundError(f"{repo!r} is neither a local folder nor a Hub repository ORG/NAME")
    problem = f"{repo!r} is no local folder, and as a Hub repository"
    revision, cache_dir = revision or MAIN, None if cache_dir is None else Path(cache_dir).expanduser()
    offline = "local_files_only=True forbids to ask the Hub: leave it out" if local_files_only else None
    with explain_errors(FileNotFoundError, problem, revision, files):
        if offline is None:
            revision, offline = choose_revision(repo, next(iter(files)), revision, token, cache_dir)
        for name in files:
            try:
                path = hf_hub_download(
                    repo,
                    name,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=offline is not None,
                )
            except LocalEntryNotFoundError as error:
                reason = offline or explain_error(error.__cause__ or error, revision, files)
                raise FileNotFoundError(f"{problem} its {name} is not in the cache, and {reason}") from error
            revision = Path(path).parent.name  # the commit, for the other files
    return Path(path).parent


def choose_revision(
    repo: str, name: str, revision: str, token: str | bool | None, cache_dir: Path | None
) -> tuple[str, str | None]:
    """The revision to download, and, if it must come from the cache, why.

    Args:
        name: of a file that every revision has.
    """
    cached_file = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision)
    cached = Path(cached_file).parent.name if isinstance(cached_file, str) else None  # the commit
    if cached == revision:
        return revision, None
    try:
        newest = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=token).commit_hash
    except (TransportError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRIED:
            raise
        if cached is None and not isinstance(error, (ConnectError, OfflineModeIsEnabled)):
            return revision, None  # huggingface_hub tries again for a while
        reason = explain_error(error, revision)
        if cached is not None and not isinstance(error, OfflineModeIsEnabled):
            logger.warning("%s; meanwhile %s is loaded from the cache, as of commit %s", reason, repo, cached)
        return cached or revision, reason
    return (cached if cached is not None and newest == cached else revision), None


# --------------------------------------------------------------------------------------------------------
# Uploading
# --------------------------------------------------------------------------------------------------------


def upload(
    paths: Sequence[Path],
    repo: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    message: str = "Upload model",
) -> str:
    """Commits files to the main branch of a repository in one commit, and returns its URL.

    Args:
        paths: of the files, which keep their names.
        repo, token, private: see `create_repository`.
        message: of the commit.

    Raises:
        ValueError: if they cannot be published, with the reason and the remedy.
    """
    create_repository(repo, token=token, private=private)
    with explain_errors(ValueError, f"cannot publish to the Hub repository {repo!r}:"):
        operations = [CommitOperationAdd(path.name, path) for path in paths]
        return HfApi(token=token).create_commit(repo, operations, commit_message=message).commit_url


def create_repository(repo: str, *, token: str | bool | None = None, private: bool | None = None) -> None:
    """Creates a repository if it does not exist. Called before long work, it also checks the right to publish.

    Args:
        repo: ORG/NAME.
        token: of an account that may write there; None for the stored one.
        private: whether a new repository is private; None for the organisation's default.

    Raises:
        ValueError: if it cannot be created, with the reason and the remedy.
    """
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} is no Hub repository: it must be ORG/NAME")
    with explain_errors(ValueError, f"cannot publish to the Hub repository {repo!r}:"):
        HfApi(token=token).create_repo(repo, private=private, exist_ok=True)


# --------------------------------------------------------------------------------------------------------
# Failures
# --------------------------------------------------------------------------------------------------------


@contextmanager
def explain_errors(
    kind: type[ValueError] | type[FileNotFoundError],
    problem: str,
    revision: str = MAIN,
    remedies: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Turns the errors of huggingface_hub into errors of the given kind, one line each.

    Args:
        problem: the beginning of the line.
        revision, remedies: see `explain_error`.
    """
    try:
        yield
    except tuple(MEANINGS) as error:
        raise kind(f"{problem} {explain_error(error, revision, remedies)}") from error


def explain_error(error: BaseException, revision: str, remedies: Mapping[str, str] | None = None) -> str:
    """What an error of huggingface_hub means, and what helps, by the table of meanings.

    Args:
        revision: the one that was asked for.
        remedies: for each file, what helps if the repository lacks it.
    """
    kind, meaning = next((kind, meaning) for kind, meaning in MEANINGS.items() if isinstance(error, kind))
    status, file, remedy = None, None, "pass another revision"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status, file = error.response.status_code, str(error.response.url).rpartition("/")[2]
        remedy = (remedies or {}).get(file, remedy)
        meaning = STATUSES.get(status, meaning) if kind is HfHubHTTPError else meaning
    return meaning.format(revision=revision, file=file, remedy=remedy, status=status, error=error)
