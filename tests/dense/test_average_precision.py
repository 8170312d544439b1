"""Average precision compared with pycocotools, on detections derived from the truth."""

import contextlib
import copy
import io

import numpy as np
import pytest

from cae2pipe.dense.average_precision import average_precision


def rectangle(x: int, y: int, w: int, h: int, size: int = 100) -> dict:
    from faster_coco_eval.core import mask

    area = np.zeros((size, size), dtype=np.uint8)
    area[y : y + h, x : x + w] = 1
    return mask.encode(np.asfortranarray(area))


@pytest.fixture
def data() -> tuple[dict, list[dict]]:
    rng = np.random.default_rng(0)
    annotations, found = [], []
    for image in range(6):
        for _ in range(5):
            x, y, w, h = (int(value) for value in rng.integers([0, 0, 8, 8], [50, 50, 48, 48]))
            category = int(rng.integers(1, 4))
            number = len(annotations) + 1
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"id": number, "image_id": image, "category_id": category, "bbox": [x, y, w, h], "area": w * h,
                 "iscrowd": int(number % 11 == 0), "segmentation": [corners]}
            )  # fmt: skip
            if annotations[-1]["iscrowd"]:
                annotations[-1]["segmentation"] = {**rectangle(x, y, w, h)}
                annotations[-1]["segmentation"]["counts"] = annotations[-1]["segmentation"]["counts"].decode()
            dx, dy = (int(value) for value in rng.integers(-3, 4, 2))
            x, y = max(0, x + dx), max(0, y + dy)
            if rng.random() < 0.9:
                guess = category if rng.random() < 0.8 else int(rng.integers(1, 4))
                found.append(
                    {"image_id": image, "category_id": guess, "score": float(rng.random()), "bbox": [x, y, w, h],
                     "segmentation": rectangle(x, y, w, h)}
                )  # fmt: skip
    images = [{"id": n, "width": 100, "height": 100, "file_name": f"{n}.jpg"} for n in range(6)]
    categories = [{"id": n, "name": f"c{n}"} for n in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}, found


def test_agrees_with_pycocotools(data):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    annotations, found = data
    ours = average_precision(copy.deepcopy(annotations), copy.deepcopy(found))
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco.COCO()
            truth.dataset = copy.deepcopy(annotations)
            truth.createIndex()
            theirs = cocoeval.COCOeval(truth, truth.loadRes(copy.deepcopy(found)), kind)
            theirs.evaluate(), theirs.accumulate(), theirs.summarize()
        wanted = theirs.stats[:6]
        own = [ours[f"ap_{name}"], *(ours[name][key] for key in ("ap50", "ap75", "ap_small", "ap_medium", "ap_large"))]
        assert [-1 if value is None else value for value in own] == pytest.approx(list(wanted))
        assert 0 < ours[f"ap_{name}"] < 1
        assert set(ours[name]["per_class"]) == {"c1", "c2", "c3"}
        assert np.mean(list(ours[name]["per_class"].values())) == pytest.approx(ours[f"ap_{name}"])


def test_the_truth_itself_and_nothing(data):
    annotations, _ = data
    exact = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 1.0, "bbox": a["bbox"],
         "segmentation": rectangle(*a["bbox"])}
        for a in annotations["annotations"] if not a["iscrowd"]
    ]  # fmt: skip
    perfect = average_precision(copy.deepcopy(annotations), exact)
    assert perfect["ap_box"] == pytest.approx(1)
    assert perfect["ap_mask"] > 0.95  # polygons are not rasterised to the pixel
    assert average_precision(annotations, [])["ap_box"] == 0
