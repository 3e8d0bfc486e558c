"""Extractors, their names, caches, and the Inception graph with random weights."""

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from sfumato.errors import UserError
from sfumato.metrics import cached_network, classifier_extractor, extract, reference
from sfumato.metrics import features as features_module
from sfumato.modalities.image.inception import INCEPTION_ENV, Inception, find_inception, inception_extractor
from sfumato.modalities.image.metrics import GeneratedImages


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Linear(64, 6)

    def features(self, x):
        return torch.relu(self.body(x.flatten(1)))


@pytest.fixture
def data():
    return GeneratedImages(torch.randn(1300, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_the_name_of_an_extractor_depends_on_its_weights(data):
    first, again, other = (classifier_extractor(lambda s=s: Net(s)) for s in (0, 0, 1))
    assert first.name == again.name != other.name
    assert first.name.startswith("classifier-")
    features = extract(first, data)
    assert features.shape == (1300, 6) and not features.requires_grad


def test_reference_statistics_are_cached_by_content_and_extractor(data, tmp_path):
    calls = []

    class Counting:
        name = "counting-1"

        def __call__(self, x):
            calls.append(len(x))
            return x.flatten(1)[:, :5]

    extractor = Counting()
    first = reference(data, extractor, tmp_path, max_sample=700)
    assert sum(calls) == 1300 and first.sample.shape == (700, 5)
    again = reference(data, extractor, tmp_path, max_sample=700)
    assert sum(calls) == 1300
    assert torch.equal(first.sample, again.sample) and torch.equal(first.moments.cov, again.moments.cov)
    assert torch.allclose(first.moments.mean, data.x.flatten(1)[:, :5].double().mean(0))
    reference(data.subset(torch.arange(1000)), extractor, tmp_path, max_sample=700)
    assert sum(calls) == 2300
    extractor.name = "counting-2"
    reference(data, extractor, tmp_path, max_sample=700)
    assert sum(calls) == 3600


def test_a_cached_network_is_trained_once_and_an_unfit_file_is_not_used(tmp_path):
    trained = []

    def train():
        trained.append(1)
        return Net(3)

    path = tmp_path / "sub" / "net.safetensors"
    first, again = (cached_network(path, Net, train) for _ in range(2))
    assert trained == [1] and torch.equal(first.body.weight, again.body.weight)
    assert [p.name for p in path.parent.iterdir()] == ["net.safetensors"]
    save_file({"body.weight": torch.zeros(1)}, path)
    assert torch.equal(cached_network(path, Net, train).body.weight, first.body.weight)
    path.write_bytes(b"damaged")
    assert torch.equal(cached_network(path, Net, train).body.weight, first.body.weight)
    assert trained == [1, 1, 1]


def test_an_unwritable_cache_is_no_error(data, tmp_path, monkeypatch):
    def full(state, path):
        path.write_bytes(b"half")
        raise SafetensorError("StorageFull")

    monkeypatch.setattr(features_module, "save_file", full)
    assert isinstance(cached_network(tmp_path / "net.safetensors", Net, Net), Net)
    extractor = classifier_extractor(Net)
    assert reference(data, extractor, tmp_path).moments.count == 1300
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_ignored(data, tmp_path):
    extractor = classifier_extractor(Net)
    first = reference(data, extractor, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(reference(data, extractor, tmp_path).moments.mean, first.moments.mean)


def test_inception_has_the_published_shape_and_runs():
    net = Inception().eval()
    # Inception-v3 without its auxiliary head has 23,834,568 parameters for 1,000 classes; this one has eight more
    assert sum(p.numel() for p in net.parameters()) == 23_834_568 + 8 * 2049
    assert {"Mixed_5b.branch3x3dbl_3.conv.weight", "Mixed_7c.branch3x3dbl_3b.bn.running_var"} <= net.state_dict().keys()
    assert net.state_dict()["Mixed_6e.branch7x7dbl_4.conv.weight"].shape == (192, 192, 7, 1)
    with torch.no_grad():
        features = net(torch.linspace(-1, 1, 2 * 28 * 28).view(2, 1, 28, 28))
    assert features.shape == (2, 2048) and features.isfinite().all() and (features >= 0).all()


def test_inception_weights_are_found_and_checked_and_name_the_extractor(tmp_path, monkeypatch):
    monkeypatch.delenv(INCEPTION_ENV, raising=False)
    assert find_inception(tmp_path) is None and find_inception() is None
    path = tmp_path / "pt_inception-2015-12-05.safetensors"
    state = {k: v for k, v in Inception().state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file({**state, "AuxLogits.fc.weight": torch.zeros(2)}, path)
    assert find_inception(tmp_path) == path
    assert inception_extractor(path).name.startswith("inception-")
    del state["fc.bias"]
    save_file(state, path)
    with pytest.raises(UserError, match=r"fc\.bias"):
        inception_extractor(path)
    monkeypatch.setenv(INCEPTION_ENV, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=INCEPTION_ENV):
        find_inception()
