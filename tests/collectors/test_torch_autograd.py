"""What the collector leans on of autograd and of modules."""

import copy
import io
import pickle

import pytest
import torch

import gradiometer as gm
from gradiometer.optimizers.torch_api import MAdam
from tests.torch_models import case, squared


def test_an_attached_model_can_be_copied_and_saved_and_the_copy_has_no_collector() -> None:
    chosen = case("mlp")
    model = chosen.make()
    optimizer = MAdam(model.parameters(), variance="per_example")
    x, y = chosen.draw(4)
    with gm.attach(model, optimizer, endpoint="off") as collector:
        twin = copy.deepcopy(model)
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        for other in (twin, loaded, pickle.loads(pickle.dumps(model))):
            squared(other(x), y).mean().backward()
            assert collector.moments == {}
            gm.attach(other, endpoint="off").detach()
        squared(model(x), y).mean().backward()
        assert set(collector.moments) == {name for name, _ in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traced_and_transformed_forward_passes_are_no_training_step(caplog: pytest.LogCaptureFixture) -> None:
    chosen = case("mlp")
    model = chosen.make()
    x, y = chosen.draw(4)
    with gm.attach(model, endpoint="off") as collector:
        torch.func.vmap(model)(x.unsqueeze(1))
        torch.func.jacrev(model)(x)
        torch.func.jvp(model, (x,), (x,))
        torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x))
        assert collector.moments == {}
        squared(model(x), y).mean().backward()
        assert collector.moments["0.weight"].count == 4
        assert collector.step == 1
    assert not caplog.records
