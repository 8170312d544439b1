import pytest

from cae2pipe.errors import ManifestError
from cae2pipe.stages.inspection import describe


def test_describe_says_what_a_target_set_holds(target_root):
    facts = describe(target_root)
    assert (facts["kind"], facts["images"], facts["views"], facts["codec"]) == ("targets", 150, 2, "klt")
    assert facts["shards_with_view"] == {"0": 3, "1": 3}
    assert facts["made_from"]["settings"]["codec"]["fidelity"] == 0.999
    assert describe(target_root / "shards")["images"] == 150


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        describe(tmp_path)
