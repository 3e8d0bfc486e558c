"""Training steps: which parameters the gradient of each loss term reaches."""

import pytest
import torch
from torch import nn

from sfumato.conditioners import make_conditioner
from sfumato.core import Denoiser, Objective, make_schedule
from sfumato.modalities.image.classifier import Classifier
from sfumato.modalities.image.codec import ImageCodec
from sfumato.modalities.image.losses import PatchDiscriminator, PerceptualLoss
from sfumato.model import ConditionalDenoiser
from sfumato.nn import make_net
from sfumato.training.budget import StepBudget
from sfumato.training.optim import hidden_matrices
from sfumato.training.steps import CodecStep, DiffusionStep
from sfumato.training.trainer import trained_state
from sfumato.types import Batch, Raw
from tests.training.common import images, names_reached, stirred

SHAPE = (2, 16, 16)


def codec_step(bottleneck: str = "kl", **options: float) -> CodecStep:
    """A codec step with every loss term; the adversarial one starts at step 10."""
    torch.manual_seed(0)
    codec = stirred(ImageCodec(SHAPE, bottleneck=bottleneck, downsample=4, channels=4, width=16, codebook_size=8))
    perceptual = PerceptualLoss(Classifier(SHAPE, 2, 8).pyramid)
    options = {"adversarial_weight": 0.5, "adversarial_start": 10, "discriminator_lead": 2} | options
    discriminator = PatchDiscriminator(2) if options["adversarial_weight"] else None
    return CodecStep(codec, perceptual, discriminator, **options).train()


def modules(step: CodecStep) -> dict[str, nn.Module]:
    """The parts of the step by name, frozen ones included."""
    parts = {"encoder": step.codec.encoder, "decoder": step.codec.decoder, "bottleneck": step.codec.bottleneck}
    return parts | {"perceptual": step.perceptual, "discriminator": step.discriminator}


def batch() -> Batch:
    return Batch(images(8, SHAPE), torch.arange(8))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("bottleneck", ["kl", "vq", "fsq", "none"])
@pytest.mark.parametrize(
    ("term", "reached"),
    [("rec", {"encoder", "decoder"}), ("perceptual", {"encoder", "decoder"}), ("adversarial", {"encoder", "decoder"})],
)
def test_terms_on_the_image_reach_encoder_and_decoder(term: str, reached: set[str], bottleneck: str):
    step = codec_step(bottleneck)
    losses = step(batch(), "codec", 12, generator())
    assert names_reached(losses[term], modules(step)) == reached


@pytest.mark.parametrize(
    ("bottleneck", "reached"), [("kl", {"encoder"}), ("vq", {"encoder"}), ("fsq", set()), ("none", set())]
)
def test_the_bottleneck_reaches_the_encoder_only(bottleneck: str, reached: set[str]):
    step = codec_step(bottleneck)
    term = step(batch(), "codec", 0, generator())["bottleneck"]
    if reached:
        assert names_reached(term, modules(step)) == reached
    else:
        assert not term.requires_grad or names_reached(term, modules(step)) == set()
        assert float(term) == 0


@pytest.mark.parametrize("at", [0, 9, 10, 15])
def test_the_codec_phase_trains_the_codec_only(at: int):
    step = codec_step()
    losses = step(batch(), "codec", at, generator())
    losses["loss"].backward()
    assert all(p.grad is None for name in ("perceptual", "discriminator") for p in modules(step)[name].parameters())
    assert all(p.grad is not None for p in step.codec.parameters())
    assert ("adversarial" in losses) == (at >= 10)
    assert all(p.requires_grad for p in step.discriminator.parameters())  # for its own phase


def test_the_discriminator_phase_trains_the_discriminator_only():
    step = codec_step()
    step(batch(), "codec", 12, generator())
    step(batch(), "discriminator", 12, generator())["loss"].backward()
    assert all(p.grad is not None for p in step.discriminator.parameters())
    assert all(
        p.grad is None for name in ("encoder", "decoder", "perceptual") for p in modules(step)[name].parameters()
    )


def test_phases_hold_each_parameter_once():
    step = codec_step()
    codec, discriminator = step.phases()
    assert {id(p) for p in codec.parameters} == {id(p) for p in step.codec.parameters()}
    assert {id(p) for p in discriminator.parameters} == {id(p) for p in step.discriminator.parameters()}
    assert (codec.start, discriminator.start) == (0, 8)
    assert step.ema_module is step.codec
    assert [phase.name for phase in codec_step(adversarial_weight=0).phases()] == ["codec"]


def test_terms_start_late():
    assert codec_step(perceptual_start=7, adversarial_start=5, discriminator_lead=2).cost_breakpoints == [0, 3, 5, 7]
    assert codec_step(adversarial_weight=0).cost_breakpoints == [0]
    step = codec_step(perceptual_start=7, adversarial_weight=0)
    before, after = (step(batch(), "codec", k, generator()) for k in (6, 7))
    assert "perceptual" not in before and after["perceptual"] > 0
    torch.testing.assert_close(before["loss"] + step.perceptual_weight * after["perceptual"], after["loss"])


def test_with_fewer_steps_a_late_term_starts_earlier_and_never_stops():
    step = codec_step(perceptual_start=70, adversarial_weight=0)
    active = lambda at: "perceptual" in step(batch(), "codec", at, generator())
    step.step_budget = StepBudget(
        100, amendments=[(25, 120), (40, 50), (60, 90)]
    )  # planned, then more, half, and more again
    assert [active(at) for at in (25, 34, 39, 40, 59, 60, 89)] == [False] * 3 + [True] * 4
    step.step_budget = StepBudget(100, amendments=[(25, 120)])
    assert [active(at) for at in (69, 70)] == [False, True]


@pytest.mark.parametrize(("weight", "term"), [("perceptual_weight", "perceptual"), ("bottleneck_weight", "bottleneck")])
def test_the_loss_is_the_weighted_sum_of_its_terms(weight: str, term: str):
    single, triple = (codec_step(**{weight: w})(batch(), "codec", 0, generator()) for w in (1.0, 3.0))
    assert float((triple["loss"] - single["loss"]).detach()) == pytest.approx(
        2 * float(single[term].detach()), rel=1e-4
    )


def test_the_adversarial_gradient_is_balanced_against_the_others():
    """At the reconstruction its norm is that of the others, times its weight and the gate's ramp."""
    step = codec_step(adversarial_start=0, discriminator_lead=1)
    x, outputs = batch().data, []
    decode = step.codec.decoder.forward
    step.codec.decoder.forward = lambda h: outputs.append(decode(h)) or outputs[-1]
    losses = step(Batch(x, torch.arange(8)), "codec", 5, generator())
    others = losses["rec"] + 0.5 * losses["perceptual"] + 1e-2 * losses["bottleneck"]
    parts = [torch.autograd.grad(loss, outputs[0], retain_graph=True)[0] for loss in (losses["loss"], others)]
    assert float((parts[0] - parts[1]).norm() / parts[1].norm()) == pytest.approx(0.5, rel=1e-3)


def test_the_discriminator_sees_reconstructions_without_gradient():
    """They are the reconstructions of the codec phase."""
    step = codec_step()
    step(batch(), "codec", 12, generator())
    assert step._x_hat is not None and not step._x_hat.requires_grad


def test_frozen_modules_are_not_saved():
    step = codec_step()
    names = set(trained_state(step))
    assert not any(name.startswith("perceptual") for name in names)
    assert {name for name in step.state_dict() if name.startswith(("codec.", "discriminator.", "gate."))} == names


def diffusion_step(classes: int = 3, **objective: str) -> DiffusionStep:
    torch.manual_seed(0)
    label = {"kind": "label", "names": list(map(str, range(classes))), "dim": 8}
    conditioner = make_conditioner({"label": label} if classes else {})
    net = make_net("mlp", latent_shape=(4, 2, 2), cond_dim=conditioner.dim, width=32, depth=1)
    denoiser = Denoiser(stirred(net), make_schedule("flow"), "flow")
    return DiffusionStep(ConditionalDenoiser(denoiser, conditioner), Objective(**objective))


def latents(classes: int = 3) -> Batch:
    z = torch.randn(16, 4, 2, 2, generator=generator())
    return Batch(z, torch.arange(16), Raw({"label": torch.arange(16) % classes}) if classes else Raw())


def test_the_diffusion_loss_reaches_denoiser_and_conditioner():
    step = diffusion_step()
    loss = step(latents(), "denoiser", 0, generator())["loss"]
    assert names_reached(loss, {"net": step.model.denoiser.net, "conditioner": step.model.conditioner}) == {
        "net",
        "conditioner",
    }
    loss.backward()
    assert all(p.grad is not None for p in step.parameters())
    (phase,) = step.phases()
    assert {id(p) for p in phase.parameters} == {id(p) for p in step.parameters()}


def test_diffusion_without_classes():
    step = diffusion_step(classes=0)
    step(latents(classes=0), "denoiser", 0, generator())["loss"].backward()
    assert len(list(step.model.conditioner.parameters())) == 0
    assert all(p.grad is not None for p in step.model.denoiser.parameters())


def test_a_learned_weight_is_trained_and_not_averaged():
    step = diffusion_step(weight="learned")
    (phase,) = step.phases()
    averaged = {id(p) for p in step.ema_module.parameters()}
    assert len(averaged) < len(phase.parameters)
    assert {id(p) for p in phase.parameters} - averaged == {id(p) for p in step.objective.parameters()}
    assert any(name.startswith("objective.") for name in trained_state(step))


def test_adaptive_time_sampling_is_saved_and_updated():
    step = diffusion_step(times="adaptive")
    before = {k: v.clone() for k, v in trained_state(step).items() if k.startswith("objective.")}
    step(latents(), "denoiser", 0, generator())
    after = trained_state(step)
    assert before and any(not torch.equal(value, after[name]) for name, value in before.items())


def test_a_step_depends_on_its_generator_alone():
    step = diffusion_step()
    torch.manual_seed(1)
    loss = step(latents(), "denoiser", 0, generator())["loss"]
    torch.manual_seed(2)
    assert torch.equal(step(latents(), "denoiser", 0, generator())["loss"], loss)
    assert not torch.equal(step(latents(), "denoiser", 0, torch.Generator().manual_seed(1))["loss"], loss)


def test_muon_gets_hidden_matrices():
    net = make_net("mlp", latent_shape=(4, 2, 2), cond_dim=0, width=32, depth=1)
    hidden = list(hidden_matrices(list(net.parameters())))
    assert hidden and all(p.ndim == 2 and min(p.shape) >= 32 for p in hidden)
    assert {id(block.up.weight) for block in net.blocks} <= {id(p) for p in hidden}
