"""The protocol of a score in one line."""

from __future__ import annotations

from cae2pipe.config.evaluate import AnySettings, AttentiveSettings, FinetuneSettings, KnnSettings


def protocol(settings: AnySettings, size: int) -> str:
    """The protocol of a score at crops of ``size`` pixels."""
    share = settings.crop if isinstance(settings, FinetuneSettings) else settings.features.crop
    crop = f"crop {size} of {round(size / share)}"
    if isinstance(settings, KnnSettings):
        return f"k {settings.k[0]}, temperature {settings.temperature:g}, {crop}"
    if isinstance(settings, FinetuneSettings):
        mixed = f"mixup {settings.mixup:g}, cutmix {settings.cutmix:g}, smoothing {settings.smoothing:g}"
        extras = [
            f"RandAugment {settings.draw.rand_augment}" if settings.draw.rand_augment else "no RandAugment",
            mixed,
            f"erasing {settings.erase:g}",
            f"drop path {settings.drop_path:g}",
            *(["relative positions"] if settings.relative_positions else []),
            *([f"average of {settings.ema:g}"] if settings.ema else []),
        ]
        return (
            f"AdamW, lr {settings.lr:g} x batch / 1024, layer decay {settings.layer_decay:g}, batch {settings.batch}, "
            f"last of {settings.epochs} epochs, {', '.join(extras)}, {crop}"
        )
    if isinstance(settings, AttentiveSettings):
        return (
            f"SGD, lr {settings.lr:g} x batch / 8192, batch {settings.batch}, {settings.epochs} epochs, "
            f"new crops every epoch, BatchNorm's epsilon {settings.eps:g}, {crop}"
        )
    rate = f"the best of {len(settings.sweep)} on held-out training images" if settings.sweep else f"{settings.lr:g}"
    clipped = " with clipped sides" if settings.draw.clip else ""
    seen = f"new crops{clipped} every epoch"
    if settings.chunk != 256:
        seen += f", BatchNorm over {settings.chunk}"
    if settings.cached_crops == 1:
        seen = "features of one central crop"
    elif settings.cached_crops:
        seen = f"{settings.cached_crops} cached crops{clipped}"
    return f"LARS, lr {rate} x batch / 256, batch {settings.batch}, {settings.epochs} epochs, {seen}, {crop}"
