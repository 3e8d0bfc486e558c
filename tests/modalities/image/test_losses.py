"""Losses of an image codec: their values, and which parameters each gradient reaches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.codecs.bottleneck import make_bottleneck
from sfumato.codecs.losses import AdversarialGate, adaptive_weight, frozen, hinge_d, hinge_g, reconstruction
from sfumato.errors import UserError
from sfumato.modalities.image.losses import VGG16, PatchDiscriminator, PerceptualLoss, load_vgg


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Pyramid(nn.Module):
    """Two maps, with dropout and batch normalisation, which must be in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.first(x), self.second(self.first(x))]

    maps = forward


class Toy(nn.Module):
    """A small codec with all parts of its training."""

    def __init__(self, bottleneck: str) -> None:
        super().__init__()
        self.bottleneck = make_bottleneck(bottleneck, 2, **({"size": 8} if bottleneck == "vq" else {}))
        self.encoder = nn.Conv2d(1, self.bottleneck.in_channels, 4, stride=4)
        self.decoder = nn.ConvTranspose2d(2, 1, 4, stride=4)
        self.discriminator = PatchDiscriminator(1, width=8, depth=1)
        self.perceptual = PerceptualLoss(Pyramid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, loss, _ = self.bottleneck(self.encoder(x), gen())
        return self.decoder(z), loss

    def parts_with_gradient(self) -> set[str]:
        """Parts whose parameters have a gradient: all of them, or none."""
        parts = {}
        for name in ("encoder", "bottleneck", "decoder", "discriminator", "perceptual"):
            grads = [p.grad for p in getattr(self, name).parameters()]
            assert len({grad is None for grad in grads}) <= 1, name
            parts[name] = any(grad.any() for grad in grads if grad is not None)
        return {name for name, has_gradient in parts.items() if has_gradient}


def toy(bottleneck: str = "kl") -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy(bottleneck)


def images(batch: int = 4, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(batch, 1, size, size, generator=gen(seed)) * 2 - 1


def adversarial_loss(net: Toy, x: Tensor) -> Tensor:
    with frozen(net.discriminator):
        return hinge_g(net.discriminator(net(x)[0]))


def discriminator_loss(net: Toy, x: Tensor) -> Tensor:
    return hinge_d(net.discriminator(x), net.discriminator(net(x)[0].detach()))


TERMS: dict[str, tuple[Callable[[Toy, Tensor], Tensor], set[str]]] = {
    "l1": (lambda net, x: reconstruction(net(x)[0], x, "l1"), {"encoder", "decoder"}),
    "l2": (lambda net, x: reconstruction(net(x)[0], x, "l2"), {"encoder", "decoder"}),
    "bottleneck": (lambda net, x: net(x)[1], {"encoder"}),
    "perceptual": (lambda net, x: net.perceptual(net(x)[0], x), {"encoder", "decoder"}),
    "adversarial": (adversarial_loss, {"encoder", "decoder"}),
    "discriminator": (discriminator_loss, {"discriminator"}),
}


@pytest.mark.parametrize("bottleneck", ["kl", "vq", "fsq", "none"])
@pytest.mark.parametrize("term", TERMS)
def test_each_term_reaches_its_parameters_and_no_others(term: str, bottleneck: str) -> None:
    compute, expected = TERMS[term]
    net = toy(bottleneck).train()
    loss = compute(net, images())
    assert loss.shape == (4,) and loss.isfinite().all()
    if term == "bottleneck" and bottleneck in ("fsq", "none"):
        assert not loss.requires_grad and not loss.any()
        return
    loss.mean().backward()
    assert net.parts_with_gradient() == expected


def test_no_term_reaches_the_data() -> None:
    net, x = toy(), images().requires_grad_()
    net.perceptual(net(x.detach())[0], x).sum().backward()
    assert x.grad is None


# perceptual


def test_perceptual_against_hand_computed_value() -> None:
    maps = {0: [torch.tensor([[[3.0], [4.0]]])], 1: [torch.tensor([[[-8.0], [6.0]]])]}
    distance = PerceptualLoss(lambda x: maps[int(x)], eps=0.0)
    zero, one = torch.tensor(0), torch.tensor(1)
    torch.testing.assert_close(distance(one, zero), torch.tensor([(-0.8 - 0.6) ** 2 + (0.6 - 0.8) ** 2]))
    weighted = PerceptualLoss(lambda x: maps[int(x)], weights=[torch.tensor([0.5, 2.0])], eps=0.0)
    torch.testing.assert_close(weighted(one, zero), torch.tensor([0.5 * 1.4**2 + 2 * 0.2**2]))


@pytest.mark.parametrize("weighted", [False, True])
def test_perceptual_is_the_distance_of_normalised_maps(weighted: bool) -> None:
    y_hat, y, weight = torch.randn(2, 5, 3, 4, generator=gen()), torch.randn(2, 5, 3, 4), torch.rand(5)
    y_hat.requires_grad_()
    unit = [v / (v.square().sum(1, keepdim=True) + 0.1).sqrt() for v in (y_hat, y)]
    squares = (unit[0] - unit[1]).square() * (weight[:, None, None] if weighted else 1)
    expected = squares.sum(1).mean((1, 2))
    maps = {0: [y], 1: [y_hat]}
    distance = PerceptualLoss(lambda x: maps[int(x)], weights=[weight] if weighted else None, eps=0.1)
    loss = distance(torch.tensor(1), torch.tensor(0))
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(v.sum(), y_hat, retain_graph=True)[0] for v in (loss, expected)]
    torch.testing.assert_close(*grads)


def test_perceptual_is_zero_for_equal_images_and_grows_with_blur() -> None:
    distance, x = PerceptualLoss(toy().perceptual.network.maps), images()
    assert torch.equal(distance(x, x), torch.zeros(4)), "dropout and batch statistics are off"
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
    assert (distance(0.9 * x + 0.1 * blurred, x) < distance(blurred, x)).all()


def test_perceptual_freezes_the_module_of_a_method_permanently() -> None:
    net = Pyramid()
    distance = PerceptualLoss(net.maps).train()
    assert not any(p.requires_grad for p in net.parameters()) and not net.first.training and distance.training
    assert not any(p.requires_grad for p in distance.parameters())
    assert len(list(distance.state_dict())) == len(net.state_dict()), "every tensor is listed once"


def test_perceptual_gradient_is_bounded_where_maps_are_zero() -> None:
    x_hat = torch.zeros(1, 3, 4, 4, requires_grad=True)
    PerceptualLoss(lambda x: [x.relu(), x.mean((2, 3))])(
        x_hat, torch.rand(1, 3, 4, 4, generator=gen())
    ).sum().backward()
    assert x_hat.grad is not None and x_hat.grad.isfinite().all() and x_hat.grad.abs().max() < 1e3


def vgg_file(path: Path, lpips: bool) -> VGG16:
    torch.manual_seed(0)
    net = VGG16()
    state = dict(net.state_dict())
    if lpips:
        widths = (64, 128, 256, 512, 512)
        state |= {f"lin{i}.model.1.weight": torch.full((1, c, 1, 1), 0.5) for i, c in enumerate(widths)}
    save_file(state | {"classifier.0.weight": torch.zeros(2)}, path)
    return net


@pytest.mark.parametrize("lpips", [False, True])
def test_vgg_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lpips: bool) -> None:
    net = vgg_file(tmp_path / "vgg.safetensors", lpips)
    monkeypatch.setenv("SFUMATO_VGG", str(tmp_path / "vgg.safetensors"))
    distance = load_vgg()
    assert distance is not None
    x_hat, x = images(2, 28, 1).requires_grad_(), images(2, 28)
    loss = distance(x_hat, x)
    torch.testing.assert_close(loss, PerceptualLoss(net)(x_hat, x) * (0.5 if lpips else 1.0))
    loss.sum().backward()
    assert x_hat.grad is not None and x_hat.grad.any()
    assert all(p.grad is None for p in distance.parameters())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 40), (4, 20, 33)], ids=str)
def test_vgg_takes_gray_colour_and_alpha(shape: tuple[int, ...]) -> None:
    maps = VGG16()(torch.zeros(1, *shape))
    assert [y.shape[1] for y in maps] == [64, 128, 256, 512, 512] and all(y.min() >= 0 for y in maps)
    assert sum(isinstance(m, nn.Conv2d) for m in VGG16().features) == 13


def test_vgg_weights_missing_or_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFUMATO_VGG", raising=False)
    assert load_vgg() is None
    with pytest.raises(UserError, match="missing"):
        load_vgg(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(UserError, match="text"):
        load_vgg(tmp_path / "text.safetensors")
    save_file({"features.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="VGG-16"):
        load_vgg(tmp_path / "other.safetensors")


# discriminator


@pytest.mark.parametrize("depth", [0, 1, 3, 5])
@pytest.mark.parametrize("size", [(8, 8), (9, 31), (28, 28), (33, 8)], ids=str)
def test_discriminator_takes_any_size_from_8(size: tuple[int, int], depth: int) -> None:
    logits = PatchDiscriminator(3, width=8, depth=depth)(torch.rand(2, 3, *size, generator=gen()))
    assert logits.shape == (2, 1, *(-(-side // 2 ** (depth + 1)) for side in size))
    assert logits.isfinite().all()


def test_discriminator_refuses_tiny_images() -> None:
    with pytest.raises(UserError, match="8 x 8"):
        PatchDiscriminator(1)(torch.zeros(1, 1, 7, 20))


def test_discriminator_keeps_channels_last_and_treats_items_independently() -> None:
    net = PatchDiscriminator(1, width=8, depth=1).to(memory_format=torch.channels_last)
    x = images(6).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x)[:2], net(x[:2]))
    outputs: list[Tensor] = []
    net.convs[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    net(x)
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)


def test_discriminator_learns_to_distinguish_noise_from_blur() -> None:
    torch.manual_seed(0)
    net, gate = PatchDiscriminator(1, width=8, depth=1), AdversarialGate(0, decay=0.5)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(40):
        x = images(16, seed=step)
        real, fake = net(x), net(nn.functional.avg_pool2d(x, 3, 1, 1))
        gate.update(real, fake)
        optimizer.zero_grad()
        hinge_d(real, fake).mean().backward()
        optimizer.step()
    assert gate.accuracy > 0.95


def test_adaptive_weight_balances_a_codec_without_side_effects() -> None:
    net, x = toy(), images()
    for compared in ("last layer", "x_hat"):
        x_hat, _ = net(x)
        rec = reconstruction(x_hat, x).mean()
        with frozen(net.discriminator):
            adv = hinge_g(net.discriminator(x_hat)).mean()
        reference = net.decoder.weight if compared == "last layer" else x_hat
        weight = adaptive_weight(rec, adv, reference, maximum=1e6)
        assert net.parts_with_gradient() == set()
        norms = [torch.autograd.grad(loss, reference, retain_graph=True)[0].norm() for loss in (rec, weight * adv)]
        torch.testing.assert_close(norms[0], norms[1])
