"""Download models from the Hub and upload checkpoint folders, through huggingface_hub, which finds the access token."""

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from gptq.checkpoint.assembled import INDEX_FILE
from gptq.checkpoint.atomic_folder import MARKER
from gptq.checkpoint.pickled import PICKLES_ON_HUB, convert_pickles, is_only_pickled
from gptq.checkpoint.reader import CONVERT_HINT
from gptq.checkpoint.untrusted import check_folder, local_folder
from gptq.errors import InputError, first_line

ASSEMBLED = "model.gguf"  # not all *.gguf: repositories of others hold a model in twenty widths
LOG_IN_HINT = "log in with `hf auth login`, or set HF_TOKEN"


def check_access(repo: str) -> None:
    """Check before a long run that its result can be pushed: a valid repository name, and a login.

    Raises:
        InputError: the name is invalid, nobody is logged in, or the Hub cannot be reached.
    """
    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError as error:
        raise InputError(f"{repo!r} cannot be a repository's name: {error}") from error
    except LocalTokenNotFoundError as error:
        raise InputError(
            f"nobody is logged in to the Hub, so nothing could be pushed to {repo}; {LOG_IN_HINT}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"the Hub did not say who is logged in ({_reason(error)}); {LOG_IN_HINT}") from error


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder to a model repository, which is created if necessary; return its URL.

    Raises:
        InputError: the upload failed; the folder is unchanged.
    """
    api = HfApi()
    try:
        repo_id = api.create_repo(repo, repo_type="model", private=private or None, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, ignore_patterns=[MARKER], commit_message="Quantized checkpoint"
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{repo} did not take {folder}, which stays as it is ({_reason(error)}); push again"
        ) from error
    return str(commit.repo_url)


def _reason(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]


def explain(error: Exception) -> str:
    """Say in a few words why the Hub did not give a repository."""
    for kind, reason in (
        (GatedRepoError, f"access has to be asked for on its page there; then {LOG_IN_HINT}"),
        (RepositoryNotFoundError, f"it has none of that name, or a private one; then {LOG_IN_HINT}"),
        (RevisionNotFoundError, "it has no such revision"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and the cache has no copy"),
        (LocalEntryNotFoundError, "it cannot be reached, and the cache has no copy"),
    ):
        if isinstance(error, kind):
            is_offline = kind is LocalEntryNotFoundError and constants.is_offline_mode()
            return "HF_HUB_OFFLINE is set, and the cache has no copy" if is_offline else reason
    return first_line(error)


def resolve(model: str, revision: str | None, allow_pickle: bool = False) -> Path:
    """Return a local checkpoint folder, or a local copy of a Hub repository (safetensors, configuration and tokenizer).

    Args:
        allow_pickle: if there are pickled weights alone, convert them, and return the folder with the result.
    Raises:
        InputError: there is no such folder and no such repository, or the folder fails `check_folder`.
    """
    from huggingface_hub import snapshot_download  # slow to import; a local folder does not need it

    folder = local_folder(model)
    if folder is not None:
        check_folder(folder)
        return convert_pickles(folder) if allow_pickle and is_only_pickled(folder) else folder
    suffixes = "safetensors json txt model jinja py md spm tiktoken bpe vocab yaml yml tsv"
    patterns = [*(f"*.{suffix}" for suffix in suffixes.split()), "LICENSE*", "NOTICE*", "USE_POLICY*", ASSEMBLED]
    doubles = ["consolidated*", "original/*"]  # second copies of the weights, in the authors' own format
    try:
        copy = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=doubles))
        has_weights = any(copy.glob("*.safetensors")) or (copy / INDEX_FILE).is_file()
        if allow_pickle and not has_weights:
            patterns.append(PICKLES_ON_HUB)
            copy = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=doubles))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        which = f"{model} at {revision}" if revision else model
        raise InputError(
            f"{which} is neither a folder nor a model that the Hub could give: {explain(error)}"
        ) from error
    check_folder(copy)
    if has_weights:
        return copy
    if not allow_pickle:
        raise InputError(f"{model} has no safetensors weights on the Hub; {CONVERT_HINT}")
    return convert_pickles(copy)
