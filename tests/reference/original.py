"""PyTorch reference of the original's three networks, for parity tests only.

The networks were written from their description. State-dict names of `Classifier` are those of
the published checkpoint (`image_features.0.weight` … `classifier.3.bias`). The other two use
the block names of the description: `image_block1.0.weight` …
`attention1.attention_conv.0.weight` … `classifier.3.bias`, and `features.0.weight` …
`classifier.5.bias`.
"""

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128)


def stage(inputs: int, outputs: int, activation: type[nn.Module]) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        activation(),
        nn.MaxPool2d(2),
    ]


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attention_conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(),
            nn.Conv2d(width, 1, 1),
            nn.Sigmoid(),
        )

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return image * self.attention_conv(mask)


class Classifier(nn.Module):
    def __init__(self, classes: int, channels: int = 1, dropout: float = 0.3):
        super().__init__()

        def branch(inputs: int) -> nn.Sequential:
            pairs = zip((inputs, *WIDTHS[:-1]), WIDTHS, strict=True)
            return nn.Sequential(*(layer for i, o in pairs for layer in stage(i, o, nn.LeakyReLU)))

        self.image_features, self.mask_features = branch(channels), branch(1)
        self.attention = Attention(128)
        self.classifier = nn.Sequential(
            nn.Linear(256, 128), nn.LeakyReLU(), nn.Dropout(dropout), nn.Linear(128, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        mask, image = self.mask_features(x[:, :1]), self.image_features(x[:, 1:])
        image = self.attention(image, mask)
        return self.classifier(torch.cat([image.mean((2, 3)), mask.mean((2, 3))], 1))


class ClassifierV2(nn.Module):
    def __init__(self, classes: int, channels: int = 1, dropout: float = 0.3):
        super().__init__()
        for branch, inputs in (("image", channels), ("mask", 1)):
            for number, (i, o) in enumerate(
                zip((inputs, *WIDTHS[:-1]), WIDTHS, strict=True), start=1
            ):
                setattr(self, f"{branch}_block{number}", nn.Sequential(*stage(i, o, nn.ReLU)))
        self.attention1, self.attention2, self.attention3 = (Attention(width) for width in WIDTHS)
        self.classifier = nn.Sequential(
            nn.Linear(256, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        mask1 = self.mask_block1(x[:, :1])
        image1 = self.attention1(self.image_block1(x[:, 1:]), mask1)
        mask2 = self.mask_block2(mask1)
        image2 = self.attention2(self.image_block2(image1), mask2)
        mask3 = self.mask_block3(mask2)
        image3 = self.attention3(self.image_block3(image2), mask3)
        return self.classifier(torch.cat([image3.mean((2, 3)), mask3.mean((2, 3))], 1))


class MaskedCNN(nn.Module):
    def __init__(
        self, classes: int, channels: int = 1, dropout: float = 0.5, image_size: int = 128
    ):
        super().__init__()
        flat = 64 * (image_size // 8) ** 2
        self.features = nn.Sequential(
            *(
                nn.Conv2d(channels, 16, 3, padding=1),
                nn.LeakyReLU(),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(16),
            ),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(32)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Flatten(), nn.BatchNorm1d(flat), nn.Linear(flat, 128)),
            *(nn.LeakyReLU(), nn.Dropout(dropout), nn.Linear(128, classes)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x[:, :1] * x[:, 1:]))


REFERENCES = {
    "attention": Classifier,
    "attention_multiscale": ClassifierV2,
    "masked_cnn": MaskedCNN,
}
