"""Latents averaged by area to a coarser grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.config.base import build_recorded, fingerprinted
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.presets import latents_shape
from cae2pipe.teachers.protocol import Teacher, TeacherInfo, TeacherOutput
from cae2pipe.teachers.token_grid import ResampledTeacher, area_shares

CPU = torch.device("cpu")
ONES = (1.0, 1.0, 1.0)
GRIDS = st.tuples(*[st.integers(1, 9)] * 4).map(lambda g: (max(g[:2]), max(g[2:]), min(g[:2]), min(g[2:])))


class Drawn(Teacher):
    """Gives what it was made with, whatever it sees."""

    def __init__(self, output: TeacherOutput, rows: int, cols: int, class_token: bool):
        dim = output.tokens.shape[-1]
        super().__init__(TeacherInfo("none", "drawn", {}, "", dim, rows, cols, class_token, 8, ONES, ONES, "fp32"), CPU)
        self.output = output

    def tokens(self, pixels):
        return self.output


def drawn(rows: int, cols: int, class_token: bool = True, seed: int = 0) -> Drawn:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows * cols + class_token, 3)
    tokens, layer = (torch.randn(shape, generator=generator) for _ in range(2))
    attention = torch.rand(2, rows * cols, generator=generator)
    summary = torch.randn(2, 5, generator=generator)
    return Drawn(TeacherOutput(tokens, attention, summary, {7: layer}), rows, cols, class_token)


def plain(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cells (B, R, C, D) averaged by area, one finer cell of a common multiple of both grids at a time."""
    rows, cols = size
    fine = cells.repeat(rows, axis=1).repeat(cols, axis=2)
    batch, height, width, dim = fine.shape
    return fine.reshape(batch, rows, height // rows, cols, width // cols, dim).mean(axis=(2, 4))


@settings(max_examples=40)
@given(GRIDS, st.booleans(), st.integers(0, 99))
def test_latents_are_means_by_area_and_attention_keeps_its_mass(grid, class_token, seed):
    rows, cols, *coarse = grid
    teacher = drawn(rows, cols, class_token, seed)
    own = teacher.output
    output = ResampledTeacher(teacher, tuple(coarse)).tokens(torch.zeros(2, 3, 8, 8))
    for tokens, given_ in ((output.tokens, own.tokens), (output.layers[7], own.layers[7])):
        assert torch.equal(tokens[:, :class_token], given_[:, :class_token])
        cells = given_[:, int(class_token) :].double().numpy().reshape(2, rows, cols, 3)
        patches = tokens[:, int(class_token) :]
        np.testing.assert_allclose(patches, plain(cells, coarse).reshape(2, -1, 3), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(patches.mean(dim=1), given_[:, int(class_token) :].mean(dim=1))
    assert output.summary is own.summary
    mass = plain(own.attention.double().numpy().reshape(2, rows, cols, 1), coarse) * rows * cols / np.prod(coarse)
    np.testing.assert_allclose(output.attention, mass.reshape(2, -1), rtol=1e-5)
    torch.testing.assert_close(output.attention.sum(dim=1), own.attention.sum(dim=1))


@given(st.integers(1, 9), st.integers(1, 6))
def test_where_grids_divide_a_cell_is_the_mean_of_whole_cells(size, factor):
    shares = area_shares(size * factor, size)
    assert torch.equal(shares, torch.eye(size, dtype=torch.float64).repeat_interleave(factor, dim=1))


def test_a_constant_stays_constant_and_halving_is_exact():
    teacher = drawn(28, 28)
    teacher.output = replace(teacher.output, tokens=torch.full((2, 785, 3), 0.7))
    constant = ResampledTeacher(teacher, (14, 14)).tokens(torch.zeros(2, 3, 8, 8)).tokens
    assert torch.equal(constant, torch.full((2, 197, 3), 0.7))
    uneven = drawn(27, 27)
    uneven.output = replace(uneven.output, tokens=torch.full((2, 730, 3), 0.7))
    torch.testing.assert_close(
        ResampledTeacher(uneven, (14, 14)).tokens(torch.zeros(2, 3, 8, 8)).tokens, torch.full((2, 197, 3), 0.7)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loaded_teacher_gives_its_latents_on_the_students_grid(extract_settings, precision):
    chosen = extract_settings(teacher={"precision": precision}).teacher
    own = load_teacher(chosen, CPU)
    coarse = load_teacher(chosen.model_copy(update={"grid": (2, 3)}), CPU)
    assert (coarse.attends, coarse.native, coarse.assumed) == (own.attends, own.native, own.assumed)
    assert own.attends
    assert (coarse.info.rows, coarse.info.cols) == (2, 3)
    assert latents_shape(chosen.model_copy(update={"grid": (2, 3)})) == (2, 3, 16)
    pixels = torch.randint(0, 256, (11, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    wanted, output = own(pixels), coarse(pixels)
    assert (output.tokens.dtype, output.attention.dtype) == (torch.float32, torch.float32)
    assert torch.equal(output.tokens[:, 0], wanted.tokens[:, 0])
    cells = wanted.tokens[:, 1:].double().numpy().reshape(11, 4, 4, 16)
    np.testing.assert_allclose(output.tokens[:, 1:], plain(cells, (2, 3)).reshape(11, 6, 16), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.attention.sum(dim=1), wanted.attention.sum(dim=1))


def test_a_finer_grid_than_the_teachers_is_refused(extract_settings):
    with pytest.raises(
        TeacherError, match=r"teacher\.grid 4 x 5 is finer than the teacher's own grid, 4 x 4"
    ) as caught:
        load_teacher(extract_settings(teacher={"grid": [4, 5]}).teacher, CPU)
    assert "lower teacher.grid" in caught.value.fix


def test_the_grid_enters_fingerprints_only_where_it_is_set(extract_settings):
    chosen = extract_settings().teacher
    assert "grid" not in fingerprinted(chosen)
    coarse = chosen.model_copy(update={"grid": (2, 2)})
    assert fingerprinted(coarse)["grid"] == [2, 2]
    assert build_recorded(TeacherSettings, fingerprinted(coarse), "test").grid == (2, 2)
