from pathlib import Path

import pytest
import torch

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.errors import SettingsError
from cae2pipe.methods import registry
from cae2pipe.methods.registry import build_method

SETTINGS = ModelSettings(width=16, depth=1, heads=2, image_size=32, predictor_depth=1, predictor_width=16)


def test_a_method_is_built_from_the_global_generator():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build_method("caev2", SETTINGS, 8).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["head.0.weight"], models[2]["head.0.weight"])
    assert models[0]["head.0.weight"].shape == (8, 16)


def test_the_method_in_the_documentation_is_one(monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    code = text[text.index("# mine.py") :].partition("```")[0]
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    exec(code, {"__name__": "mine"})
    model = registry.build_method("distilled", SETTINGS, 8)
    prediction = model(torch.zeros(1, 3, 32, 32), torch.tensor([[0, 2]]), torch.tensor([[1, 3]]))
    assert prediction.visible.shape == prediction.masked.shape == (1, 2, 8)
    deep = registry.build_method("distilled", SETTINGS.model_copy(update={"depth": 2, "drop_path": 0.5}), 8).eval()
    inputs = torch.ones(1, 3, 32, 32), torch.tensor([[0, 2]]), torch.tensor([[1, 3]])
    assert torch.equal(deep(*inputs, torch.zeros(1, deep.drop_columns)).visible, deep(*inputs).visible)


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(SettingsError, match="'cae2' \\(nearest: 'caev2'\\)") as caught:
        build_method("cae2", SETTINGS, 8)
    assert "caev2" in caught.value.fix
