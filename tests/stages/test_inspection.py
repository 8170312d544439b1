import pytest

from cae2pipe.errors import ManifestError
from cae2pipe.stages.inspection import inspect_folder


def test_describe_says_what_a_target_set_holds(target_root):
    facts = inspect_folder(target_root)
    assert (facts["kind"], facts["images"], facts["views"], facts["codec"]) == ("targets", 150, 2, "klt")
    assert facts["shards_with_view"] == {"0": 3, "1": 3}
    assert facts["made_from"]["settings"]["codec"]["fidelity"] == 0.999
    assert inspect_folder(target_root / "shards")["images"] == 150


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        inspect_folder(tmp_path)
