"""A model: codec, conditioner and denoiser, built from one folder's JSON and safetensors."""

# torch's and safetensors' own annotations are incomplete:
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.codecs import Codec
from sfumato.conditioners import Conditioner, make_conditioner
from sfumato.core import (
    SAMPLERS,
    BoundDenoiser,
    ConsistencyStep,
    Denoise,
    Denoiser,
    Noise,
    Step,
    TrajectoryDenoiser,
    autoguidance,
    cfg,
    initial_noise,
    interval,
    make_prediction,
    make_schedule,
    steps,
    time_grid,
)
from sfumato.core.rng import item_generator
from sfumato.core.sampler import NoiseFn, SamplingStep
from sfumato.errors import UserError
from sfumato.hardware import default_device, has_bf16
from sfumato.modalities import find_modality
from sfumato.modalities.base import Modality
from sfumato.nn import make_net
from sfumato.registry import choose
from sfumato.sampling import JUMP, Sampling, choose_sampling
from sfumato.storage import (
    CONFIGURED_PARTS,
    ModelConfig,
    load_part,
    read_config,
    save_part,
    write_config,
    write_tensors,
)
from sfumato.types import Items, Latent, Raw, batch_limit

CODEC_BATCH = 256  # items per call of the codec; fewer where items are large


class ConditionalDenoiser(nn.Module):
    """A denoiser and the conditioner it was trained with.

    Args:
        denoiser: The denoiser.
        conditioner: Raw conditions -> condition of its network.
    """

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner

    def bind(self, raw: Raw, count: int, mask: Tensor | None = None) -> BoundDenoiser:
        """The denoiser of `count` items with these conditions and the mask (B, N) of their tokens."""
        return self.denoiser.bind(self.conditioner(raw, count), mask)


class Model:
    """Codec, conditioner and denoiser: encodes, decodes and samples. Every task is a method of it.

    Args:
        config: Configuration of the parts. Weights are random until loaded or trained.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.modality: Modality[Any] = find_modality(config.modality)
        self.codec: Codec = self.modality.codec_class(**config.codec)
        self.main = self._conditional_denoiser()
        self.guide = None if config.guide is None else self._conditional_denoiser()
        self.device = torch.device("cpu")
        self.folder: Path | None = None  # the folder it was loaded from or trained in

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser."""
        return self.main.denoiser

    @property
    def conditioner(self) -> Conditioner:
        """The conditioner of the denoiser."""
        return self.main.conditioner

    def _conditional_denoiser(self) -> ConditionalDenoiser:
        """A new conditioner and denoiser, as configured."""
        conditioner, config, codec = make_conditioner(self.config.conditioner), self.config.denoiser, self.codec
        options = {key: value for key, value in config["net"].items() if key != "name"}
        options |= {"cond_dim": conditioner.dim, "token_dim": conditioner.token_dim, "channels_last": codec.tokens}
        options |= {"segments": codec.segments} if config["net"]["name"] == "mlp" else {}
        net = make_net(config["net"]["name"], latent_shape=codec.latent_shape, **options)
        prediction = make_prediction(config["predict"], codec.categorical_layout())
        denoiser_class = Denoiser if self.config.distilled is None else TrajectoryDenoiser
        denoiser = denoiser_class(net, make_schedule(**config["schedule"]), prediction, codec.segments)
        return ConditionalDenoiser(denoiser, conditioner)

    def add_guide(self, weights: dict[str, Tensor], step: int) -> None:
        """Add a guide: the averaged weights of denoiser and conditioner after training step `step`."""
        self.config.guide, self.guide = step, self._conditional_denoiser().to(self.device)
        self.guide.load_state_dict({**self.main.state_dict(), **weights})  # buffers are the model's

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks, by the names of their folders."""
        guide = {} if self.guide is None else {"guide": self.guide}
        return {"codec": self.codec, "conditioner": self.conditioner, "denoiser": self.denoiser.net, **guide}

    @property
    def sampling(self) -> Sampling:
        """The sampling defaults chosen by `fit`."""
        return Sampling(**{key: value for key, value in self.config.sample.items() if value is not None})

    def choose_sampling(
        self,
        steps: int | None,
        guidance: float | None,
        sampler: str | None,
        autoguidance: float | None = 1.0,
    ) -> Sampling:
        """The sampling defaults, overridden by the arguments that are not None, validated.

        Autoguidance is off by default, so that edited items stay as likely as they were. For new items, pass None to
        use the default chosen by `fit`.
        """
        return choose_sampling(
            self.sampling,
            self.config.distilled,
            self.guide is not None,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            autoguidance=autoguidance,
        )

    def to(self, device: str | torch.device) -> "Model":
        """Move the model to a device, in place."""
        self.device = torch.device(device)
        for part in self.parts.values():
            part.to(self.device)
        for part in (self.main, *([] if self.guide is None else [self.guide])):  # with the codec's statistics there
            part.denoiser.prediction = make_prediction(self.config.denoiser["predict"], self.codec.categorical_layout())
        return self

    def eval(self) -> "Model":
        """Evaluation mode, with all parameters frozen."""
        for part in self.parts.values():
            part.eval().requires_grad_(False)
        return self

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast context of sampling: bfloat16 where `fit` chose it and the device supports it natively."""
        if self.sampling.precision == "bf16" and has_bf16(str(self.device)):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @torch.no_grad()
    def encode(self, items: Items | Tensor) -> Latent:
        """Encode items to latents (N, *latent_shape), on the CPU."""
        items, size = items if isinstance(items, Items) else Items(items), batch_limit(self.config.shape, CODEC_BATCH)
        parts = list[Latent]()
        for first in range(0, len(items), size):
            x, mask = items[first : first + size].pad()
            latent = self.codec.encode(x.to(self.device), None if mask is None else mask.to(self.device))
            parts.append(latent.to("cpu"))
        return Latent.concat(parts)

    @torch.no_grad()
    def decode(self, latent: Latent) -> Items:
        """Decode latents (N, *latent_shape) to items, on the CPU."""
        parts, size = list[Items](), batch_limit(self.config.shape, CODEC_BATCH)
        for first in range(0, len(latent), size):
            part = latent[first : first + size].to(self.device)
            mask = self.codec.data_mask(part.mask)
            with self.autocast():
                x = self.codec.decode(part).cpu()
            parts.append(Items.unpad(x, mask))
        return Items.concat(parts)

    def autoencode(self, items: Items | Tensor) -> Items:
        """Encode and decode items: their reconstructions."""
        return self.decode(self.encode(items))

    def sample(
        self,
        items: Sequence[int],
        raw: Raw | None = None,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        given: tuple[Latent, Sequence[int]] | None = None,
    ) -> Latent:
        """Sample latents (B, *latent_shape) of new items: the last of `steps`, which has the arguments."""
        mask = self.draw_mask(items, seed) if given is None else given[0].mask
        *_, last = self.steps(items, raw, seed=seed, sampling=sampling, mask=mask, given=given)
        z = last.z if mask is None else torch.where(mask.to(last.z.device)[..., None], last.z, 0)
        return Latent(z, mask if mask is None else mask.to(z.device))

    @torch.no_grad()
    def steps(
        self,
        items: Sequence[int],
        raw: Raw | None = None,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        mask: Tensor | None = None,
        given: tuple[Latent, Sequence[int]] | None = None,
    ) -> Iterator[SamplingStep]:
        """Sample latents of new items, step by step.

        Args:
            items: Item numbers (B,); item i gets the same noise whatever the batch, the device or the processes.
            raw: Their conditions; None for the null condition.
            seed: Seed of the noise.
            sampling: Sampler, steps and guidance (default: those chosen by `fit`).
            mask: (B, N), the tokens that items have; None if all have all of them.
            given: Latents of items of several segments, and the numbers of the segments that are given, not sampled.
        """
        raw, sampling, schedule = Raw() if raw is None else raw, sampling or self.sampling, self.denoiser.schedule
        noise = self.noise(items, seed, mask=mask)
        grid = time_grid(schedule, sampling.steps, sampling.grid)
        if given is not None:
            grid = self.denoiser.segments.grid(grid, given[1])
        levels = [self.denoiser.segments.spread(level) for level in schedule.levels(grid)]
        z = initial_noise(levels[0], noise)
        if given is not None:
            fixed = self.denoiser.segments.positions(given[1]).to(z.device)
            z = torch.where(fixed[:, None], given[0].z.to(z), z)
        mask = mask if mask is None else mask.to(self.device)
        denoise = self.denoise(raw, len(items), sampling, mask)
        iterator = steps(denoise, levels, z, self.step_rule(raw, len(items), sampling, mask), noise)
        while True:
            with self.autocast():
                step = next(iterator, None)
            if step is None:
                return
            yield step

    def draw_mask(self, items: Sequence[int], seed: int) -> Tensor | None:
        """The tokens (B, N) of new items, as many as training items have; None if all have all of them."""
        if not self.codec.tokens:
            return None
        observed = self.codec.lengths.cpu()
        draws = torch.stack([torch.rand((), generator=item_generator(seed, item, "length")) for item in items])
        return self.codec.length_mask(observed[(draws * len(observed)).long()])

    def noise(self, items: Sequence[int], seed: int = 0, stream: str = "noise", mask: Tensor | None = None) -> NoiseFn:
        """The noise source of items: each call draws new noise (B, *latent_shape) on the model's device.

        Args:
            items: Item numbers (B,).
            seed: Seed of the noise.
            stream: Name of the random stream; "noise" is the one of new items, others are independent of it.
            mask: (B, N), the tokens that items have.
        """
        shape = self.codec.latent_shape if mask is None else (mask.shape[1], *self.codec.latent_shape[1:])
        noise = Noise(seed, items, shape, stream, mask)
        return lambda: noise().to(self.device)

    def denoise(self, raw: Raw, count: int, sampling: Sampling | None = None, mask: Tensor | None = None) -> Denoise:
        """The denoiser (z, level) -> ẑ of a batch, with its conditions and guidance bound.

        Args:
            raw: The conditions of the batch; empty for the null condition.
            count: Batch size B.
            sampling: Its guidance, interval and autoguidance apply (default: those chosen by `fit`).
            mask: (B, N), the tokens that items have.
        """
        sampling = sampling or self.sampling
        conditional = self._autoguided(raw, count, sampling.autoguidance, mask)
        if sampling.guidance == 1 or not raw.values:
            return conditional
        weight = interval(sampling.guidance, *sampling.interval) if sampling.interval else sampling.guidance
        return cfg(conditional, self._autoguided(Raw(), count, sampling.autoguidance, mask), weight)

    def _autoguided(self, raw: Raw, count: int, weight: float, mask: Tensor | None) -> Denoise:
        """The denoiser with its conditions bound, with autoguidance and without classifier-free guidance."""
        bound = self.main.bind(raw, count, mask)
        if self.guide is None or weight == 1:
            return bound
        return autoguidance(bound, self.guide.bind(raw, count, mask), weight)

    def step_rule(self, raw: Raw, count: int, sampling: Sampling | None = None, mask: Tensor | None = None) -> Step:
        """The step rule of a sampler for a batch; that of a few-step model has the conditions bound.

        Args:
            raw: The conditions of the batch.
            count: Batch size B.
            sampling: Its sampler applies (default: the one chosen by `fit`).
            mask: (B, N), the tokens that items have.
        """
        name = (sampling or self.sampling).sampler
        if name != JUMP or not isinstance(self.denoiser, TrajectoryDenoiser):
            return SAMPLERS.get(name) or choose(SAMPLERS, "sampler", name)
        return self.consistency_step(raw, count, mask)

    def consistency_step(self, raw: Raw, count: int, mask: Tensor | None = None) -> ConsistencyStep:
        """The consistency step of a few-step model for a batch of `count` items with these conditions."""
        denoiser, cond = self.denoiser, self.conditioner(raw, count)
        assert isinstance(denoiser, TrajectoryDenoiser)
        end = denoiser.schedule(0.0)
        return ConsistencyStep(lambda z, level: denoiser(z, level, cond, mask, end))

    def save(self, folder: str | Path) -> None:
        """Write `model.json`, and `config.json` and `model.safetensors` of each part."""
        folder = Path(folder)
        for name in CONFIGURED_PARTS:
            save_part(folder / name, self.parts[name], getattr(self.config, name))
        if self.guide is not None:
            (folder / "guide").mkdir(exist_ok=True)
            write_tensors(folder / "guide" / "model.safetensors", self.guide.state_dict())
        write_config(folder, self.config, self.codec.latent_shape)

    def generate(self, n: int = 64, **settings: Any) -> Any:
        """Generate new items; see `sfumato.generate`."""
        return self._task("generate", n=n, **settings)

    def interpolate(self, a: Any, b: Any, **settings: Any) -> Any:
        """Interpolate between two items; see `sfumato.interpolate`."""
        return self._task("interpolate", a, b, **settings)

    def reconstruct(self, source: Any, **settings: Any) -> Any:
        """Encode and decode items; see `sfumato.reconstruct`."""
        return self._task("reconstruct", source, **settings)

    def edit(self, source: Any, **settings: Any) -> Any:
        """Edit items, for instance under a new label; see `sfumato.edit`."""
        return self._task("edit", source, **settings)

    def inpaint(self, source: Any, **settings: Any) -> Any:
        """Inpaint masked parts of items; see `sfumato.inpaint`."""
        return self._task("inpaint", source, **settings)

    def outpaint(self, source: Any, **settings: Any) -> Any:
        """Extend images beyond their borders; see `sfumato.outpaint`."""
        return self._task("outpaint", source, **settings)

    def transfer(self, source: Any, label: str, **settings: Any) -> Any:
        """Transfer items to another class; see `sfumato.transfer`."""
        return self._task("transfer", source, label=label, **settings)

    def augment(self, source: Any, **settings: Any) -> Any:
        """Enlarge and balance a labelled data set; see `sfumato.augment`."""
        return self._task("augment", source, **settings)

    def evaluate(self, source: Any, **settings: Any) -> Any:
        """Evaluate the model; see `sfumato.evaluate`."""
        return self._task("evaluate", source, **settings)

    def _task(self, name: str, *args: Any, **settings: Any) -> Any:
        import sfumato

        return getattr(sfumato, name)(self, *args, **settings)


def load(folder: str | Path, device: str | None = None) -> Model:
    """Load the model in a folder.

    Args:
        folder: A run folder of `fit` or `distill`.
        device: Where to compute (default: the best available device).

    Raises:
        UserError: There is no model, its files are damaged, or another version of sfumato wrote it.
    """
    folder = Path(folder)
    config, rename = read_config(folder)
    try:
        model = Model(config)
    except (KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(f"{folder}: its JSON files do not describe a model ({error!r})", code=1) from None
    for name, module in model.parts.items():
        load_part(folder / name, module, rename)
    model.folder = folder
    return model.eval().to(device or default_device())
