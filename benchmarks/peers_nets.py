"""The peers of `peers.py`, each built and trained by its own library's defaults, which are imported when needed.

Each class documents the source of its choices. Nothing here imports sfumato.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

Weights = dict[str, Tensor]
Shape = tuple[int, int, int]  # (C, H, W)


@dataclass
class Stage:
    """One training stage.

    Args:
        net: The trained network.
        loss: Images (B, C, H, W) in [-1, 1] and labels (B,) -> loss.
        optimizer: Optimizer of its parameters.
        average: Called after every step.
        weights: Averaged weights of this stage, as entries of the peer's state dict.
        batch: Images per micro-batch.
        accumulation: Micro-batches per step, whose gradients are added.
    """

    net: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    average: Callable[[], object]
    weights: Callable[[], Mapping[str, Tensor]]
    batch: int
    accumulation: int = 1


class Peer(nn.Module):
    """A model as its own library builds it, with its stages in the order in which they are trained."""

    labelled = True  # class-conditional
    multiple = 1  # both sides must be multiples of this

    def __init__(self, shape: Shape, classes: int, steps: int):
        super().__init__()
        self.shape, self.classes, self.steps = shape, classes, steps

    def stages(self) -> dict[str, Callable[[], Stage]]:
        """Name -> builder of the stage."""
        raise NotImplementedError

    def sample(self, labels: Tensor) -> Tensor:
        """Samples (N, C, H, W), about in [-1, 1], of classes (N,)."""
        raise NotImplementedError

    def begin(self, weights: Weights, x: Tensor) -> None:
        """Load the first stage's weights before the second stage."""
        self.load_state_dict(weights, strict=False)


@contextmanager
def torchvision_absent() -> Iterator[None]:
    """A stub of torchvision, for libraries that import it without needing it here."""
    stub = ModuleType("torchvision")
    for name in ("transforms", "utils"):
        setattr(stub, name, ModuleType(name))
    sys.modules["torchvision"] = stub
    try:
        yield
    finally:
        del sys.modules["torchvision"]  # accelerate and diffusers look for the real one


class DenoisingDiffusion(Peer):
    """denoising-diffusion-pytorch 2: network, process and Trainer defaults as in its README.

    dim 64, dim_mults (1, 2, 4, 8), no flash attention; v-prediction under a sigmoid schedule; Adam (.9, .99) at 8e-5;
    two micro-batches of 32 images per step; EMA .995 every ten steps; DDIM. Unconditional.
    """

    labelled = False
    multiple = 8

    def __init__(self, shape: Shape, classes: int, steps: int):
        super().__init__(shape, classes, steps)
        with torchvision_absent():
            library = importlib.import_module("denoising_diffusion_pytorch")
        net = library.Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=shape[0])
        sizes = {"image_size": shape[1:], "timesteps": 1000, "sampling_timesteps": steps}
        self.diffusion = library.GaussianDiffusion(net, **sizes, auto_normalize=False)  # images come in [-1, 1]

    def stages(self) -> dict[str, Callable[[], Stage]]:
        return {"denoiser": self._denoiser}

    def _denoiser(self) -> Stage:
        ema = importlib.import_module("ema_pytorch").EMA(self.diffusion, beta=0.995, update_every=10)
        optimizer = torch.optim.Adam(self.diffusion.parameters(), 8e-5, betas=(0.9, 0.99))
        weights = lambda: prefixed("diffusion", ema.ema_model.state_dict())
        return Stage(self.diffusion, lambda x, y: self.diffusion(x), optimizer, ema.update, weights, 32, 2)

    def sample(self, labels: Tensor) -> Tensor:
        return self.diffusion.sample(batch_size=len(labels))


class Diffusers(Peer):
    """diffusers' UNet2DModel, class-conditional by `num_class_embeds`, trained as its unconditional example is.

    Noise prediction under DDPMScheduler's 1,000 steps; AdamW (.95, .999) at 1e-4 without the example's warm-up and
    decay, weight decay 1e-6; EMAModel, warming up to .9999 (power 3/4); DDIMScheduler. Here on pixels, 16 images per
    step: the example's network without its first level, so that each resolution from 32 down has the example's blocks.
    """

    multiple = 16
    widths: tuple[int, ...] = (128, 256, 256, 512, 512)
    attention: tuple[int, ...] = (3,)  # levels
    betas: Any = "linear"
    batch, rate = 16, 1e-4

    def __init__(self, shape: Shape, classes: int, steps: int):
        from diffusers import DDPMScheduler

        super().__init__(shape, classes, steps)
        self.unet = self._unet(shape)
        self.schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule=self.betas)

    def _unet(self, shape: Shape) -> nn.Module:
        from diffusers import UNet2DModel

        kinds = ["Attn" if level in self.attention else "" for level in range(len(self.widths))]
        return UNet2DModel(
            sample_size=shape[1:],
            in_channels=shape[0],
            out_channels=shape[0],
            layers_per_block=2,
            block_out_channels=self.widths,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            num_class_embeds=self.classes,
        )

    def stages(self) -> dict[str, Callable[[], Stage]]:
        return {"denoiser": self._denoiser}

    def _denoiser(self) -> Stage:
        from diffusers.training_utils import EMAModel

        names = [name for name, _ in self.unet.named_parameters()]
        ema = EMAModel(self.unet.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75, foreach=True)
        optimizer = torch.optim.AdamW(self.unet.parameters(), self.rate, betas=(0.95, 0.999), weight_decay=1e-6)
        average = lambda: ema.step(self.unet.parameters())
        weights = lambda: prefixed("unet", dict(zip(names, ema.shadow_params, strict=True)))
        return Stage(self.unet, self.loss, optimizer, average, weights, self.batch)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of the predicted noise of images or latents."""
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        noised: Any = self.schedule.add_noise(x, noise, t)  # pyright: ignore[reportArgumentType]
        return mse_loss(self.unet(noised, t, class_labels=y, return_dict=False)[0], noise)

    def denoised(self, z: Tensor, labels: Tensor, clip: bool) -> Tensor:
        """The library's DDIM sampling from noise z."""
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler.from_config(self.schedule.config, clip_sample=clip)
        scheduler.set_timesteps(self.steps)
        for t in scheduler.timesteps:
            noise = self.unet(z, t, class_labels=labels, return_dict=False)[0]
            z = scheduler.step(noise.float(), t, z).prev_sample
        return z

    def sample(self, labels: Tensor) -> Tensor:
        return self.denoised(torch.randn(len(labels), *self.shape), labels, clip=True)


class DiffusersSmall(Diffusers):
    """The network that Hugging Face's diffusion course trains on MNIST: 128 images per step at 1e-3, cosine schedule.

    Optimizer and EMA are the example's; the course has plain Adam and no EMA, and the class as channels.
    """

    multiple = 4
    widths = (32, 64, 64)
    attention = (1, 2)
    betas = "squaredcos_cap_v2"
    batch, rate = 128, 1e-3


class DiffusersLatent(Diffusers):
    """diffusers' AutoencoderKL, then its UNet2DModel on the latents; half of the time each.

    The library has no recipe from scratch. The codec is Stable Diffusion's at half the width and with two downsamplings
    (widths 64, 128, 256; 4 channels; 32x32 to 8x8), trained as in latent diffusion without the perceptual and
    adversarial terms: sum of |x - x'| plus 1e-6 KL, Adam (.5, .9) at 4.5e-6 times the batch of 64; latents are scaled
    by the standard deviation of one batch. The denoiser (widths 128, 256, 512) trains as the example does, on 64 images
    per step, which are encoded on the fly.
    """

    widths = (128, 256, 512)
    attention = (1, 2)
    batch = 64

    def __init__(self, shape: Shape, classes: int, steps: int):
        from diffusers import AutoencoderKL

        super().__init__((4, shape[1] // 4, shape[2] // 4), classes, steps)
        self.vae: Any = AutoencoderKL(
            in_channels=shape[0],
            out_channels=shape[0],
            down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
            block_out_channels=(64, 128, 256),  # pyright: ignore[reportArgumentType]
            layers_per_block=2,
            latent_channels=4,
        )
        self.scale = nn.Buffer(torch.ones(()))

    def stages(self) -> dict[str, Callable[[], Stage]]:
        return {"codec": self._codec, "denoiser": self._latent_denoiser}

    def _codec(self) -> Stage:
        optimizer = torch.optim.Adam(self.vae.parameters(), 4.5e-6 * self.batch, betas=(0.5, 0.9))
        weights = lambda: prefixed("vae", self.vae.state_dict())
        return Stage(self.vae, self._codec_loss, optimizer, lambda: None, weights, self.batch)

    def _codec_loss(self, x: Tensor, y: Tensor) -> Tensor:
        posterior = self.vae.encode(x).latent_dist
        x_hat = self.vae.decode(posterior.sample()).sample
        return l1_loss(x_hat, x, reduction="sum") / len(x) + 1e-6 * posterior.kl().mean()

    def _latent_denoiser(self) -> Stage:
        stage = self._denoiser()
        weights = stage.weights
        stage.weights = lambda: {**weights(), "scale": self.scale}
        stage.loss = lambda x, y: self.loss(self._latents(x), y)
        return stage

    @torch.no_grad()
    def _latents(self, x: Tensor) -> Tensor:
        return self.vae.encode(x).latent_dist.sample().float() * self.scale

    def begin(self, weights: Weights, x: Tensor) -> None:
        super().begin(weights, x)
        self.scale.copy_(1 / self._latents(x).std())

    def sample(self, labels: Tensor) -> Tensor:
        z = self.denoised(torch.randn(len(labels), *self.shape), labels, clip=False)
        return self.vae.decode(z / self.scale).sample


PEERS: dict[str, type[Peer]] = {
    "ddpm-pytorch": DenoisingDiffusion,
    "diffusers-pixel": Diffusers,
    "diffusers-small": DiffusersSmall,
    "diffusers-latent": DiffusersLatent,
}


def prefixed(name: str, weights: Mapping[str, Tensor]) -> Weights:
    """A state dict with `name.` before each key."""
    return {f"{name}.{key}": value for key, value in weights.items()}
