"""The server on this machine, in the place of the Hub."""

import pytest
from hub_server import serving
from huggingface_hub import constants
from huggingface_hub.utils import close_session


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that this process takes for the Hub, logged in; nothing waits before it is asked again."""
    with serving() as server:
        here = {
            "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_mine",
        }  # fmt: skip
        for name, value in here.items():
            monkeypatch.setenv(name, value)
        read = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": here["HF_HUB_CACHE"]}
        read |= {"HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}"}
        read |= {"HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": str(tmp_path / "token")}
        for name, value in read.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        # what functions of the module itself ask
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        close_session()
        yield server
        close_session()
