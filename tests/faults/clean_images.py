"""Clean models of pictures: deep, with running statistics, skips, gates and samplers."""

import torch
from faults.clean_case import ROWS, Clean, classify, labelled, three, vectors
from torch import Tensor, nn
from torch.nn import functional

PICTURE = (2, 8, 8)


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet18(nn.Module):
    """The eighteen layers of He et al. 2016, a sixteenth as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(2, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )
        widths = ((4, 4, 1), (4, 4, 1), (4, 6, 2), (6, 6, 1), (6, 8, 2), (8, 8, 1), (8, 10, 2))
        self.blocks = nn.Sequential(*(BasicBlock(*w) for w in (*widths, (10, 10, 1))))
        self.fc = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class DenseNet(nn.Module):
    """Every layer reads all that came before it; pooled transitions between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        first = [self.layer(4 + 3 * i, 3) for i in range(4)]
        second = [self.layer(6 + 3 * i, 3) for i in range(4)]
        self.first, self.second = nn.ModuleList(first), nn.ModuleList(second)
        self.transition = self.layer(16, 6)
        self.norm = nn.BatchNorm2d(18)
        self.head = nn.Linear(18, 3)

    @staticmethod
    def layer(width_in: int, width_out: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(width_in), nn.ReLU(), nn.Conv2d(width_in, width_out, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.first:
            features.append(layer(torch.cat(features, 1)))
        features = [functional.avg_pool2d(self.transition(torch.cat(features, 1)), 2)]
        for layer in self.second:
            features.append(layer(torch.cat(features, 1)))
        return self.head(functional.relu(self.norm(torch.cat(features, 1))).amax((2, 3)))


class ViT(nn.Module):
    """Patches, a class token, positions, and torch's own encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.within = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).mT).mT
        return x + self.within(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, stride=4)
        self.blocks = nn.Sequential(*(MixerBlock(4, 8) for _ in range(4)))
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


class BatchNormUnet(nn.Module):
    """Transposed convolutions, upsampling, concatenated skips, dropout of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.pair(2, 4), self.pair(4, 6)
        self.bottom = self.pair(6, 8)
        self.rise = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.up2, self.up1 = self.pair(12, 6), self.pair(10, 4)
        self.drop = nn.Dropout2d(0.2)
        self.head = nn.Conv2d(4, 1, 1)

    @staticmethod
    def pair(width_in: int, width_out: int) -> nn.Module:
        layers: list[nn.Module] = []
        for width in (width_in, width_out):
            conv = nn.Conv2d(width, width_out, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(width_out), nn.LeakyReLU(0.1, inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(functional.max_pool2d(one, 2))
        bottom = self.drop(self.bottom(functional.max_pool2d(two, 2)))
        two = self.up2(torch.cat([self.rise(bottom), two], 1))
        one = self.up1(torch.cat([functional.interpolate(two, scale_factor=2), one], 1))
        return self.head(one).squeeze(1)


class ConvNext(nn.Module):
    """Depthwise convolutions, channels-last norms, and a layer scale of 1e-6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 2, stride=2)
        self.depthwise = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, groups=6) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.inner = nn.ModuleList(nn.Linear(6, 12) for _ in range(3))
        self.outer = nn.ModuleList(nn.Linear(12, 6) for _ in range(3))
        self.scales = nn.ParameterList(torch.full((6,), 1e-6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        layers = zip(self.depthwise, self.norms, self.inner, self.outer, self.scales, strict=True)
        for depthwise, norm, inner, outer, scale in layers:
            y = norm(depthwise(x).permute(0, 2, 3, 1))
            x = x + (scale * outer(functional.gelu(inner(y)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Inverted bottlenecks with hard activations and channel gates, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.expand = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        )
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.stem(x))
        y = functional.relu6(self.expand(x))
        y = functional.hardswish(self.depthwise(y), inplace=True)
        gate = functional.relu(self.squeeze(y.mean((2, 3), keepdim=True)))
        y = y * functional.hardsigmoid(self.excite(gate))
        return self.head((x + self.project(y)).mean((2, 3)))


class Norms(nn.Module):
    """Group, instance and local response norms side by side with statistics without momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(w, 6, 3, padding=1) for w in (2, 6, 6, 6))
        self.group = nn.GroupNorm(3, 6)
        self.instance = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.batch = nn.BatchNorm2d(6, momentum=None)
        self.local = nn.LocalResponseNorm(3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(
            self.convs, (self.group, self.instance, self.batch, self.local), strict=True
        ):
            x = functional.elu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class SpatialTransformer(nn.Module):
    """Looks where its own affine map points; the last layer starts at the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(2, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(144, 6))
        last = self.look[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        last.bias.data.copy_(torch.tensor([0.9, 0.1, 0.05, -0.1, 0.8, 0.02]))
        self.features = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        grid = functional.affine_grid(self.look(x).view(-1, 2, 3), list(x.shape), False)
        seen = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
        return self.head(self.features(seen).flatten(1))


class AutoEncoder(nn.Module):
    """Strided down, transposed up, pixel shuffle at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(2, 6, 3, 2, 1), nn.SELU(), nn.Conv2d(6, 4, 3, 2, 1), nn.AlphaDropout(0.1)
        )
        self.up = nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1), nn.Mish(), nn.Conv2d(6, 8, 1)
        )
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.up(self.down(x)))


def dice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    picture, mask = batch
    logits = model(picture)
    shares, axes = logits.sigmoid(), (1, 2)
    overlap = (2 * (shares * mask).sum(axes) + 1) / (shares.sum(axes) + mask.sum(axes) + 1)
    return functional.binary_cross_entropy_with_logits(logits, mask) + (1 - overlap).mean()


def rebuild(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return functional.smooth_l1_loss(model(batch[0]), batch[0])


def masked(g: torch.Generator) -> tuple[Tensor, Tensor]:
    picture = torch.randn(ROWS, *PICTURE, generator=g)
    return picture, (torch.rand(ROWS, 8, 8, generator=g) > 0.5).float()


IMAGES = (
    Clean("resnet18", ResNet18, labelled(3, *PICTURE), classify),
    Clean("densenet", DenseNet, labelled(3, *PICTURE), classify),
    Clean("vit", ViT, labelled(3, *PICTURE), classify),
    Clean("mlp_mixer", Mixer, labelled(3, *PICTURE), classify),
    Clean("batchnorm_unet", BatchNormUnet, three(masked), dice),
    Clean("convnext_layer_scale", ConvNext, labelled(3, *PICTURE), classify),
    Clean("squeeze_excite", SqueezeExcite, labelled(3, *PICTURE), classify),
    Clean("norms", Norms, labelled(3, *PICTURE), classify),
    Clean("spatial_transformer", SpatialTransformer, labelled(3, *PICTURE), classify),
    Clean("autoencoder", AutoEncoder, vectors(PICTURE), rebuild),
)
