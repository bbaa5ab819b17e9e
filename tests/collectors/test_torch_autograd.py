"""What the collector leans on of autograd and of modules."""

import copy
import io
import pickle

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
