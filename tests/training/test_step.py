from dataclasses import replace

import pytest
import torch

from cae2pipe.loading.batches import split
from cae2pipe.targets.planes import SPARE_AT, SPARE_BYTES, SPARES
from cae2pipe.training.memory import explain_out_of_memory, finer, fitting, upload_advice
from cae2pipe.training.objective import TERMS, compile_objective
from cae2pipe.training.step import Flags, forward


def gradients(step) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in step.parameters])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_add_up_to_it(make, pretrain_settings, parts):
    step, batches = make(pretrain_settings())
    for batch in (batches[0], batches[4]):  # a full batch, and an epoch's padded last one
        whole = step.backward(batch, 1), gradients(step)
        pieces = step.backward(batch, parts), gradients(step)
        torch.testing.assert_close(pieces[0], whole[0])
        torch.testing.assert_close(pieces[1], whole[1], rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_mean_over_real_samples(make, pretrain_settings):
    step, batches = make(pretrain_settings(model={"drop_path": 0.0}))
    last = batches[4]
    assert last.real == int(last.weights.sum()) < len(last.weights)
    alone = [
        forward(step.objective, replace(part, real=1), part.arrays)
        for part, weight in zip(split(last, step.axes, len(last.weights)), last.weights, strict=True)
        if weight
    ]
    torch.testing.assert_close(forward(step.objective, last, last.arrays), torch.stack(alone).mean(dim=0))


def test_recomputed_activations_give_the_same_gradients(make, pretrain_settings):
    kept, batches = make(pretrain_settings())
    again, _ = make(pretrain_settings(speed={"recompute": True}))
    assert again.model.encoder.checkpointing
    assert again.model.regressor.checkpointing
    for step in (kept, again):
        step.backward(batches[0], 1)
    assert torch.equal(gradients(kept), gradients(again))


def test_a_step_that_is_not_finite_changes_nothing_then_or_later(make, pretrain_settings):
    step, batches = make(pretrain_settings())
    step(batches[0], 1e-3)
    before = [p.detach().clone() for p in step.parameters]
    moments = [step.optimizer.state[p]["exp_avg"].clone() for p in step.parameters]
    bad = replace(batches[1], weights=batches[1].weights * float("nan"))
    values = step(bad, 1e-3).values()
    assert values["loss"] != values["loss"]
    step(batches[2], 1e-3)
    assert all(torch.equal(now, then) for now, then in zip(step.parameters, before, strict=True))
    assert all(
        torch.equal(step.optimizer.state[p]["exp_avg"], then) for p, then in zip(step.parameters, moments, strict=True)
    )


def test_what_is_sent_along_comes_back(make, pretrain_settings):
    step, batches = make(pretrain_settings())
    outcome = step(batches[0], 1e-3, Flags(waited=0.5, checkpoint_due=True))
    assert list(outcome.values()) == [*TERMS, "grad_norm"]
    assert outcome.flags() == Flags(waited=0.5, stop=0.0, checkpoint_due=1.0)


def test_the_clipped_norm_is_what_the_optimizer_sees(make, pretrain_settings):
    step, batches = make(pretrain_settings(optimizer={"clip": 0.01}))
    values = step(batches[0], 1e-3).values()
    assert values["grad_norm"] > 0.01
    assert gradients(step).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_several_masks_of_a_view_in_one_step(make, pretrain_settings):
    step, batches = make(pretrain_settings(mask={"repeat": 4}, model={"drop_path": 0.0}))
    batch = batches[0]
    assert len(batch.pixels) == len(batch.weights) == 8
    assert len(batch.visible) == len(batch.drop) == 32
    masks = {tuple(row) for row in batch.masked[:4].tolist()}
    assert len(masks) > 1
    _, plain = make(pretrain_settings(model={"drop_path": 0.0}))
    first = {key: row.tolist() for b in plain[:5] for key, row in zip(b.keys, b.masked, strict=True)}
    assert all(batch.masked[4 * row].tolist() == first[key] for row, key in enumerate(batch.keys))
    terms = forward(step.objective, batch, batch.arrays)
    by_hand = []
    for turn in range(4):
        own = replace(batch, visible=batch.visible[turn::4], masked=batch.masked[turn::4], drop=batch.drop[turn::4])
        by_hand.append(forward(step.objective, own, own.arrays))
    torch.testing.assert_close(terms, torch.stack(by_hand).mean(dim=0))
    torch.testing.assert_close(step.backward(batch, 2), terms.detach())


class Small:
    """A module with memory for ``most`` images."""

    def __init__(self, real, most: int):
        self.real, self.most = real, most

    def __call__(self, pixels, *rest):
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.real(pixels, *rest)


@pytest.mark.parametrize(("most", "parts"), [(31, 2), (8, 4), (1, 32), (0, None)])
def test_out_of_memory_names_what_fits(make, pretrain_settings, most, parts):
    step, batches = make(pretrain_settings())
    step.module = Small(step.module, most)
    with pytest.raises(torch.OutOfMemoryError):
        step(batches[0], 1e-3)
    assert fitting(step, batches[0]) == parts
    error = explain_out_of_memory(step, batches[0], recompute=False)
    assert "32 images per pass do not fit" in error.what
    assert "speed.recompute=true" in error.fix
    if parts:
        assert f"--set speed.accumulation={parts}" in error.fix
        assert f"{32 // parts} images per pass would fit" in error.what


def test_out_of_memory_with_several_processes_names_what_can_be_set(make, pretrain_settings):
    step, batches = make(pretrain_settings(data={"batch": 48, "streams": 4}))
    step.accumulation, step.world = 6, replace(step.world, ranks=2)
    error = explain_out_of_memory(step, batches[0], recompute=True)
    assert error.fix == "--set speed.accumulation=12"
    assert "4 images per pass may fit" in error.what


def test_advice_is_legal_where_halves_are_not(make, pretrain_settings):
    step, batches = make(pretrain_settings(data={"batch": 36, "streams": 4}))
    step.accumulation = 4
    assert list(finer(len(batches[0].weights), step.accumulation)) == [9, 18, 36]
    assert upload_advice(36, 4, False) == "--set speed.accumulation=9 or --set speed.recompute=true"
    assert upload_advice(36, 24, False) == "--set speed.recompute=true"
    assert "data.batch" in upload_advice(36, 36, True)


def test_trials_compile_nothing_and_hold_the_moments(make, pretrain_settings):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    step, batches = make(pretrain_settings())
    before = [p.detach().clone() for p in step.parameters]
    compile_objective(step.objective, step.world, counter)
    step.module = Small(step.module, 4)
    assert fitting(step, batches[0]) == 8
    assert counter.frame_count == 0
    assert all("exp_avg" in step.optimizer.state[p] for p in step.parameters)
    assert all(torch.equal(now, then) for now, then in zip(step.parameters, before, strict=True))
    step.module = step.objective
    trained, _ = make(pretrain_settings())
    for turn in (0, 1):
        assert step(batches[turn], 1e-3).values() == pytest.approx(trained(batches[turn], 1e-3).values(), rel=1e-4)
    assert counter.frame_count == 1


def test_moments_that_do_not_fit_are_named(make, pretrain_settings, monkeypatch):
    step, batches = make(pretrain_settings())

    def ended():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step.optimizer, "step", ended)
    error = explain_out_of_memory(step, batches[0], recompute=False)
    assert "moments alone do not fit" in error.what
    assert "speed.parallel=fsdp" in error.fix


def test_one_graph_and_no_recompilation(make, pretrain_settings):
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounterWithBackend

    reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, batches = make(pretrain_settings())
    step, _ = make(pretrain_settings(speed={"accumulation": 2}))
    compile_objective(step.objective, step.world, counter)
    for batch in batches:  # two epochs, with the padded last batch of each
        found = step(batch, 1e-3).values()
        wanted = eager(batch, 1e-3).values()
        assert found == pytest.approx(wanted, rel=1e-2, abs=1e-3)
    assert counter.frame_count == 1


# torch's compiler reads gradients of tensors, and hides the resulting warning, but not from these tests.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_blocks_compiled_one_by_one_share_their_graphs(make, pretrain_settings):
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounterWithBackend

    reset()
    counter = CompileCounterWithBackend("aot_eager")
    step, batches = make(pretrain_settings(model={"depth": 4}))
    compile_objective(step.objective, replace(step.world, parallel="fsdp"), counter)
    for batch in batches[:2]:
        step(batch, 1e-3)
    assert counter.frame_count == 2  # the encoder's and the regressor's


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_single_high_bytes_change_no_graph(make, pretrain_settings):
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounterWithBackend

    reset()
    counter = CompileCounterWithBackend("aot_eager")
    step, batches = make(pretrain_settings())
    compile_objective(step.objective, step.world, counter)
    step(batches[0], 1e-3)
    arrays = batches[1].arrays
    many = {name: torch.nn.functional.pad(arrays[name], (0, 28)) for name in SPARES}
    many[SPARE_BYTES][3, 5:20] = 7
    many[SPARE_AT][3, 5:20] = torch.arange(15, dtype=torch.int32)
    step(replace(batches[1], arrays={**arrays, **many}), 1e-3)
    assert counter.frame_count == 1
