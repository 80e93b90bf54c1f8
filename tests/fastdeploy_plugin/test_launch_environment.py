"""The server's environment: what is set, what is merged, what a user's value does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.fastdeploy_plugin.launch import environment
from fd_dsa.fastdeploy_plugin.launch.environment import (
    ENTRY_POINT_GROUPS,
    merged_plugins,
    require_entry_points,
    server_environment,
)

SET = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "fd_dsa"}


@pytest.fixture(autouse=True)
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other plug-in is installed, whatever this machine has."""
    monkeypatch.setattr(environment, "plugin_names", lambda: ["fd_dsa"])


def test_two_variables_are_set_and_the_rest_passes_through() -> None:
    before = {"PATH": "/bin", "FD_LOG_DIR": "there", "FD_DSA_CHECK": "1"}
    found, warnings = server_environment(before)
    assert found == before | SET
    assert warnings == [] and "FD_PLUGINS" not in before


@pytest.mark.parametrize(
    ("names", "merged"),
    [
        ("", "fd_dsa"),
        ("fd_dsa", "fd_dsa"),
        ("other", "other,fd_dsa"),
        ("fd_dsa,other", "fd_dsa,other"),
        (" other , fd_dsa ,", "other,fd_dsa"),
        ("a,b,a", "a,b,fd_dsa"),
    ],
)
def test_plugins_are_merged_without_spaces(names: str, merged: str) -> None:
    assert merged_plugins(names) == merged
    assert server_environment({"FD_PLUGINS": names})[0]["FD_PLUGINS"] == merged


def test_another_backend_is_an_error_that_names_both() -> None:
    with pytest.raises(ConfigError, match="got 'MLA_ATTN', --engine fastdeploy needs DSA_ATTN"):
        server_environment({"FD_ATTENTION_BACKEND": "MLA_ATTN"})
    assert server_environment({"FD_ATTENTION_BACKEND": ""})[0] == SET
    assert server_environment({"FD_ATTENTION_BACKEND": "DSA_ATTN"})[0] == SET


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_chunked_prefill_is_never_switched_off_here(value: str) -> None:
    found, warnings = server_environment({"FD_DISABLE_CHUNKED_PREFILL": value})
    assert found["FD_DISABLE_CHUNKED_PREFILL"] == value
    assert len(warnings) == (value == "1")
    assert all(line.startswith("FD_DISABLE_CHUNKED_PREFILL=1 stays") for line in warnings)


def test_plugins_that_stay_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "plugin_names", lambda: ["fd_dsa", "other"])
    assert "other plug-ins (other) stay out" in server_environment({})[1][0]
    assert server_environment({"FD_PLUGINS": "other"})[1] == []
    assert server_environment({"FD_PLUGINS": ""})[1] == []


def test_a_package_without_entry_points_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "fd_dsa_elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fd_dsa_elsewhere\nVersion: 1.0\n")
    lines = [f"[{group}]\nfd_dsa = fd_dsa.fastdeploy_plugin:x\n" for group in ENTRY_POINT_GROUPS]
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    (info / "entry_points.txt").write_text("".join(lines))
    require_entry_points()
    (info / "entry_points.txt").write_text(lines[0])
    with pytest.raises(BackendUnavailable, match=f"no entry point in {ENTRY_POINT_GROUPS[1]}, "):
        require_entry_points()
