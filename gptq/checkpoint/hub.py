"""A checkpoint folder as a model repository on the Hub, through huggingface_hub, which finds the token by itself."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from gptq.checkpoint.atomic_folder import MARKER
from gptq.errors import InputError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def check_access(repo: str) -> None:
    """Before hours of work: is the repository's name one, and is somebody logged in?

    Raises:
        InputError: no, or the Hub cannot be asked.
    """
    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError as error:
        raise InputError(f"{repo!r} cannot be a repository's name: {error}") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"nobody is logged in to the Hub, so nothing could be pushed to {repo}; {LOG_IN}") from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"the Hub did not say who is logged in ({_reason(error)}); {LOG_IN}") from error


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder into a model repository, made where it does not exist; returns its address.

    Raises:
        InputError: the Hub did not take it; the folder stays as it is.
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
