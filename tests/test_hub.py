import logging
import re

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from rewardmodel.errors import InputError
from rewardmodel.hub import check_repository, upload

ME = {
    "name": "me",
    "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "school", "roleInOrg": "read"}],
    "auth": {"accessToken": {"role": "write"}},
}


def refuse(error):
    def call(*_, **__):
        raise error

    return call


@pytest.fixture
def hub(monkeypatch):
    """Return a hub in memory, logged in as `ME`: its methods can be replaced."""

    class Hub:
        exists = False

        def __init__(self, token=None):
            self.token = token

        def whoami(self):
            return ME

        def repo_exists(self, name):
            return self.exists

        def create_repo(self, name, private, exist_ok):
            self.uploaded.append(("create", name, private))

        def upload_folder(self, repo_id, folder_path):
            self.uploaded.append(("upload", repo_id, folder_path))

    Hub.uploaded = []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub


@pytest.mark.parametrize(("exists", "said"), [(True, "are replaced"), (False, "made, private")])
@pytest.mark.parametrize("name", ["me/model", "lab/model", "model"])
def test_a_repository_that_can_be_written_is_described(name, exists, said, hub, caplog):
    hub.exists = exists
    with caplog.at_level(logging.INFO, "rewardmodel"):
        check_repository(name, "--push-to-hub")
    assert re.search(f"--push-to-hub: {name}: me may write there; .*{said}", caplog.text)
    assert hub.uploaded == []


class UnauthorisedError(HfHubHTTPError):
    def __init__(self):
        Exception.__init__(self, "401")


@pytest.mark.parametrize(
    ("name", "user", "message"),
    [
        ("other/model", ME, "me may not write there; give an owner of: me, lab"),
        ("school/model", ME, "me may not write there"),
        ("me/model", ME | {"auth": {"accessToken": {"role": "read"}}}, "the token of me may only read; make one that"),
        ("a b/model", ME, "not a repository id .*; give owner/name"),
        ("me/model/x", ME, "not a repository id"),
        ("me/model", LocalTokenNotFoundError("no token"), "not logged in to the hub; run: hf auth login"),
        ("me/model", UnauthorisedError(), "the hub refuses the token .*401.*run: hf auth login"),
        ("me/model", OSError("no network"), r"the hub cannot be reached \(no network\); connect, or leave it out"),
    ],
)
def test_a_repository_that_cannot_be_written_is_refused_in_one_line(name, user, message, hub, monkeypatch):
    if isinstance(user, Exception):
        monkeypatch.setattr(hub, "whoami", refuse(user))
    else:
        monkeypatch.setattr(hub, "whoami", lambda self: user)
    with pytest.raises(InputError) as caught:
        check_repository(name, "trainer.push_to_hub")
    assert re.search(f"^trainer.push_to_hub: {name}: .*{message}", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_folder_is_uploaded_into_a_private_repository(hub, tmp_path):
    upload(tmp_path, "me/model")
    assert hub.uploaded == [("create", "me/model", True), ("upload", "me/model", tmp_path)]


def test_an_upload_that_fails_names_the_command_to_do_it_by_hand(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "upload_folder", refuse(OSError("cut off")))
    folder = tmp_path / "my export"
    with pytest.raises(InputError, match=r"cut off; the export in .* is complete") as caught:
        upload(folder, "me/model")
    assert str(caught.value).endswith(f"upload it with: hf upload me/model '{folder}' . --private")
