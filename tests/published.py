"""Networks of PyTorch libraries with random weights, for comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


def perturbed(network: torch.nn.Module) -> torch.nn.Module:
    """Return the network in evaluation mode, with BatchNorm tensors that differ from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(0, 0.1, generator=generator)
    return network.eval()


def tensors_of(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def resnet(name: str, classes: int = 7, inputs: int = 3) -> torch.nn.Module:
    """Create transformers' ResNet of that name."""
    from transformers import ResNetConfig, ResNetForImageClassification

    depths = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}[name]
    basic = name != "resnet50"
    config = ResNetConfig(
        num_channels=inputs,
        num_labels=classes,
        depths=depths,
        layer_type="basic" if basic else "bottleneck",
        hidden_sizes=[64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
    )
    torch.manual_seed(0)
    return perturbed(ResNetForImageClassification(config))


def efficientnet(name: str, classes: int = 7, image_size: int | None = None) -> torch.nn.Module:
    """Create efficientnet_pytorch's B0 or a network of efficientnet_lite_pytorch.

    Padding depends on the input size if `image_size` is None.
    """
    if name.startswith("efficientnet_lite"):
        from efficientnet_lite_pytorch import EfficientNet
    else:
        from efficientnet_pytorch import EfficientNet
    torch.manual_seed(0)
    network = EfficientNet.from_name(
        name.replace("_", "-"), num_classes=classes, image_size=image_size
    )
    return perturbed(network)


def features_and_logits(network: torch.nn.Module, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute PyTorch's mean features and logits of an NHWC batch."""
    batch = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        if hasattr(network, "extract_features"):
            return network.extract_features(batch).mean((2, 3)).numpy(), network(batch).numpy()
        return network.resnet(batch).pooler_output.flatten(1).numpy(), network(batch).logits.numpy()


def write_resnet18(path: Path, *, inputs: int = 3) -> Path:
    """Write a random resnet18 of two classes under torchvision's names as .safetensors."""
    from flax import nnx
    from safetensors.numpy import save_file

    from perturbjax.models.resnet import NAMINGS, RESNET18

    rng, tensors = np.random.default_rng(0), {}
    model = nnx.eval_shape(lambda: RESNET18.network(classes=2, inputs=inputs, rngs=nnx.Rngs(0)))
    for layer, leaf in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        fan_in = np.prod(leaf.shape[:-1]) or 1
        value = (
            rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape)
            if leaf.ndim > 1
            else rng.uniform(0.5, 1.5, leaf.shape)
        )
        value = value.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, (0,)))
        tensors[NAMINGS[0].tensor(layer)] = np.ascontiguousarray(value, np.float32)
    save_file(tensors, path)
    return path
