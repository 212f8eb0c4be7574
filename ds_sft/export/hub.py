"""Sending a parcel to the Hugging Face hub, in one commit: all of it arrives, or nothing is seen of it.

By huggingface_hub's own upload: large files in parts, a file that is there already is not sent again. Its token is that
of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ds_sft import __version__
from ds_sft.config.keys import Config
from ds_sft.errors import UserError, first_line
from ds_sft.export.parcel import OWN, Parcel, pack
from ds_sft.plan.adapter import read_json
from ds_sft.plan.size import in_units
from ds_sft.plan.source import is_folder, unreachable
from ds_sft.ranks.launch import print_line
from ds_sft.results import RESULTS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "hf auth login, or HF_TOKEN, with a token of role write (https://huggingface.co/settings/tokens)"
WRITTEN_BY_HUB = ".gitattributes"  # every new repository has it


@dataclass(frozen=True)
class Address:
    """Where on the hub, and for whose eyes."""

    repo: str  # OWNER/NAME
    public: bool = False
    revision: str | None = None  # a branch, made where it is not there; None: main
    update: bool = False  # a repository that has files gets these in place of its own
    token: str | None = None


def address_of(config: Config) -> Address:
    """Where a run's key `hub_model_id` says, and the keys beside it."""
    keys = config.training
    return Address(
        keys["hub_model_id"],
        public=keys.get("hub_private_repo") is False,
        revision=keys.get("hub_revision"),
        token=keys.get("hub_token"),
    )


def why_not(config: Config) -> str | None:
    """Why the push of a run that has not trained yet could not succeed; None where it could: the hub is reached, knows
    the token, and has nothing there."""
    address = address_of(config)
    try:
        if config.resume != "never" and was_pushed(config):
            return None  # this run has ended, and says so
        if config.adapter != "none" and is_folder(config.model_name_or_path):
            return (
                f"push_to_hub: an adapter of the folder {config.model_name_or_path}, which nobody else has: leave it "
                f"out, and when the run has ended: ds-sft push {config.output_dir} {address.repo} --base OWNER/NAME"
            )
        api = _api(address)
        with _in_one_line(address):
            auth = api.whoami().get("auth") or {}
            if (auth.get("accessToken") or {}).get("role") == "read":
                raise UserError(f"{address.repo}: the token may only read: {LOGIN}")
            _is_there(api, address)
    except UserError as error:
        return str(error)
    return None


def was_pushed(config: Config) -> bool:
    """Whether the run in the output folder has ended, with its model where the keys say."""
    file = config.output_dir / RESULTS
    pushed = (read_json(file) if file.is_file() else {}).get("pushed") or {}
    return "commit" in pushed and pushed["repo"] == address_of(config).repo


def push_as_asked(config: Config) -> dict[str, str]:
    """Push the finished run's model; what `run.json` says of it. A run does not fail for want of a hub at its end."""
    address = address_of(config)
    try:
        commit = send(pack(config.output_dir, address.repo), address)
    except UserError as error:
        print_line(f"Not pushed: {error}. Later: ds-sft push {config.output_dir} {address.repo}")
        return {"repo": address.repo, "error": str(error)}
    print_line(f"Pushed: {commit}")
    return {"repo": address.repo, "commit": commit}


def send(parcel: Parcel, address: Address, message: str | None = None) -> str:
    """Push in one commit, and take out what an earlier push left and this one has not; the commit's address.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = _api(address)
    sizes, seen = parcel.sizes, "public" if address.public else "private"
    with _in_one_line(address):
        if not _is_there(api, address):
            api.create_repo(address.repo, private=not address.public)
        if address.revision is not None:
            api.create_branch(address.repo, branch=address.revision, exist_ok=True)
        there = set(api.list_repo_files(address.repo, revision=address.revision))
        print_line(
            f"Pushing {len(sizes)} files ({in_units(sum(sizes.values()))}) to {address.repo}"
            f"{f', branch {address.revision}' if address.revision else ''} ({seen})."
        )
        added = [CommitOperationAdd(name, text.encode()) for name, text in parcel.texts.items()]
        added += [CommitOperationAdd(name, str(parcel.folder / name)) for name in parcel.files]
        old = [name for name in sorted(there - sizes.keys()) if any(fnmatchcase(name, pattern) for pattern in OWN)]
        commit = api.create_commit(
            address.repo,
            [*added, *(CommitOperationDelete(name) for name in old)],
            commit_message=message or f"Upload a model trained with ds_sft {__version__}",
            revision=address.revision,
        )
    return str(commit.commit_url)


def _api(address: Address) -> HfApi:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    token = address.token or get_token()
    if token is None:
        raise UserError(f"{address.repo}: not logged in to the hub: {LOGIN}")
    if not re.fullmatch(r"[!-~]+", token):  # what sends it would say it whole
        raise UserError(f"{address.repo}: the token has characters that no token has, such as a blank: {LOGIN}")
    if trouble := unreachable():
        raise UserError(f"{address.repo}: nothing was pushed: {trouble}")
    return HfApi(token=token)


def _is_there(api: HfApi, address: Address) -> bool:
    """Whether the repository is there, and then as asked.

    Raises:
        UserError: it has files already, or is public or private where the other was asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(address.repo)
    except RepositoryNotFoundError:
        return False
    files = {file.rfilename for file in found.siblings or []} - {WRITTEN_BY_HUB}
    if files and not address.update:
        raise UserError(
            f"{address.repo}: exists and has {len(files)} files: ds-sft push --update puts a model in their place (the "
            "hub keeps the old ones in its history), or give another name"
        )
    if bool(found.private) == address.public:
        is_now, remedy = ("private", "leave out --public") if found.private else ("public", "--public says you mean it")
        raise UserError(f"{address.repo}: exists and is {is_now}: {remedy}, or change it in its settings on the hub")
    return True


@contextmanager
def _in_one_line(address: Address) -> Iterator[None]:
    """What the hub's library raises, said in one line.

    Raises:
        UserError: in place of its exceptions.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.errors import HTTPError as BrokenConnection  # type: ignore[attr-defined]  # httpx's or httpx2's

    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{address.repo}: {first_line(error)}") from None
    except HfHubHTTPError as error:
        raise UserError(f"{address.repo}: {_refusal(error)}") from None
    except (BrokenConnection, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{address.repo}: nothing was pushed: {first_line(error.__cause__ or error)}") from None


def _refusal(error: Any) -> str:
    """What the hub's answer means for who pushes."""
    code = error.response.status_code
    said = error.server_message or first_line(error)
    if code == 401:
        return f"the hub does not accept the token: {LOGIN}"
    if code == 403:
        return f"the token may not write there ({said}): take one of role write, or a name of your own"
    return f"nothing was pushed: the hub answered {code}: {said}"
