"""The feature network of images: features for the codec's perceptual loss, logits for pseudo-labels."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sfumato.config import CodecSettings
from sfumato.errors import UserError
from sfumato.modalities.base import FeatureLearner, FeatureNetwork
from sfumato.modalities.image.classifier import MIN_SIDE, Classifier, new_classifier
from sfumato.modalities.image.dataset import ImageDataset
from sfumato.modalities.image.label_propagation import comparison_seconds
from sfumato.modalities.image.losses import PatchDiscriminator, PerceptualLoss, load_vgg
from sfumato.modalities.image.semi_supervised import (
    MAX_UNLABELLED,
    PSEUDO_LABEL_ROUNDS,
    fit_semi_supervised,
    unlabelled_per_epoch,
)

FEATURE_WIDTH = 16  # channels of the stem


class ImageFeatures(FeatureLearner[ImageDataset]):
    """Trains the feature network; VGG-16 replaces it in the perceptual loss if its weights are available."""

    max_unlabelled = MAX_UNLABELLED

    def supports_features(self, shape: tuple[int, ...]) -> bool:
        return min(shape[1:]) >= MIN_SIDE

    def uses_features(self, codec: CodecSettings) -> bool:
        needed = codec.perceptual == "features" or (codec.perceptual == "auto" and load_vgg() is None)
        return bool(codec.perceptual_weight) and needed

    def check_features(self, codec: CodecSettings, shape: tuple[int, ...]) -> None:
        if not self.supports_features(shape):
            raise UserError(
                f"codec.perceptual={codec.perceptual} needs images of {MIN_SIDE} pixels or more; set it to none"
            )

    def build_features(self, shape: tuple[int, ...], classes: int, seed: int, device: torch.device) -> FeatureNetwork:
        return new_classifier(shape, max(2, classes), FEATURE_WIDTH, seed, device).eval().requires_grad_(False)

    def fit_features(
        self,
        data: ImageDataset,
        classes: int,
        *,
        steps: int,
        seed: int,
        device: str,
        bf16: bool,
        max_unlabelled: int | None = None,
    ) -> FeatureNetwork:
        return fit_semi_supervised(
            data,
            classes,
            steps=steps,
            width=FEATURE_WIDTH,
            seed=seed,
            device=device,
            bf16=bf16,
            max_unlabelled=max_unlabelled,
        )

    def restore_features(self, shape: tuple[int, ...], state: Mapping[str, Tensor], device: str) -> FeatureNetwork:
        channels, height, width = shape
        with torch.random.fork_rng(devices=[]):  # the same random state, whether trained or loaded
            network = Classifier((channels, height, width), state["head.weight"].shape[0], FEATURE_WIDTH)
        network.load_state_dict(dict(state))
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return network.to(device).eval().requires_grad_(False)

    def perceptual_loss(self, codec: CodecSettings, network: FeatureNetwork | None) -> nn.Module | None:
        """LPIPS or VGG features if the weights are available, else features of the network, or none."""
        if isinstance(network, Classifier) and self.uses_features(codec):
            return PerceptualLoss(network.folded().pyramid)
        if not codec.perceptual_weight or codec.perceptual == "none":
            return None
        weights = load_vgg()
        if weights is None and codec.perceptual == "lpips":
            raise UserError("codec.perceptual=lpips needs the weights of VGG: set $SFUMATO_VGG to their file")
        return weights

    def discriminator(self, shape: tuple[int, ...]) -> nn.Module:
        return PatchDiscriminator(shape[0])

    def unlabelled_seen(self, steps: int) -> int:
        return unlabelled_per_epoch(steps)

    def comparison_seconds(self, count: int) -> float:
        return PSEUDO_LABEL_ROUNDS * comparison_seconds(count)
