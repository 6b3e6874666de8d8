import numpy as np
import pytest
import torch

from multikd.evaluation.probes import ProbeSettings, fit_probe
from multikd.evaluation.sgd_probe import SgdSettings, moments, train_layers


def blobs(count=600, width=12, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, classes, (count,), generator=generator)
    return 3 + 5 * (centres[labels] + torch.randn(count, width, generator=generator)), labels


@pytest.mark.parametrize("several", [False, True])
def test_every_rate_equals_its_own_torch_run(several):
    """The batched hand-written step against torch's SGD, scheduler and loss, one rate at a time."""
    x, y = blobs(200)
    target = torch.nn.functional.one_hot(y, 4).float() if several else y
    settings = SgdSettings((0.01, 0.1, 1.0), epochs=3, batch_size=64, weight_decay=0.01, seed=5)
    layers = train_layers(x, target, 4, settings)
    mean, std = moments(x)
    rows = (x - mean) / std
    got = torch.cat(list(layers.logits(x)))
    for index, rate in enumerate(settings.learning_rates):
        layer = torch.nn.Linear(12, 4)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimiser = torch.optim.SGD(
            [{"params": [layer.weight], "weight_decay": 0.01}, {"params": [layer.bias]}],
            lr=rate * 64 / 256,
            momentum=0.9,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: 0.5 * (1 + np.cos(np.pi * step / 12))
        )
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            for some in torch.randperm(200, generator=generator).split(64):
                logits = layer(rows[some])
                if several:
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(
                        logits, target[some], reduction="sum"
                    ) / len(some)
                else:
                    loss = torch.nn.functional.cross_entropy(logits, y[some])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        torch.testing.assert_close(got[:, index], layer(rows).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got[:, 0], got[:, 1])


def test_a_rate_that_diverges_spoils_no_other_and_is_not_chosen():
    x, y = blobs()
    test_x, test_y = blobs(300, seed=1)
    settings = ProbeSettings("sgd", learning_rates=(0.1, 1e38), epochs=5, batch_size=64)
    fit = fit_probe(x, y, test_x, 4, settings)
    assert fit.facts == {"learning_rate": 0.1}
    assert fit.validation[1] == (1e38, -1.0)
    assert float((fit.answers == test_y).double().mean()) > 0.9
    with pytest.raises(ValueError, match="diverged at learning rate 1e"):
        fit_probe(x, y, test_x, 4, ProbeSettings("sgd", learning_rates=(1e38,), batch_size=64))


def test_the_rate_is_chosen_on_held_rows_alone():
    x, y = blobs()
    settings = ProbeSettings("sgd", learning_rates=(1e-6, 1e-3, 0.1), epochs=3, batch_size=64)
    first = fit_probe(x, y, x[:5], 4, settings)
    again = fit_probe(x, y, 100 + x[:9], 4, settings)
    assert first.validation == again.validation
    best = max(score for _, score in first.validation)
    smallest = min(rate for rate, score in first.validation if score == best)
    assert first.facts == {"learning_rate": smallest}
    # The labels of the held rows are what counts: with wrong ones the same layers score nothing.
    held = torch.arange(600) >= 500
    wrong = y.clone()
    wrong[held] = (y[held] + 1) % 4
    turned = fit_probe(x, wrong, x[:5], 4, settings, held)
    assert turned.validation[2][1] < 0.2


def test_agrees_with_l_bfgs_on_a_large_easy_set():
    x, y = blobs(3000)
    test_x, test_y = blobs(1000, seed=1)
    by_lbfgs = fit_probe(x, y, test_x, 4, ProbeSettings("lbfgs"))
    by_sgd = fit_probe(x, y, test_x, 4, ProbeSettings("sgd", epochs=20, batch_size=256))
    agreement = float((by_lbfgs.answers == by_sgd.answers).double().mean())
    assert agreement > 0.98
    for fit in (by_lbfgs, by_sgd):
        assert float((fit.answers == test_y).double().mean()) > 0.9
        torch.testing.assert_close(fit.probabilities.sum(1), torch.ones(1000).double())


def test_auto_chooses_by_size():
    settings = ProbeSettings()
    assert settings.chosen(60_000, 1280, 10) == "lbfgs"
    assert settings.chosen(1_281_167, 768, 1000) == "sgd"
    assert ProbeSettings("sgd").chosen(10, 2, 2) == "sgd"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"solver": "adam"}, "solver must be one of auto, lbfgs, sgd"),
        ({"c": 0.0}, "C must be above 0"),
        ({"candidates": ()}, "candidates for C"),
        ({"validation_fraction": 1.0}, "between 0 and 1"),
        ({"learning_rates": (0.0,)}, "learning rates must be above 0"),
        ({"epochs": 0}, "epochs and batch_size"),
        ({"tolerance": 0.0}, "tolerance above 0"),
    ],
)
def test_settings_out_of_range_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ProbeSettings(**change)
