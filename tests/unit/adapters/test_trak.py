"""TRAK with our gradient computer and projector: its own pipeline, against its own computers, its own projector, and exact kernels."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

import partials as pt
from tests.oracle import gradients

trak = pytest.importorskip("trak")

from trak.gradient_computers import FunctionalGradientComputer, IterativeGradientComputer  # noqa: E402
from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput, IterativeImageClassificationModelOutput  # noqa: E402
from trak.projectors import BasicProjector, NoOpProjector, ProjectionType  # noqa: E402

from partials.adapters.trak import GradientComputer, Sketch  # noqa: E402

N, C = 12, 3


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("trak.traker.tqdm", lambda it, **_: it)
    yield
    logging.getLogger("TRAK").setLevel(logging.WARNING)


def plain():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, C)).eval()


class Recurrent(nn.Module):
    """What torch.vmap cannot run, with one matrix used twice."""

    def __init__(self):
        super().__init__()
        self.gru, self.square, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.head(self.square(self.square(self.gru(x.reshape(-1, 3, 2))[0][:, -1]).tanh()))


def data(n=N):
    torch.manual_seed(2)
    return torch.randn(n, 6), torch.randint(C, (n,))


def traker(model, folder, computer, projector, task="image_classification", **options):
    made = trak.TRAKer(
        model=model,
        task=task,
        train_set_size=N,
        save_dir=folder,
        device="cpu",
        gradient_computer=computer,
        projector=projector,
        use_half_precision=False,
        logging_level=logging.ERROR,
        lambda_reg=1e-2,
        **options,
    )
    made.load_checkpoint(model.state_dict(), model_id=0)
    return made


def scores(made, model):
    made.featurize(data(), num_samples=N)
    made.finalize_features()
    made.start_scoring_checkpoint(exp_name="test", checkpoint=model.state_dict(), model_id=0, num_targets=N)
    made.score(batch=data(), num_samples=N)
    return torch.tensor(made.finalize_scores(exp_name="test"))


def margins(model, x, y):
    logits = model(x)
    others = logits.masked_fill(nn.functional.one_hot(y, C).bool(), -torch.inf)
    return logits.gather(1, y[:, None])[:, 0] - others.logsumexp(1)


def test_gradients_are_those_of_its_own_computer():
    model, batch, task = plain(), data(), ImageClassificationModelOutput()
    ours = GradientComputer(model, task, 53, torch.float32, "cpu")
    theirs = FunctionalGradientComputer(model, task, 53, torch.float32, "cpu")
    found, expected = ours.compute_per_sample_grad(batch), theirs.compute_per_sample_grad(batch)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    torch.testing.assert_close(ours.compute_loss_grad(batch), theirs.compute_loss_grad(batch))


def test_only_what_is_asked_for_is_differentiated():
    ours = GradientComputer(plain(), ImageClassificationModelOutput(), 15, torch.float32, "cpu", grad_wrt=["2.weight"], dense=False)
    assert ours.compute_per_sample_grad(data()).names == ("2.weight",)


def test_a_batched_task_of_a_model_that_vmap_cannot_run():
    torch.manual_seed(1)
    model, batch, task = Recurrent().eval(), data(), IterativeImageClassificationModelOutput()
    ours = GradientComputer(model, task, batched=True)
    found = torch.cat([part.flatten(1) for part in ours.compute_per_sample_grad(batch).values()], 1)
    size = sum(p.numel() for p in model.parameters())
    theirs = IterativeGradientComputer(model, task, size, torch.float32, "cpu")
    torch.testing.assert_close(found, theirs.compute_per_sample_grad(batch), rtol=1e-4, atol=1e-6)
    model.double()
    x, y = batch[0].double(), batch[1]
    rows = gradients(margins(model, x, y), dict(model.named_parameters()))
    torch.testing.assert_close(found.double(), torch.cat([part.flatten(1) for part in rows.values()], 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.compute_loss_grad((x, y)), theirs.compute_loss_grad((x, y)))


PROJECTORS = {
    "none": lambda: NoOpProjector(device="cpu"),
    "normal": lambda: BasicProjector(53, 8, 0, ProjectionType.normal, "cpu", block_size=4),
}


@pytest.mark.parametrize("name", PROJECTORS)
def test_the_whole_pipeline_as_its_own(tmp_path, name):
    model, projector = plain(), PROJECTORS[name]
    theirs = scores(traker(model, tmp_path / "theirs", FunctionalGradientComputer, projector()), model)
    ours = scores(traker(model, tmp_path / "ours", GradientComputer, projector()), model)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sparse", "kronecker"])
def test_sketches(tmp_path, kind):
    """The kernel of many numbers is near the exact one, on the scale of TRAK's own projectors."""
    model, k = plain(), 4096
    made = traker(model, tmp_path, partial(GradientComputer, dense=False, check="never"), Sketch(k, kind))
    made.featurize(data(), num_samples=N)
    found = torch.tensor(made.saver.current_store["grads"]) * made.normalize_factor / k**0.5
    exact = pt.gradient(lambda x, y: margins(model, x, y), *data(), params=model).gram()
    assert (found @ found.T - exact).norm() < (0.3 if kind == "kronecker" else 0.1) * exact.norm()


def test_scores_of_sketches(tmp_path):
    model = plain()
    exact = scores(traker(model, tmp_path / "exact", GradientComputer, NoOpProjector(device="cpu")), model)
    sketched = scores(traker(model, tmp_path / "sketched", partial(GradientComputer, dense=False), Sketch(2048)), model)
    assert torch.corrcoef(torch.stack([exact.flatten(), sketched.flatten()]))[0, 1] > 0.9


def test_every_checkpoint_has_its_own_projection():
    G = GradientComputer(plain(), ImageClassificationModelOutput(), dense=False).compute_per_sample_grad(data())
    sketch = Sketch(16, seed=3)
    assert torch.equal(sketch.project(G, 0), sketch.project(G, 0))
    assert not torch.equal(sketch.project(G, 0), sketch.project(G, 1))
    with pytest.raises(pt.InputError, match="Sketch projects factors\n  got       dict"):
        sketch.project(G.dict(), 0)


def test_a_task_of_ones_own_with_a_budget():
    class Loss(AbstractModelOutput):
        def __init__(self):
            pass

        def get_output(self, model, weights, buffers, x, y):
            return nn.functional.cross_entropy(model(x), y, reduction="none")

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            return torch.ones(len(batch[0]), 1)

    model, (x, y) = plain(), data()
    found = GradientComputer(model, Loss(), batched=True, dense=False, max_memory="1GiB").compute_per_sample_grad((x, y))
    torch.testing.assert_close(found.norms(), pt.gradient(model, x, y, loss=nn.functional.cross_entropy).norms())
