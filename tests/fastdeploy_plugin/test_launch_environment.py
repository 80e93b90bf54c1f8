"""The server's environment: what is set, what is merged, what a user's value does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.fastdeploy_plugin.launch import environment, start
from fd_dsa.fastdeploy_plugin.launch.environment import ENTRY_POINT_GROUPS, server_environment
from fd_dsa.fastdeploy_plugin.launch.flags import PassedFlags
from fd_dsa.serve.flag_sources import parse_args

SET = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "fd_dsa"}
STAYS = "FD_DISABLE_CHUNKED_PREFILL=1 stays"
OTHERS = "other plug-ins (other) stay out"


@pytest.mark.parametrize(
    ("before", "changed", "warning"),
    [
        ({}, {}, OTHERS),
        ({"PATH": "/bin", "FD_LOG_DIR": "there", "FD_DSA_CHECK": "1"}, {}, OTHERS),
        ({"FD_ATTENTION_BACKEND": ""}, {}, OTHERS),
        ({"FD_ATTENTION_BACKEND": "DSA_ATTN"}, {}, OTHERS),
        # plug-ins are merged without spaces; who names some has chosen
        ({"FD_PLUGINS": ""}, {}, ""),
        ({"FD_PLUGINS": "fd_dsa"}, {}, ""),
        ({"FD_PLUGINS": "other"}, {"FD_PLUGINS": "other,fd_dsa"}, ""),
        ({"FD_PLUGINS": "fd_dsa,other"}, {"FD_PLUGINS": "fd_dsa,other"}, ""),
        ({"FD_PLUGINS": " other , fd_dsa ,"}, {"FD_PLUGINS": "other,fd_dsa"}, ""),
        ({"FD_PLUGINS": "a,b,a"}, {"FD_PLUGINS": "a,b,fd_dsa"}, ""),
        # chunked prefill is never switched off here
        ({"FD_DISABLE_CHUNKED_PREFILL": "1", "FD_PLUGINS": "fd_dsa"}, {}, STAYS),
        ({"FD_DISABLE_CHUNKED_PREFILL": "0", "FD_PLUGINS": "fd_dsa"}, {}, ""),
        ({"FD_DISABLE_CHUNKED_PREFILL": "", "FD_PLUGINS": "fd_dsa"}, {}, ""),
    ],
)
def test_two_variables_are_set_and_the_rest_passes_through(
    before: dict[str, str], changed: dict[str, str], warning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "plugin_names", lambda: {"fd_dsa", "other"})
    given = dict(before)
    found, warnings = server_environment(before)
    assert found == given | SET | changed and before == given
    assert len(warnings) == bool(warning) and warning in "".join(warnings)
    monkeypatch.setattr(environment, "plugin_names", lambda: {"fd_dsa"})
    assert OTHERS not in "".join(server_environment(before)[1])


def test_another_backend_is_an_error_that_names_both() -> None:
    with pytest.raises(ConfigError, match="got 'MLA_ATTN', --engine fastdeploy needs DSA_ATTN"):
        server_environment({"FD_ATTENTION_BACKEND": "MLA_ATTN"})


def test_a_package_without_entry_points_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(start, "fastdeploy_is_installed", lambda: True)
    info = tmp_path / "fd_dsa_elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fd_dsa_elsewhere\nVersion: 1.0\n")
    lines = [f"[{group}]\nfd_dsa = fd_dsa.fastdeploy_plugin:x\n" for group in ENTRY_POINT_GROUPS]
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    (info / "entry_points.txt").write_text("".join(lines))
    args = parse_args([])
    with pytest.raises(ConfigError, match="--model: got none"):
        start.prepare(args, PassedFlags())
    (info / "entry_points.txt").write_text(lines[0])
    with pytest.raises(BackendUnavailable, match=f"no entry point in {ENTRY_POINT_GROUPS[1]}, "):
        start.prepare(args, PassedFlags())
