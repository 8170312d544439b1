"""A value that does not fit is named as the user gave it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import cae2pipe
from cae2pipe.cli import app
from cae2pipe.errors import SettingsError


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("pretrain SET OUT --probe SET --every 0", "every (--every): "),
        ("pretrain SET OUT --epochs 0", "epochs (--epochs): "),
        ("pretrain SET OUT --repeat-masks 0", "repeat_masks (--repeat-masks): "),
        ("pretrain SET OUT --workers -5", "workers (--workers): "),
        ("extract-targets SET OUT --views 0", "views (--views): "),
        ("extract-targets SET OUT --fidelity 2", "fidelity (--fidelity): "),
        ("shard SET OUT --workers -5", "workers (--workers): "),
        ("recode SET OUT --fidelity 2", "fidelity (--fidelity): "),
        ("evaluate knn random:tiny SET OUT --workers -5", "workers (--workers): "),
        ("compare table1 SET SET OUT --workers -5", "workers (--workers): "),
        ("pretrain SET OUT --probe SET --set probe.every=0", "probe.every: "),
        ("pretrain SET OUT --probe SET --every 2 --set probe.every=0", "probe.every: "),
        ("pretrain SET OUT --epochs 20 --set epochs=0", "epochs: "),
    ],
)
def test_an_option_is_named_as_it_was_typed(command, named, target_root, tmp_path):
    words = {"SET": str(target_root), "OUT": str(tmp_path / "out")}
    result = CliRunner().invoke(app, [words.get(word, word) for word in command.split()])
    assert result.exit_code == 2
    assert f"error: {named}Input should be" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["base", cae2pipe.settings("pretrain", "base")], ids=["preset", "settings"])
def test_an_argument_is_named_unless_overrides_take_precedence(config):
    def told(**options):
        with pytest.raises(SettingsError) as caught:
            cae2pipe.pretrain("set", "out", config=config, probe="images", **options)
        return caught.value.what, caught.value.fix

    what, fix = told(every=0)
    assert what.startswith("every (--every): ")
    assert fix == "change every (--every)"
    for overrides in ({"probe.every": 0}, {"probe": {"every": 0}}, ["probe.every=0"], ["probe={every: 0}"]):
        what, fix = told(every=3, overrides=overrides)
        assert what.startswith("probe.every: ")
        assert fix == "--set probe.every=..."
