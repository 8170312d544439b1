"""The latents of a target set with zarr and numpy alone: python read_with_zarr.py SET [v00/000000 [patches]]."""

import sys

import numpy as np
import zarr


def read_latents(root: str, store: str = "v00/000000", latents: str = "patches") -> np.ndarray:
    """Patches (or summary, layer-03) of a shard's view: (samples, tokens, dimensions), of length 1 but for coding."""
    group = zarr.open_group(f"{root}/latents/{store}.zarr/{latents}", mode="r")
    if group.attrs["codec"] == "klt":
        codec = zarr.open_group(f"{root}/codec.zarr/{latents}", mode="r")
        low, high = group["symbols"][...].astype(np.int32)  # each (dimensions, samples, tokens)
        symbols = low + 256 * high
        bins = ((symbols >> 1) ^ -(symbols & 1)).transpose(1, 0, 2)
        if "token_basis" in codec:
            rank = np.argsort(np.argsort(-codec["spread"][...].ravel(), kind="stable"))
            ranked = bins.reshape(len(bins), -1)[:, rank].reshape(len(bins), *codec["spread"].shape)
            rows = codec["token_basis"][...] @ ranked.astype(np.float32)
        else:  # a set that an older version began
            rows = bins.transpose(0, 2, 1).astype(np.float32)
        return rows * codec["step"][0] @ codec["basis"][...].T + codec["mean"][...]
    tokens = group["tokens"][...].astype(np.float32)
    return tokens * group["scales"][...].astype(np.float32)[..., None] if group.attrs["codec"] == "int8" else tokens


if __name__ == "__main__":
    print(read_latents(*sys.argv[1:]).shape)  # noqa: T201
