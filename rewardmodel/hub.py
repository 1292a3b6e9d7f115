"""A model repository on the Hugging Face hub: whether it can be written, asked before any work; and the upload."""

import logging
import shlex
from pathlib import Path
from typing import Any

from rewardmodel.errors import InputError

logger = logging.getLogger(__name__)


def check_repository(repository: str, key: str, token: str | None = None) -> None:
    """Raise unless a model repository can be written with the token of this machine; nothing is made or changed.

    Args:
        repository: owner/name, or a name, whose owner is then the user.
        key: option or key that names it, for the error.
        token: of the hub; default: the one that `hf auth login` saved, or that of the environment.

    Raises:
        InputError: no repository id, no hub, no valid token, or a token or a user who may not write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{key}: {repository}: not a repository id ({reason}); give owner/name") from error
    api = HfApi(token=token)
    try:
        user = api.whoami()
    except LocalTokenNotFoundError as error:
        raise InputError(f"{key}: {repository}: not logged in to the hub; run: hf auth login") from error
    except HfHubHTTPError as error:
        raise InputError(
            f"{key}: {repository}: the hub refuses the token ({_one_line(error)}); run: hf auth login"
        ) from error
    except Exception as error:
        raise InputError(
            f"{key}: {repository}: the hub cannot be reached ({_one_line(error)}); connect, or leave it out"
        ) from error
    _check_owner(repository, key, user)
    made = "its files of the same names are replaced" if api.repo_exists(repository) else "it is made, private"
    logger.info("%s: %s: %s may write there; %s", key, repository, user.get("name"), made)


def _check_owner(repository: str, key: str, user: dict[str, Any]) -> None:
    """Raise unless a user, as `whoami` describes one, may write a repository.

    For example `{"name": "me", "orgs": [{"name": "lab", "roleInOrg": "write"}], "auth": {"accessToken": {"role":
    "write"}}}`. Whether a fine-grained token may write a certain repository is known only once it is tried.
    """
    name = str(user.get("name"))
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise InputError(
            f"{key}: {repository}: the token of {name} may only read; make one that may write at "
            "https://huggingface.co/settings/tokens, then run: hf auth login"
        )
    owner, slash, _ = repository.partition("/")
    roles = {str(one.get("name")): one.get("roleInOrg") for one in user.get("orgs") or []}
    if slash and owner != name and (owner not in roles or roles[owner] == "read"):
        writable = ", ".join([name, *(one for one, role in roles.items() if role != "read")])
        raise InputError(f"{key}: {repository}: {name} may not write there; give an owner of: {writable}")


def upload(folder: Path, repository: str) -> None:
    """Upload an export to a model repository on the hub; it is made, private, if it does not exist.

    Raises:
        InputError: the hub refuses, or cannot be reached; the command to upload by hand is named.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        raise InputError(
            f"--push-to-hub: {repository}: {_one_line(error)}; the export in {folder} is complete, upload it with: "
            f"hf upload {repository} {shlex.quote(str(folder))} . --private"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
